"""The page of maps in a real browser, from file://, offline: words are chosen, and their maps lie over the picture.

Every test also holds: no error, no dialog, and nothing from elsewhere.
"""

from pathlib import Path

import pytest
from playwright.sync_api import expect

from flux_ir.explorer.map_page import write_map_page
from flux_ir.visualize.heatmap import COLOURS
from tests.explorer.browsing import needs_chromium, pixel, press, settled_address
from tests.explorer.map_folder import make_map_folder

pytestmark = needs_chromium
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> red'
STRONGEST = tuple(round(part) for part in COLOURS[255])


@pytest.fixture
def open_maps(context_with, tmp_path):
    """Writes the page of a folder of maps and opens it: `open_maps(address="#word=blue")`."""
    pages, errors, requests = [], [], []

    def open_it(address: str = "", **choices):
        folder = tmp_path / "ma ps #1"
        if not folder.exists():
            write_map_page(make_map_folder(folder, **choices))
        page = context_with().new_page()
        pages.append(page)
        page.set_default_timeout(10_000)
        page.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((folder / "maps.html").as_uri() + address)
        expect(page.locator("#heat")).to_be_visible()
        return page

    yield open_it
    for page in pages:
        page.close()
    assert errors == []
    assert [url for url in requests if not url.startswith(Path(tmp_path).as_uri())] == []


def token(page, row, column):
    """The colour seen at the middle of a token of the picture."""
    return pixel(page.locator("#stage"), (column + 0.5) / 3, (row + 0.5) / 2)


def near(colour, other):
    return max(abs(one - two) for one, two in zip(colour, other, strict=True)) < 60


def test_a_chosen_word_has_its_map_over_the_picture(open_maps):
    page = open_maps("#block=double.0&step=0")
    assert near(token(page, 0, 0), STRONGEST)  # of red, block 0, step 0: the first token
    assert near(token(page, 1, 2), (255, 255, 255))
    page.get_by_role("button", name="blue").click()
    expect(page.locator("#place")).to_have_text("blue")
    expect(page.locator("#most")).to_have_text("0.2")
    assert near(token(page, 0, 1), STRONGEST)
    assert near(token(page, 0, 0), (255, 255, 255))
    page.get_by_role("button", name="value-weighted").click()
    expect(page.locator("#most")).to_have_text("20")


def test_a_block_and_a_step_are_chosen_by_mouse_and_by_keys(open_maps):
    page = open_maps("#block=double.0&step=0")
    press(page, "ArrowDown", "ArrowRight")
    expect(page.locator("#where")).to_have_text("single 0 · step 2, from t 0.500")
    assert near(token(page, 1, 0), STRONGEST)  # block 1, step 1: the fourth token
    frame = page.locator("#grid").bounding_box()
    page.mouse.click(frame["x"] + 5, frame["y"] + frame["height"] / 2)
    expect(page.locator("#where")).to_have_text("double 0 · all steps")
    press(page, "Home")
    expect(page.locator("#where")).to_have_text("all blocks · all steps")


def test_keys_go_through_words_directions_and_scales(open_maps):
    page = open_maps("#block=double.0&step=0")
    press(page, "n", "d", "d", "s")
    assert settled_address(page) == "#word=blue&way=from_words&block=double.0&step=0&scale=one"
    expect(page.locator("#least")).to_have_text("0")
    press(page, "p", "p")
    expect(page.locator("#place")).to_have_text("patch 4")  # around the end of the list
    press(page, "o")
    expect(page.locator("#heat")).to_be_hidden()
    press(page, "?")
    expect(page.locator("#keys")).to_be_visible()


def test_the_value_under_the_pointer_is_said(open_maps):
    page = open_maps("#block=double.0&step=0")
    frame = page.locator("#stage").bounding_box()
    page.mouse.move(frame["x"] + frame["width"] * 0.1, frame["y"] + frame["height"] * 0.2)
    expect(page.locator("#under")).to_have_text("patch 0 (row 0, column 0): 0.1")
    page.mouse.move(frame["x"] + frame["width"] * 0.9, frame["y"] + frame["height"] * 0.9)
    expect(page.locator("#under")).to_have_text("patch 5 (row 1, column 2): 0.01")


def test_blocks_without_a_concept_say_so(open_maps):
    page = open_maps("#concept=sky&block=double.0&step=0")
    expect(page.locator("#place")).to_have_text("sky")
    press(page, "ArrowDown")
    expect(page.locator("#where")).to_contain_text("no map of this block")
    expect(page.locator("#heat")).to_be_hidden()


def test_the_address_brings_the_view_back_and_what_is_not_there_is_left(open_maps):
    page = open_maps("#group=padding&block=single.0&step=2")
    expect(page.locator("#where")).to_contain_text("single 0")
    assert settled_address(page) == "#group=padding&way=to_groups&block=single.0&step=2"
    again = open_maps("#word=constructor&way=x&block=double.99&step=NaN&%%%=")
    assert settled_address(again) == "#word=red&way=to_words&block=all&step=mean"


def test_a_prompt_is_text(open_maps):
    page = open_maps(prompt=HOSTILE)
    expect(page.locator("#prompt")).to_have_text(HOSTILE)
