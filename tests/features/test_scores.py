"""Scores, token maps and the table against brute force; parts resumed and shared; what cannot be scored."""

import shutil

import numpy as np
import pytest

import flux_ir
from flux_ir.errors import FluxIRError
from flux_ir.features.folder import open_features
from tests.features.conftest import STEPS, dense_of

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


def test_a_stream_that_was_not_scored_is_refused(small):
    with pytest.raises(FluxIRError, match="holds features of img tokens: got txt"):
        flux_ir.read_features(small / "features" / "img", "txt")
