import io
import json
import re
import subprocess
import sys
from base64 import b64decode
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_ir.commands.explore import ExploreOptions, main
from flux_ir.errors import FluxIRError
from flux_ir.explorer.data import read_run
from flux_ir.explorer.document import safe_json
from flux_ir.explorer.page import (
    BAND_PIXELS,
    MOST_TILE_PX,
    NOTHING,
    SHEET_PIXELS,
    TileLayout,
    draw_bands,
    lay_out_tiles,
    picture_size,
    write_explorer,
)

HOSTILE = (
    "</script><script>alert(1)</script><!-- {{data}} \u2028\u2029 \"'`\\ \U0001f600 \u202e\u05e9\u05dc\u05d5\u05dd &lt;"
)


class Elements(HTMLParser):
    """What a browser would find: the tags in order, and the text of the elements that have an id."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts, self.inside = [], [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.attributes.append(found)
        self.inside = found.get("id")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


@pytest.fixture
def write(output_dir):
    """Writes the page and reads it as a browser would."""

    def write(*ids, **options):
        target = write_explorer(output_dir, ids or ["1a2b3c4d"], output_dir / "explorer.html", **options)
        elements = Elements(target.read_text(encoding="utf-8"))
        return elements, json.loads(elements.texts["explorer-data"])

    return write


def test_links_are_relative_and_lead_to_the_pictures(make_run, write, output_dir):
    make_run(double=1, single=2, steps=(0, 5))
    _, data = write()
    (run,) = data["runs"]
    assert run["picture"] == "1a2b3c4d/img_0.jpg"
    for lens in ("euler", "x0"):
        for block in run["blocks"]:
            for step in run["steps"]:
                kind, number = block.split(".")
                link = run["lenses"][lens]["pictures"].format(kind=kind, block=number, step=step)
                assert (output_dir / link).is_file()
        assert all((output_dir / band).is_file() for band in run["lenses"][lens]["bands"])
        assert run["lenses"][lens]["missing"] == []


def test_the_data_has_the_documented_keys(make_run, write):
    make_run()
    _, data = write()
    assert set(data) == {"schema", "flux_ir", "runs"}
    assert data["schema"] == 1
    facts = {"model", "seed", "width", "height", "guidance", "num_steps", "timestamp", "weights"}
    place = {"id", "prompt", "picture", "blocks", "steps", "times", "numbers", "lenses", "tiles"}
    assert set(data["runs"][0]) == facts | place
    assert set(data["runs"][0]["lenses"]["x0"]) == {"pictures", "missing", "bands"}
    assert set(data["runs"][0]["tiles"]) == {"tile_width_px", "tile_height_px", "rows_per_band"}


def test_a_hostile_prompt_arrives_as_data_and_makes_no_element(make_run, write):
    make_run(prompt="x")
    harmless, _ = write()
    make_run(prompt=HOSTILE)
    hostile, data = write()
    assert data["runs"][0]["prompt"] == HOSTILE
    assert hostile.tags == harmless.tags


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "&lt;", "\u2028\u2029", "\ud800", "\u202e", "\x00\x1f"])
def test_json_in_the_page_is_plain_ascii_without_markup(text):
    embedded = safe_json({"prompt": text})
    assert json.loads(embedded) == {"prompt": text}
    assert embedded.isascii()
    assert not re.search(r"[<>&\x00-\x1f]", embedded)


def test_no_value_becomes_something_json_cannot_say():
    with pytest.raises(ValueError, match="not JSON compliant"):
        safe_json(float("nan"))


def test_the_policy_allows_nothing_but_the_page_s_own_script_and_style(make_run, write):
    make_run()
    elements, _ = write()
    policy = next(found["content"] for found in elements.attributes if "http-equiv" in found)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_nothing_in_the_page_comes_from_elsewhere(make_run, write, output_dir):
    make_run()
    write()
    page = (output_dir / "explorer.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"\b(?:https?:)?//[a-z][^\s\"'<)]*", page.replace("/* ", "")))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not re.search(r"@import|<link|\bsrc=\"http|\bfetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML", page)


def test_a_single_file_holds_every_picture_and_leaves_no_link(make_run, write, output_dir):
    folder = make_run(double=1, single=2, steps=(0, 5))
    write()
    elements, data = write(single_file=True)
    (run,) = data["runs"]
    for lens in ("euler", "x0"):
        for step in (0, 5):
            address = run["lenses"][lens]["pictures"].format(kind="single", block=1, step=step)
            stored = b64decode(elements.texts[address.removeprefix("#")])
            assert stored == folder.decoded_image(lens, step, "single", 1).read_bytes()
        assert all(band.startswith("#") for band in run["lenses"][lens]["bands"])
    assert b64decode(elements.texts[run["picture"].removeprefix("#")]) == folder.image().read_bytes()
    assert list((output_dir / "explorer_files").iterdir()) == []


def test_thumbnails_of_runs_no_longer_shown_are_removed_and_nothing_else(make_run, write, output_dir):
    make_run("aaaaaaaa")
    make_run("bbbbbbbb")
    write("aaaaaaaa", "bbbbbbbb")
    kept = output_dir / "explorer_files" / "mine.jpg"
    kept.write_bytes(b"")
    write("bbbbbbbb")
    names = {path.name for path in kept.parent.iterdir()}
    assert names == {"bbbbbbbb_euler_0.jpg", "bbbbbbbb_x0_0.jpg", "mine.jpg"}


def test_a_run_without_its_final_picture_or_a_lens_is_shown_all_the_same(make_run, write):
    make_run(lenses=("euler",)).image().unlink()
    _, data = write()
    assert data["runs"][0]["picture"] is None
    assert set(data["runs"][0]["lenses"]) == {"euler"}


def test_runs_come_in_the_order_asked_for_and_once(make_run, write):
    make_run("aaaaaaaa")
    make_run("bbbbbbbb")
    _, data = write("bbbbbbbb", "aaaaaaaa", "bbbbbbbb")
    assert [run["id"] for run in data["runs"]] == ["bbbbbbbb", "aaaaaaaa"]


@pytest.mark.parametrize("name", ["../explorer.html", "a/../../explorer.html"])
def test_the_page_never_lies_outside_the_output_folder(name, make_run, output_dir):
    make_run()
    before = set(output_dir.parent.iterdir())
    with pytest.raises(FluxIRError, match="the page must lie in the folder of the runs"):
        write_explorer(output_dir, ["1a2b3c4d"], output_dir / name)
    assert set(output_dir.parent.iterdir()) == before


def test_a_page_that_fails_leaves_the_earlier_one(make_run, write, output_dir):
    folder = make_run()
    write()
    before = (output_dir / "explorer.html").read_bytes()
    folder.decoded_image("x0", 1, "single", 1).write_bytes(b"")
    with pytest.raises(FluxIRError, match="must be a picture"):
        write()
    assert (output_dir / "explorer.html").read_bytes() == before
    assert not list(output_dir.rglob("*.partial"))


def test_the_command_writes_the_page_beside_the_runs_and_prints_where(make_run, output_dir, capsys):
    make_run("aaaaaaaa")
    make_run("bbbbbbbb")
    assert main(["--output_dir", str(output_dir)]) == 0
    assert capsys.readouterr().out == f"{output_dir / 'explorer.html'}\n"
    data = json.loads(Elements((output_dir / "explorer.html").read_text()).texts["explorer-data"])
    assert [run["id"] for run in data["runs"]] == ["aaaaaaaa", "bbbbbbbb"]


def test_the_command_takes_ids_between_commas():
    assert ExploreOptions(generation_id=("12345678", "1e234567")).generation_id == ("12345678", "1e234567")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--generation_id", "../x"], "error: a generation id is 8 hex digits in lower case: got '../x'"),
        (["--generation_id", "1a2b3c4e"], "error: there is no generation 1a2b3c4e in "),
        (["--generation-ids", "1a2b3c4d"], "error: --generation-ids: no such flag; did you mean --generation_id?"),
    ],
)
def test_wrong_words_end_with_one_line_and_write_nothing(words, error, make_run, output_dir, capsys):
    make_run()
    assert main([*words, "--output_dir", str(output_dir)]) == 2
    assert error in capsys.readouterr().err
    assert not (output_dir / "explorer.html").exists()


def test_the_explorer_loads_neither_torch_nor_numpy():
    code = "import sys, flux_ir.explorer.page; sys.exit(bool({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Thumbnails on a few large pictures


@given(width=st.integers(1, 4096), height=st.integers(1, 4096), rows=st.integers(1, 64), columns=st.integers(1, 64))
def test_tiles_fit_the_budget_and_are_never_enlarged(width, height, rows, columns):
    layout = lay_out_tiles(width, height, rows, columns)
    assert 1 <= layout.tile_width_px <= min(width, MOST_TILE_PX)
    assert 1 <= layout.tile_height_px <= min(height, MOST_TILE_PX)
    assert layout.tile_width_px * layout.tile_height_px * rows * columns <= SHEET_PIXELS
    one_row = layout.tile_width_px * layout.tile_height_px * columns
    assert layout.rows_per_band * one_row <= max(BAND_PIXELS, one_row)


def test_flux_at_fifty_steps_is_a_handful_of_bands():
    layout = lay_out_tiles(1024, 1024, rows=57, columns=50)
    assert layout == TileLayout(tile_width_px=52, tile_height_px=52, rows_per_band=12)


def test_wide_pictures_keep_their_shape():
    assert lay_out_tiles(512, 256, rows=4, columns=4)[:2] == (128, 64)


def test_every_tile_lies_at_its_block_and_step(make_run, output_dir):
    make_run(double=2, single=5, steps=(0, 3, 8), size=(64, 32))
    run = read_run(output_dir, "1a2b3c4d")
    layout = TileLayout(tile_width_px=16, tile_height_px=8, rows_per_band=3)
    bands = [Image.open(io.BytesIO(jpeg)) for jpeg in draw_bands(run, "x0", layout)]
    assert [band.size for band in bands] == [(48, 24), (48, 24), (48, 8)]
    for depth in range(7):
        for column, step in enumerate(run.steps):
            seen = bands[depth // 3].getpixel((16 * column + 8, 8 * (depth % 3) + 4))
            assert seen == pytest.approx((20 + 24 * step, 20 + 16 * depth, 220), abs=6)


def test_a_missing_picture_leaves_its_tile_empty(make_run, output_dir):
    make_run(double=1, single=1, steps=(0, 1)).decoded_image("euler", 1, "double", 0).unlink()
    run = read_run(output_dir, "1a2b3c4d")
    (jpeg,) = draw_bands(run, "euler", TileLayout(16, 16, 2))
    assert Image.open(io.BytesIO(jpeg)).getpixel((24, 8)) == pytest.approx(NOTHING, abs=4)


def test_a_broken_picture_is_named_with_the_command_that_mends_it(make_run, output_dir):
    folder = make_run(double=1, single=2, steps=(0, 1))
    folder.decoded_image("x0", 1, "single", 1).write_bytes(b"\xff\xd8 no more")
    run = read_run(output_dir, "1a2b3c4d")
    with pytest.raises(FluxIRError, match=r"step_1/single_block_1\.jpg must be a picture") as caught:
        list(draw_bands(run, "x0", lay_out_tiles(*picture_size(run), 3, 2)))
    assert caught.value.hint == "flux-ir lens --generation_id 1a2b3c4d decodes it again"


def test_a_broken_first_picture_is_named_too(make_run, output_dir):
    folder = make_run(lenses=("euler",))
    folder.decoded_image("euler", 0, "double", 0).write_bytes(b"")
    with pytest.raises(FluxIRError, match=r"double_block_0\.jpg must be a picture"):
        picture_size(read_run(output_dir, "1a2b3c4d"))
