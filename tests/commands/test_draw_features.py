"""flux-ir draw-features on a real collection of flux-tiny: sheets, neighbours, what features draw, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import flux_ir
from flux_ir.commands.draw_features import main
from flux_ir.features.decoder_view import nearest_by_cosine
from flux_ir.features.folder import open_features, read_tensors
from flux_ir.features.heatmaps import scale_of, values_of
from flux_ir.visualize.heatmap import overlay
from tests.features.real import HEIGHT, WIDTH, files_of, make_features

WITHOUT_MODEL = ("--draws", "False")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A collection with pictures, an autoencoder of image tokens, scores, examples and lists. Read it only."""
    folder = tmp_path_factory.mktemp("drawing")
    features = make_features(folder, site="single.6.img")
    flux_ir.select_features(features, permutations=0, effect_images=0, examples_each=1)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of everything, to draw in."""
    return shutil.copytree(made, tmp_path / "made") / "features" / "sae"


def run(capsys, folder, *words):
    code = main(["--features", str(folder), *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def strongest(folder, count):
    """The numbers of so many features with examples."""
    return np.flatnonzero(open_features(folder).table().alive)[:count].tolist()


def test_chosen_features_are_drawn_with_what_they_draw_and_a_rerun_changes_no_byte(folder, capsys):
    numbers = strongest(folder, 3)
    words = ("--numbers", ",".join(map(str, numbers)), "--examples", "3", "--batch_size", "2")
    code, out, err = run(capsys, folder, *words)
    assert code == 0, err
    assert "3 drawn" in out
    assert sorted(path.stem for path in (folder / "draws").iterdir()) == sorted([*map(str, numbers), "untouched"])
    for number in numbers:
        with Image.open(folder / "draws" / f"{number}.png") as picture:
            assert picture.size == (2 * WIDTH, HEIGHT)  # read out, and the icon
    with Image.open(folder / "sheets" / "chosen.png") as sheet:
        assert sheet.width > 220 + 5 * 128
    before = files_of(folder)
    assert run(capsys, folder, *words)[0] == 0
    assert files_of(folder) == before


def test_a_run_that_was_stopped_renders_only_what_is_missing_and_ends_with_the_same_bytes(folder, capsys, monkeypatch):
    numbers = strongest(folder, 3)
    words = ("--numbers", ",".join(map(str, numbers)), "--examples", "1", "--batch_size", "2")
    assert run(capsys, folder, *words)[0] == 0
    whole = files_of(folder)
    (folder / "draws" / f"{numbers[1]}.png").unlink()
    shutil.rmtree(folder / "sheets")
    rendered = []
    real = flux_ir.api.draw_features.Studio.draw
    monkeypatch.setattr(
        "flux_ir.api.draw_features.Studio.draw", lambda self, some: rendered.append(list(some)) or real(self, some)
    )
    assert run(capsys, folder, *words)[0] == 0
    assert files_of(folder) == whole
    assert rendered == [numbers[:2]]


def test_other_settings_draw_the_icons_anew(folder, capsys):
    (number,) = strongest(folder, 1)
    for strength in ("1", "0.5"):
        words = ("--numbers", str(number), "--examples", "1", "--strength", strength)
        assert run(capsys, folder, *words)[0] == 0
        content = (folder / "draws" / f"{number}.png").read_bytes()
        with Image.open(folder / "draws" / f"{number}.png") as picture:
            pixels = np.asarray(picture)
        if strength == "1":
            first, first_pixels = content, pixels
    assert content != first
    assert np.array_equal(pixels[:, :WIDTH], first_pixels[:, :WIDTH])  # the direction read out is the same
    assert not np.array_equal(pixels[:, WIDTH:], first_pixels[:, WIDTH:])


def test_neighbours_of_all_features_are_kept_with_the_dictionary(folder, capsys):
    assert run(capsys, folder, *WITHOUT_MODEL, "--top", "1")[0] == 0
    columns = open_features(folder).columns("decoder.safetensors", "img")
    sae = flux_ir.load_sae(folder.parents[1] / "saes" / "sae")
    found = nearest_by_cosine(sae.W_dec)
    assert np.array_equal(columns["nearest"], found.feature.numpy())
    np.testing.assert_allclose(columns["nearest_cosine"], found.likeness.numpy(), atol=1e-6)
    features = open_features(folder)
    fires = [set(features.scores_of(f)[0].tolist()) for f in range(48)]
    for f in range(48):
        first = columns["together"][f, 0]
        shares = [len(fires[f] & fires[g]) / max(1, len(fires[f] | fires[g])) for g in range(48) if g != f]
        if first >= 0:
            assert columns["together_jaccard"][f, 0] == pytest.approx(max(shares))
        else:
            assert max(shares) == 0
    cosine = torch.nn.functional.cosine_similarity(sae.encoder, sae.W_dec, dim=1)
    np.testing.assert_allclose(columns["encoder_decoder_cosine"], cosine.numpy(), atol=1e-6)


def test_overlays_are_the_pictures_with_the_stored_maps(folder, capsys):
    (number,) = strongest(folder, 1)
    words = ("--numbers", str(number), "--examples", "2", "--overlays", "True", "--percentile", "80")
    assert run(capsys, folder, *WITHOUT_MODEL, *words)[0] == 0
    features = open_features(folder)
    images = features.examples().top[number][:2].tolist()
    top = scale_of(features, number, 80)
    written = sorted((folder / "overlays" / str(number)).iterdir())
    assert [path.stem.split("_")[1] for path in written] == [features.images[image].id for image in images]
    for path, image in zip(written, images, strict=True):
        with Image.open(features.picture(image)) as file:
            picture = file.convert("RGB")
        assert picture.size == (WIDTH, HEIGHT)  # 4 x 3 tokens
        values = np.nan_to_num(features.map(number, image)).max(axis=0)
        assert values.shape == (3, 4)
        assert np.array_equal(values, values_of(features, number, image))
        with Image.open(path) as drawn:
            assert np.array_equal(np.asarray(drawn), np.asarray(overlay(picture, values, top)))


def test_tokens_without_a_place_in_the_picture_get_one_note_and_no_sheet(folder, capsys):
    rows = [json.loads(line) | {"grid": None} for line in (folder / "images.jsonl").read_text().splitlines()]
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(capsys, folder, *WITHOUT_MODEL, "--by", "share", "--top", "2")
    assert code == 0, err
    assert err.count("have no place in the pictures") == 1
    assert "tokens that lie on no known grid" in err
    assert not (folder / "sheets").exists()


@pytest.mark.parametrize("by", ["distinct", "coherent", "share"])
def test_features_are_drawn_by_lists_and_by_numbers_of_the_table(folder, capsys, by):
    code, out, err = run(capsys, folder, *WITHOUT_MODEL, "--by", by, "--top", "2", "--examples", "2")
    assert code == 0, err
    assert "2 drawn" in out
    assert (folder / "sheets" / f"{by}.png").is_file()


def test_more_features_than_a_sheet_has_lines_go_to_the_next(folder, capsys, monkeypatch):
    monkeypatch.setattr("flux_ir.api.draw_features.LINES", 2)
    words = ("--by", "share", "--top", "5", "--examples", "1", "--cell_px", "16")
    assert run(capsys, folder, *WITHOUT_MODEL, *words)[0] == 0
    assert sorted(path.name for path in (folder / "sheets").iterdir()) == ["share.png", "share_2.png", "share_3.png"]


def test_without_pictures_one_line_says_so_and_the_rest_is_done(folder, capsys):
    shutil.rmtree(folder.parents[1] / "captures" / "pictures")
    code, _, err = run(capsys, folder, *WITHOUT_MODEL, "--top", "2")
    assert code == 0
    (note,) = [line for line in err.splitlines() if "no picture" in line]
    assert "collect with --save_images" in note
    assert not (folder / "sheets").exists()
    assert (folder / "decoder.safetensors").is_file()


def test_a_picture_that_cannot_be_read_is_one_line(folder, capsys):
    for path in (folder.parents[1] / "captures" / "pictures").rglob("*.jpg"):
        path.write_bytes(b"no picture")
    code, _, err = run(capsys, folder, *WITHOUT_MODEL, "--top", "1")
    assert code == 2
    assert "must be a picture that can be read" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--numbers", "48"), "features are numbered 0 to 47: got 48"),
        (("--by", "coherence"), "there is no list 'coherence'"),
        (("--by", "share", "--numbers", "1"), "features are chosen in one way: got --numbers and --by"),
        (("--percentile", "0"), "--percentile must be above 0 and at most 100: got 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(folder, capsys, words, message):
    code, _, err = run(capsys, folder, *WITHOUT_MODEL, *words)
    assert code == 2
    assert message in err


def test_a_folder_without_examples_is_one_line(folder, capsys):
    described = (folder / "features.json").read_text()
    (folder / "features.json").write_text(described.replace('"examples": {', '"others": {'))
    code, _, err = run(capsys, folder)
    assert code == 2
    assert "the stage examples is not complete" in err


def test_numbers_are_kept_as_they_are_typed(folder):
    drawn = flux_ir.draw_features(folder, numbers=[5, 3, 5], draws=False, examples=1)
    assert drawn.features == [5, 3]
    assert drawn.draws == []
    assert read_tensors(folder / "decoder.safetensors")[1]["scores"] == open_features(folder).settings.digest


def test_a_collection_that_has_grown_since_is_one_line_and_nothing_is_drawn(folder, capsys):
    path = folder.parents[1] / "captures" / "collection.json"
    path.write_text(path.read_text() + " ")
    code, _, err = run(capsys, folder)
    assert code == 2
    assert "has changed since" in err
    assert not (folder / "decoder.safetensors").exists()
