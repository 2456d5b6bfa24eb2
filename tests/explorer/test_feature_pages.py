"""What the pages of features hold, against brute force on given activations; no browser."""

import json
import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flux_ir.commands.explore_features import main
from flux_ir.errors import FluxIRError
from flux_ir.explorer.feature_list import prompt_words
from flux_ir.explorer.feature_pages import PagesSettings, write_pages
from flux_ir.explorer.feature_records import Entries, encode_maps, shard_records
from flux_ir.explorer.feature_stages import read_groups, read_panels
from flux_ir.features.folder import open_features
from tests.explorer.feature_folder import add_later_stages, make_feature_folder, random_values

GRID, STEPS = (2, 3), (2, 5)


def write(folder, **settings) -> Path:
    for _ in write_pages(folder, PagesSettings(**settings)):
        pass
    return folder.path / "pages"


def script(path: Path):
    """The value that a script hands over."""
    text = path.read_text(encoding="ascii")
    name, value = json.loads(f"[{text.removeprefix('received(').removesuffix(')' + chr(10))}]")
    assert path.with_suffix("").as_posix().endswith(name)
    return value


def record(pages: Path, feature: int, stream: str = "img"):
    return json.loads(script(pages / "records" / stream / f"{feature // 64:04d}.js")[feature % 64])


def decoded(text: str, cells: int) -> np.ndarray:
    """A map as the page reads it."""
    content = b64decode(text)
    if content[0] == 1:
        return np.frombuffer(content[1:], np.uint8)
    found, place = np.zeros(cells, np.uint8), -1
    for gap, value in zip(content[1::2], content[2::2], strict=True):
        place += gap + 1
        found[place] = value or found[place]
    return found


def quantised(values: np.ndarray, scale: float) -> np.ndarray:
    return np.where(values > 0, np.rint(255 * values / scale).clip(1, 255), 0).astype(np.uint8)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def values() -> np.ndarray:
    return random_values(images=12, steps=2, tokens=6, features=70, dead=(3,))


@pytest.fixture
def folder(tmp_path, values):
    return make_feature_folder(tmp_path / "features", {"img": values}, grid=GRID, steps=STEPS)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(1, 255)), max_size=12, unique_by=lambda pair: pair[0]))
def test_a_map_is_read_back_as_it_was_written(pairs):
    pairs = sorted(pairs)
    blank = np.zeros(len(pairs), np.int64)
    cell, value = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    texts = list(encode_maps(Entries(blank, blank, cell, value.astype(np.float32)), np.array([701]), 1))
    whole = np.zeros(701, np.uint8)
    whole[cell] = value
    assert [(example, step) for example, step, _ in texts] == [(0, 0)] * bool(pairs)
    for _, _, text in texts:
        assert (decoded(text, 701) == whole).all()


def test_examples_have_the_maps_of_every_step_on_one_scale(folder, values):
    pages = write(folder)
    for feature in (0, 1, 64, 69):
        found = record(pages, feature)
        assert found["pool"] == 1
        assert found["scale"] == pytest.approx(values[..., feature].max(), rel=1e-3)
        assert [group["kind"] for group in found["groups"]] == ["top", "quantile", "quantile", "random", "silent"]
        for image, value, token, step, maps in [row for group in found["groups"][:-1] for row in group["examples"]]:
            assert value == pytest.approx(values[image, ..., feature].max(), rel=1e-3)
            assert values[image, STEPS.index(step), token, feature] == values[image, ..., feature].max()
            for number, text in enumerate(maps):
                wanted = quantised(values[image, number, :, feature], float(values[..., feature].max()))
                assert (decoded(text, 6) == wanted).all()


def test_look_alikes_are_silent_and_have_no_map(tmp_path):
    values = random_values(images=4, steps=1, tokens=6, features=3)
    values[2, ..., 1] = 0
    pages = write(make_feature_folder(tmp_path / "features", {"img": values}, steps=(0,)))
    silent = record(pages, 1)["groups"][-1]
    assert silent["examples"] == [[2, 0.5, 0, 0, []]]


def test_a_dead_feature_has_a_record_without_examples(folder):
    found = record(write(folder), 3)
    assert found["groups"][0]["examples"] == []
    assert found["scale"] == 0


def test_records_stay_small_and_coarse_maps_hold_the_largest_of_their_tokens(tmp_path):
    values = random_values(images=6, steps=1, tokens=8 * 12, features=2, share=0.9)
    folder = make_feature_folder(tmp_path / "features", {"img": values}, grid=(8, 12), steps=(4,))
    largest = values.max(axis=(0, 1, 2))
    shown = read_groups(folder, "img"), read_panels(folder, "img")
    ((fine, _),) = shard_records(folder, "img", *shown)
    assert json.loads(fine)["pool"] == 1
    ((coarse, _),) = shard_records(folder, "img", *shown, limit=len(fine) - 200)
    assert len(coarse) <= len(fine) - 200
    assert json.loads(coarse)["pool"] == 2
    for image, *_, (text,) in json.loads(coarse)["groups"][0]["examples"]:
        blocks = values[image, 0, :, 0].reshape(4, 2, 6, 2).max(axis=(1, 3)).ravel()
        assert (decoded(text, 24) == quantised(blocks, float(largest[0]))).all()


def test_patches_name_the_strongest_features_of_every_token(folder, values):
    pages = write(folder, patch_features=3)
    for image in (0, 5):
        found = script(pages / "patches" / "000" / f"{image:06d}.js")["img"]
        features = np.frombuffer(b64decode(found["feature"]), "<u2").reshape(2, 6, 3)
        shares = np.frombuffer(b64decode(found["value"]), "<u2").reshape(2, 6, 3)
        left = np.frombuffer(b64decode(found["unexplained"]), "<f4").reshape(2, 6)
        order = np.argsort(-values[image], axis=2, kind="stable")[..., :3]
        there = np.take_along_axis(values[image], order, axis=2)
        assert (np.where(shares > 0, features, 0) == np.where(there > 0, order, 0)).all()
        assert shares / 65535 * found["scale"] == pytest.approx(there, abs=1e-4 * found["scale"])
        assert (left == 0.25).all()


def test_the_index_of_words_counts_top_pictures(folder):
    group = read_groups(folder, "img")[0]
    found = prompt_words(folder, group.image)
    ptr, features, counts = (np.frombuffer(b64decode(found[name]), kind) for name, kind in _KINDS.items())
    assert found["words"] == sorted(found["words"])
    word = found["words"].index("7")
    assert found["words"][-1] == "thing"
    wanted = {feature: int((group.image[feature] == 7).sum()) for feature in range(70)}
    here = slice(ptr[word], ptr[word + 1])
    assert dict(zip(features[here].tolist(), counts[here].tolist(), strict=True)) == {
        feature: count for feature, count in wanted.items() if count
    }


_KINDS = {"ptr": "<u4", "features": "<u4", "counts": "u1"}


def test_the_marks_of_the_list_lie_on_the_square_in_the_middle(folder, values):
    pages = write(folder)
    found = script(pages / "list-img.js")
    top = np.frombuffer(b64decode(found["top"]), "<i4").reshape(70, 8)
    peaks = np.frombuffer(b64decode(found["peaks"]), np.uint8).reshape(70, 8, 2) / 255
    known = read_groups(folder, "img")[0]
    assert (top[:, :4] == known.image).all()
    assert (top[:, 4:] == -1).all()
    for feature, place in ((0, 0), (5, 2), (69, 3)):
        row, column = divmod(int(known.token[feature, place]), 3)
        wanted = np.clip(0.5 + ((column + 0.5) / 3 - 0.5) * 1.5, 0, 1), (row + 0.5) / 2  # pictures of 48 x 32 pixels
        assert peaks[feature, place] == pytest.approx(wanted, abs=1 / 255)


def test_a_picture_is_drawn_once_and_never_enlarged(folder):
    write(folder)
    small = folder.path / "thumbnails" / "000" / "000007.webp"
    with Image.open(small) as picture:
        assert picture.size == (48, 32)
    before = small.stat().st_mtime_ns
    write(folder, patch_features=0)
    assert small.stat().st_mtime_ns == before
    write(folder, thumbnail_px=24)
    with Image.open(small) as picture:
        assert picture.size == (24, 16)


def test_a_second_run_changes_no_byte_and_a_stopped_one_goes_on(tmp_path, values):
    one = make_feature_folder(tmp_path / "one" / "features", {"img": values}, grid=GRID, steps=STEPS)
    write(one)
    before = tree(one.path)
    write(one)
    assert tree(one.path) == before
    two = make_feature_folder(tmp_path / "two" / "features", {"img": values}, grid=GRID, steps=STEPS)
    for stopped_after in (3, 14, 25):
        run = write_pages(two, PagesSettings())
        for _ in range(stopped_after):
            next(run)
        run.close()
    write(two)
    assert tree(two.path) == before


def test_other_settings_leave_nothing_of_the_former_ones(folder):
    write(folder, patch_features=8)
    pages = write(folder, patch_features=0)
    assert not (pages / "patches").exists()


def test_prompts_end_no_script_and_no_element(tmp_path, values):
    prompts = ["</script><script>alert(1)</script>", "<!-- \u2028 '\"`${x}\\", *["fine"] * 10]
    folder = make_feature_folder(tmp_path / "features", {"img": values}, grid=GRID, steps=STEPS, prompts=prompts)
    pages = write(folder)
    rows = script(pages / "images" / "0000.js")
    assert [row[1] for row in rows if row] == [prompts[index] for index, row in enumerate(rows) if row]
    page = (pages / "index.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2
    assert "script-src 'sha256-" in page
    assert "alert(1)" not in page


def test_captures_without_pictures_are_refused_or_shown_as_maps_alone(tmp_path, values):
    folder = make_feature_folder(tmp_path / "features", {"img": values}, grid=GRID, steps=STEPS, pictures=False)
    with pytest.raises(FluxIRError, match="were collected without pictures") as error:
        write(folder)
    assert "--save_images" in error.value.hint
    assert not (folder.path / "pages").exists()
    assert record(write(folder, pictures=False), 0)["groups"][0]["examples"]
    assert not (folder.path / "thumbnails").exists()


def test_a_broken_picture_is_named(folder):
    (folder.path.parent / "captures" / "pictures" / "0004.png").write_bytes(b"no picture")
    with pytest.raises(FluxIRError, match=r"0004\.png must be a picture"):
        write(folder)


def test_a_folder_without_examples_says_which_command_finds_them(tmp_path, values):
    folder = make_feature_folder(tmp_path / "features", {"img": values}, grid=GRID, steps=STEPS, with_examples=False)
    with pytest.raises(FluxIRError, match="the stage examples is not complete") as error:
        write(folder)
    assert "find-examples" in error.value.hint


def test_one_image_and_features_that_are_all_dead(tmp_path):
    folder = make_feature_folder(tmp_path / "features", {"img": np.zeros((1, 1, 6, 4), np.float32)}, steps=(0,))
    pages = write(folder)
    assert record(pages, 2)["groups"][0]["examples"] == []
    assert script(pages / "texts-img.js") == {"labels": [""] * 4, "words": [""] * 4}


def test_wrong_settings_are_refused():
    with pytest.raises(FluxIRError, match="features of a patch must be 0 to 64: got 65"):
        PagesSettings(patch_features=65)
    with pytest.raises(FluxIRError, match="small pictures must have 16 to 1,024 pixels on the longer side: got 8"):
        PagesSettings(thumbnail_px=8)


def test_the_command_writes_pages_prints_the_page_and_does_nothing_the_second_time(folder, capsys):
    words = ["--features", str(folder.path), "--patch_features", "2"]
    assert main(words) == 0
    page = folder.path / "pages" / "index.html"
    assert capsys.readouterr().out.strip() == str(page)
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before
    assert "the pages" in capsys.readouterr().err
    assert open_features(folder.path).stages["pages"]["settings"]["patch_features"] == 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--features", "nowhere"], "error: nowhere holds no features: there is no features.json"),
        (["--features", "nowhere", "--thumbnail_px", "8"], "--thumbnail_px"),
    ],
)
def test_wrong_words_end_with_one_line(words, error, capsys):
    assert main(words) == 2
    assert error in capsys.readouterr().err


def test_what_later_stages_found_is_shown_and_pages_follow_it(folder):
    write(folder)
    folder = add_later_stages(folder)
    pages = write(folder)
    found = record(pages, 1)
    assert found["words"] == [["blue thing", 2.5, 7], ["red", 1.25, 3]]
    assert found["nearest"] == [[2, pytest.approx(0.5 + 0.4 / 69, rel=1e-3)]]
    assert found["draws"][0][0] == "../draws/1.png"
    strips = ["../steering/strips/1_0.png", "../steering/strips/1_0_random.png"]
    said = ["a <b>red</b> thing", ["-2", "0", "+2"], "latent", 0.25, 0.125, True, [2]]
    assert found["steering"] == [strips + said]
    assert record(pages, 2)["steering"] == []
    assert found["label"]["score"] == 0.91
    assert record(pages, 2)["draws"] == record(pages, 2)["words"] == []
    texts = script(pages / "texts-img.js")
    assert texts["labels"][:3] == ["", "blue <b>things</b>", ""]
    assert texts["words"][1] == "blue thing, red"
    (data,) = re.findall('id="pages-data">(.*?)</script>', (pages / "index.html").read_text(encoding="utf-8"))
    columns = json.loads(data)["of"]["img"]["columns"]
    names = [column["name"] for column in columns]
    assert {"coherence", "encoder_decoder_cosine", "label_score"} < set(names)
    assert not {"stability", "stability_feature"} & set(names)  # nobody knows it
    numbers = np.frombuffer(b64decode(script(pages / "list-img.js")["columns"]), "<f4").reshape(len(names), 70)
    assert numbers[names.index("coherence")] == pytest.approx(np.linspace(0.9, 0.1, 70))
    assert np.isnan(numbers[names.index("label_score")]).sum() == 68


def test_pages_follow_what_is_said_of_a_feature_that_was_turned_again(folder):
    folder = add_later_stages(folder)
    assert record(write(folder), 1)["steering"][0][-2] is True
    numbers = folder.path / "steering" / "1.json"
    numbers.write_text(numbers.read_text().replace("true", "false"))
    assert record(write(folder), 1)["steering"][0][-2] is False
    numbers.write_text("{}")
    with pytest.raises(FluxIRError, match=r"1\.json must have the keys feature, strengths, scenes, "):
        write(folder)


def test_a_file_of_a_stage_that_is_none_is_named(folder):
    folder = add_later_stages(folder)
    (folder.path / "labels.json").write_text("[")
    with pytest.raises(FluxIRError, match=r"labels\.json must be JSON"):
        write(folder)
