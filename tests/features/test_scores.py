"""Scores, token maps and the table against brute force; parts resumed and shared; what cannot be scored."""

import gc
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import flux_ir
from flux_ir.commands.score_features import summary
from flux_ir.errors import FluxIRError
from flux_ir.features.contents import ImageRow, ScorePart
from flux_ir.features.folder import open_features
from flux_ir.features.scoring import notes_of
from flux_ir.features.table import Sums
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.files.folder import save_sae
from tests.activations.conftest import write_collection
from tests.features.conftest import STEPS, D, dense_of, save_small_sae, say_sizes

CASES = [("img", "double.0.img", "img"), ("whole", "single.1", "img"), ("whole", "single.1", "txt")]
every_case = pytest.mark.parametrize(("name", "site", "stream"), CASES)


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@every_case
def test_s_and_the_maps_are_those_of_brute_force(small, name, site, stream):
    folder = open_features(small / "features" / name)
    z = dense_of(small / "saes" / name, small / "captures", site, stream).z
    images, _, tokens, _ = z.shape
    for image in range(images):
        part = folder.part_of(image, stream)
        rows = part.rows(image)
        expected = np.nanmax(z[image], axis=(0, 1))
        assert part.feature[rows].tolist() == np.flatnonzero(expected).tolist()
        np.testing.assert_allclose(part.max[rows], expected[expected > 0], rtol=1e-5)
        np.testing.assert_allclose(part.mean[rows], np.nanmean(z[image], axis=(0, 1))[expected > 0], rtol=1e-5)
        for row in range(rows.start, rows.stop):
            of = z[image, :, :, part.feature[row]]
            assert (STEPS[np.nanargmax(of) // tokens], np.nanargmax(of) % tokens) == (
                part.at_step[row],
                part.at_token[row],
            )
        for feature in (0, 3, 17):
            np.testing.assert_allclose(
                part.token_map(image, feature), np.nan_to_num(z[image, :, :, feature]), rtol=1e-5, atol=1e-7
            )
        for at, step in enumerate(STEPS):
            found = part.token_features(image, step)
            for token in range(tokens):
                own = slice(found.ptr[token], found.ptr[token + 1])
                assert set(found.feature[own]) == set(np.flatnonzero(np.nan_to_num(z[image, at, token])))
                assert np.all(np.diff(found.value[own]) <= 0)


@every_case
def test_the_table_is_that_of_brute_force(small, name, site, stream):
    table = open_features(small / "features" / name).table(stream)
    z = dense_of(small / "saes" / name, small / "captures", site, stream).z
    tokens = np.isfinite(z[..., 0]).sum()
    flat = z[np.isfinite(z[..., 0])]
    fired = (flat > 0).sum(0)
    assert table.count.tolist() == fired.tolist()
    assert table.count[3] == 0
    np.testing.assert_allclose(table.frequency, fired / tokens)
    assert table.images.tolist() == (np.nanmax(z, axis=(1, 2)) > 0).sum(0).tolist()
    np.testing.assert_allclose(table.mean_active, flat.sum(0) / np.maximum(fired, 1), rtol=1e-5)
    np.testing.assert_allclose(table.max_active, flat.max(0), rtol=1e-5)
    np.testing.assert_allclose(table.share, (flat**2).sum(0) / (flat**2).sum(), rtol=1e-5)  # unit decoder
    assert table.share.sum() == pytest.approx(1)
    for step in range(len(STEPS)):
        of_step = z[:, step][np.isfinite(z[:, step, :, 0])]
        np.testing.assert_allclose(table.step_frequency[:, step], (of_step > 0).mean(0))
        np.testing.assert_allclose(table.step_mean[:, step], of_step.mean(0), rtol=1e-5, atol=1e-9)
    for feature in range(len(fired)):
        values = np.clip(flat[flat[:, feature] > 0, feature], table.edges[0], np.nextafter(table.edges[-1], 0))
        assert table.histogram[feature].tolist() == np.histogram(values, table.edges)[0].tolist()
    assert set(table.density) <= {"dead", "rare", "common", "very common"}
    assert table.density[3] == "dead"


@every_case
def test_the_unexplained_variance_is_that_of_its_definition(small, name, site, stream):
    fvu = open_features(small / "features" / name).fvu
    _, x, x_hat = dense_of(small / "saes" / name, small / "captures", site, stream)
    for chosen, found in [
        (slice(None), fvu["per_stream"][stream]),
        *((at, fvu["per_step_and_stream"][f"{step}.{stream}"]) for at, step in enumerate(STEPS)),
    ]:
        rows = np.isfinite(x[:, chosen, ..., 0])
        some, hat = x[:, chosen][rows], x_hat[:, chosen][rows]
        assert found == pytest.approx(((some - hat) ** 2).sum() / ((some - some.mean(0)) ** 2).sum(), rel=1e-5)


def test_the_commands_say_the_unexplained_variance_of_every_step(small):
    folder = open_features(small / "features" / "whole")
    lines = summary(folder)
    assert [line.split(":")[0] for line in lines] == ["img", "img", "txt", "txt"]
    for stream, line in (("img", lines[1]), ("txt", lines[3])):
        each = [f"{step}: {100 * folder.fvu['per_step_and_stream'][f'{step}.{stream}']:.2f}%" for step in STEPS]
        assert line == f"{stream}: FVU by step: {', '.join(each)}"


def test_the_same_command_again_changes_no_byte_and_missing_parts_are_made_again(small, tmp_path):
    shutil.copytree(small, tmp_path / "copy")
    folder = tmp_path / "copy" / "features" / "whole"
    before = bytes_of(folder)
    words = (tmp_path / "copy" / "saes" / "whole", tmp_path / "copy" / "captures")
    flux_ir.score_features(*words, output_dir=folder.parent)
    assert bytes_of(folder) == before
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    (folder / "features.json").unlink()
    flux_ir.score_features(*words, output_dir=folder.parent)
    assert bytes_of(folder) == before


@pytest.mark.parametrize("name", ["table.safetensors", "scores/img/00000.safetensors", "examples.safetensors"])
def test_a_result_that_was_deleted_is_made_again_by_its_stage(small, tmp_path, name):
    shutil.copytree(small, tmp_path / "copy")
    folder = tmp_path / "copy" / "features" / "whole"
    flux_ir.find_examples(folder, top=2)
    before = bytes_of(folder)
    (folder / name).unlink()
    flux_ir.score_features(
        tmp_path / "copy" / "saes" / "whole", tmp_path / "copy" / "captures", output_dir=folder.parent
    )
    flux_ir.find_examples(folder, top=2)
    assert bytes_of(folder) == before


def test_parts_are_closed_with_the_folder_they_are_of(small):
    gc.disable()  # which would close them some time later
    try:
        folder = open_features(small / "features" / "img")
        part = weakref.ref(folder.part("img", 0).value.base)
        assert part() is not None
        del folder
        assert part() is None
    finally:
        gc.enable()


def test_a_stream_that_was_not_scored_is_refused(small):
    with pytest.raises(FluxIRError, match="holds features of img tokens: got txt"):
        flux_ir.read_features(small / "features" / "img", "txt")


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """Tokens of 3 x 4 patches, some of them left out, in which feature 0 means a place and feature 1 none.

    Feature 0 fires on the right-most column alone, 1 on one random token of an image, 2 on all tokens alike.
    """
    folder = tmp_path_factory.mktemp("placed")
    draw = np.random.default_rng(0)
    kept = [0, 1, 3, 4, 6, 7, 8, 11]  # of 12
    write_collection(folder / "captures", 20, sites=("double.0.img",), steps=(0,), img_tokens=12, places=kept)
    say_sizes(folder / "captures", 48, 64)
    for number in range(20):
        path = folder / "captures" / "shards" / f"{number:06d}.safetensors"
        values = torch.zeros(2, 8, D)
        values[:, [position % 4 == 3 for position in kept], 0] = 2
        values[[0, 1], draw.integers(0, 8, 2), 1] = 3
        values[:, :, 2] = 1
        with safe_open(path, "pt") as opened:
            others = {key: opened.get_tensor(key) for key in ("state/step_0", "img_positions")}
            save_file(others | {"double.0.img/step_0": values.bfloat16()}, path, opened.metadata())
    sae = make_sae(SAEConfig("l1", D, D, site="double.0.img", model="tiny", steps=(0,)))
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(D))
        sae.W_dec.copy_(torch.eye(D))
        sae.b_enc.zero_()
    save_sae(sae, folder / "sae")
    return flux_ir.score_features(folder / "sae", folder / "captures", output_dir=folder), kept


def test_spatial_numbers_are_those_of_the_maps_that_are_there(placed):
    folder, kept = placed
    table = folder.table()
    assert folder.images[0].grid == (3, 4)
    assert table.means_place[:3].tolist() == [True, False, False]
    assert table.position_r2[0] == pytest.approx(1)
    assert abs(table.position_r2[1]) < 0.2
    rows, columns = np.divmod(kept, 4)
    right = columns == 3
    assert table.centre_x[0] == pytest.approx(3.5 / 4)
    assert table.centre_y[0] == pytest.approx(((rows[right] + 0.5) / 3).mean())
    assert table.centre_x[2] == pytest.approx(((columns + 0.5) / 4).mean())
    assert table.spread[0] == pytest.approx(rows[right].std() / 4)  # in units of the longer side
    assert table.spread[1] == pytest.approx(0, abs=1e-6)
    assert table.spread[2] == pytest.approx(np.sqrt(rows.var() + columns.var()) / 4)
    assert table.entropy[0] == pytest.approx(np.log(3) / np.log(8))
    assert table.entropy[1:3] == pytest.approx([0, 1], abs=1e-6)
    (found,) = folder.map(0, 5)
    assert np.isnan(found).sum() == 4
    assert (found[:, 3] == 2).all()


def smooth_part(images, side, draw):
    """Feature 0 fires on blocks of 4 x 4 patches that each image has elsewhere; feature 1 on its right half."""
    blocks = draw.random((images, side // 4, side // 4)) < 0.5
    right = np.broadcast_to(np.arange(side) >= side // 2, (images, side, side))
    maps = np.stack([np.kron(blocks, np.ones((1, 4, 4))) > 0, right], 1).reshape(images, 2, -1)
    lengths = maps.sum(2)
    rows, zeros = lengths.size, np.zeros((images, 1, side * side), np.float32)
    ones = np.ones(rows, np.float32)
    return ScorePart(
        images=range(images),
        steps=(0,),
        image_ptr=np.arange(images + 1) * 2,
        feature=np.tile([0, 1], images),
        max=ones,
        mean=ones,
        at_token=np.zeros(rows, np.int32),
        at_step=np.zeros(rows, np.int16),
        row_ptr=np.concatenate([[0], np.cumsum(lengths)]),
        place=np.nonzero(maps)[2],
        value=np.ones(lengths.sum(), np.float32),
        error=zeros,
        norm=zeros,
        positions=np.tile(np.arange(side * side, dtype=np.int32), (images, 1)),
        centred=np.zeros((1, 2)),
    )


@pytest.mark.parametrize("images", [1, 2, 20])
def test_patches_beside_each_other_are_no_draws_of_their_own(small, images):
    known = open_features(small / "features" / "img").settings
    sums = Sums(replace(known, d_in=2, d_sae=2, steps=(0,)), "img", 2.0 ** np.arange(-8, 9, 0.25)[:65])
    rows = [ImageRow(image, f"{image}", "", 0, 1024, 1024, (64, 64), None, None) for image in range(images)]
    sums.add(smooth_part(images, 64, np.random.default_rng(0)), rows)
    table = sums.table(np.ones(2))
    if images == 1:
        assert np.isnan(table.position_r2).all()
        assert not table.means_place.any()
    else:
        assert abs(table.position_r2[0]) < 0.1
        assert table.position_r2[1] == pytest.approx(1)


def test_maps_with_holes_are_noted(placed):
    assert any("not all tokens of the images were kept" in note for note in notes_of(placed[0]))


@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu", "gated"])
def test_autoencoders_with_any_number_of_active_features_are_scored(small, tmp_path, architecture):
    save_small_sae(tmp_path / "sae", "double.0.img", architecture=architecture)
    folder = flux_ir.score_features(tmp_path / "sae", small / "captures", output_dir=tmp_path, name="found")
    z = dense_of(tmp_path / "sae", small / "captures", "double.0.img", "img").z
    assert folder.table().count.tolist() == (z > 0).sum((0, 1, 2)).tolist()
    assert len(set((z > 0).sum(3).ravel())) > 2
    for image in (0, 9):
        np.testing.assert_allclose(folder.map(7, image).reshape(2, -1), z[image, :, :, 7], rtol=1e-4, atol=1e-6)


def test_values_stored_as_float8_are_scored_as_what_they_stand_for(tmp_path):
    write_collection(tmp_path / "captures", 2, sites=("double.0.img",), dtype=torch.float8_e4m3fn)
    save_small_sae(tmp_path / "sae", "double.0.img")
    folder = flux_ir.score_features(tmp_path / "sae", tmp_path / "captures", output_dir=tmp_path, name="found")
    z = dense_of(tmp_path / "sae", tmp_path / "captures", "double.0.img", "img").z
    assert folder.table().count.tolist() == (z > 0).sum((0, 1, 2)).tolist()
    np.testing.assert_allclose(folder.table().max_active, z.max((0, 1, 2)), rtol=1e-5)


def test_captures_of_single_pictures_are_scored_with_their_sizes_and_pictures(tmp_path):
    for seed, (width, height) in enumerate([(64, 48), (48, 64)]):
        flux_ir.capture(
            "a red circle",
            model="flux-tiny",
            seed=seed,
            num_steps=1,
            sites="double.3.img",
            width=width,
            height=height,
            output_dir=tmp_path / "runs",
            should_decode_intermediates=False,
        )
    save_small_sae(tmp_path / "sae", "double.3.img", d=192, steps=(0,), model="flux-tiny")
    folder = flux_ir.score_features(tmp_path / "sae", tmp_path / "runs", output_dir=tmp_path, name="found")
    assert {row.grid for row in folder.images} == {(3, 4), (4, 3)}
    feature = int(folder.table().count.argmax())
    for row in folder.images:
        assert folder.map(feature, row.index).shape == (1, *row.grid)
        assert folder.picture(row.index).name == "img_0.jpg"
        assert (row.seed, row.prompt) in {(0, "a red circle"), (1, "a red circle")}
