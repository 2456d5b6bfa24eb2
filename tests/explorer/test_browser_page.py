"""The page around the grid in the browser: its address, prompts as text, one file alone, and everybody's settings."""

import shutil

import pytest
from playwright.sync_api import expect

from flux_ir.explorer.page import write_explorer
from tests.explorer.browsing import cell, here, large_picture, needs_chromium, pixel, press, settled_address

pytestmark = needs_chromium
HOSTILE = (
    '</script><img src=x onerror="alert(1)"> \'\'"\u2028 \U0001f600 \u05e9\u05dc\u05d5\u05dd <script>alert(1)</script>'
)


def test_the_address_holds_the_view_and_brings_it_back(make_run, open_page, output_dir):
    make_run("aaaaaaaa")
    make_run("bbbbbbbb", double=3, single=8, steps=(0, 1, 2, 3))
    page = open_page("aaaaaaaa", "bbbbbbbb")
    press(page, "Enter", "n", "PageDown", "ArrowUp", "End", "m", "m", "Enter", "m", "g")
    address = settled_address(page)
    assert address == (
        "#block=single.6&step=3&mode=x0&generation=bbbbbbbb&view=gallery"
        "&pins=aaaaaaaa.double.0.0.x0,bbbbbbbb.single.6.3.euler"
    )
    again = open_page(target=output_dir / "explorer.html", address=address)
    assert settled_address(again) == address
    assert here(again) == ("single.6", 3)
    assert again.locator("#facts").inner_text() == page.locator("#facts").inner_text()
    for part in ("#pins", "#numbers", "#modes [aria-pressed=true]", "#wall[aria-pressed=true]"):
        assert again.locator(part).inner_text() == page.locator(part).inner_text()


def test_the_documented_address_works_and_so_does_editing_it(make_run, open_page):
    make_run(double=8, single=1)
    page = open_page(address="#block=double.7&step=2&mode=difference&lens=euler")
    assert here(page) == ("double.7", 2)
    assert settled_address(page) == "#block=double.7&step=2&mode=difference&lens=euler&generation=1a2b3c4d"
    page.evaluate("location.hash = '#block=single.0&step=0&mode=x0'")
    expect(page.locator("#place")).to_have_text("single 0")
    assert here(page) == ("single.0", 0)
    assert settled_address(page) == "#block=single.0&step=0&mode=x0&generation=1a2b3c4d"


@pytest.mark.parametrize(
    "address",
    [
        "#block=double.99&step=-1&mode=xx",
        "#generation=zzzzzzzz&pins=1,2,3.4.5.6.7",
        "#%%%&&==",
        "#lens=<script>&step=NaN",
        "#pins=1a2b3c4d.double.0.0.difference.constructor",
    ],
)
def test_an_address_of_things_that_are_not_there_opens_the_start(address, make_run, open_page):
    make_run()
    page = open_page(address=address)
    assert here(page) == ("single.4", 1)
    assert settled_address(page) == "#block=single.4&step=1&mode=x0&generation=1a2b3c4d"


@pytest.mark.parametrize(
    ("lenses", "view"),
    [
        (("euler", "x0"), "#block=single.4&step=2&mode=x0&generation=1a2b3c4d"),
        (("euler",), "#block=single.4&step=4&mode=euler&generation=1a2b3c4d"),  # the only step without noise
    ],
)
def test_the_page_opens_where_there_is_most_to_see(lenses, view, make_run, open_page):
    make_run(steps=(0, 1, 2, 3, 4), lenses=lenses)
    page = open_page(address="")
    assert settled_address(page) == view


def test_a_hostile_prompt_is_shown_as_text(make_run, open_page):
    make_run(prompt=HOSTILE)
    page = open_page()
    assert page.locator("#prompt").evaluate("p => p.textContent") == HOSTILE
    assert page.locator("#prompt").evaluate("p => p.children.length") == 0
    assert page.locator("#prompt").get_attribute("dir") == "auto"
    assert page.locator("script").count() == 2


@pytest.mark.parametrize(("prompt", "direction"), [("\u05e9\u05dc\u05d5\u05dd world", "rtl"), ("hello", "ltr")])
def test_a_prompt_runs_in_its_own_direction(prompt, direction, make_run, open_page):
    make_run(prompt=prompt)
    assert open_page().locator("#prompt").evaluate("p => getComputedStyle(p).direction") == direction


def test_a_long_prompt_is_cut_until_it_is_asked_for(make_run, open_page):
    long = "x" * 5000 + " many words" * 500
    make_run(prompt=long)
    page = open_page()
    height = page.locator("#prompt").bounding_box()["height"]
    assert height < 90
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#more").click()
    assert page.locator("#more").get_attribute("aria-expanded") == "true"
    assert page.locator("#prompt").bounding_box()["height"] > height
    assert page.locator("#prompt").inner_text() == long
    page.locator("#more").click()
    assert page.locator("#prompt").bounding_box()["height"] == height


def test_a_short_prompt_offers_nothing_more(make_run, open_page):
    make_run()
    assert open_page().locator("#more").is_hidden()


def test_a_single_file_needs_nothing_beside_it(make_run, open_page, output_dir, tmp_path, colour):
    make_run(double=1, single=2, steps=(0, 1))
    write_explorer(output_dir, ["1a2b3c4d"], output_dir / "explorer.html", single_file=True)
    alone = output_dir / "sent" / "page.html"
    alone.parent.mkdir()
    shutil.move(output_dir / "explorer.html", alone)
    shutil.rmtree(output_dir / "1a2b3c4d")
    page = open_page(target=alone, address="#block=single.1&step=1&mode=x0")
    assert large_picture(page).startswith("blob:")
    assert pixel(page.locator("#stage")) == pytest.approx(colour("x0", 2, 1), abs=8)
    assert pixel(cell(page, "double.0", 1)) == pytest.approx(colour("x0", 0, 1), abs=8)
    assert page.locator("#finished").evaluate("image => image.decode().then(() => image.naturalWidth)") == 32


def test_the_page_follows_the_system_s_dark_and_light(make_run, open_page):
    make_run()
    dark = open_page(color_scheme="dark").evaluate("getComputedStyle(document.body).backgroundColor")
    light = open_page(color_scheme="light").evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark, light) == ("rgb(19, 19, 22)", "rgb(244, 242, 236)")


def test_nothing_moves_by_itself_where_less_motion_is_asked_for(make_run, open_page):
    make_run()
    page = open_page(reduced_motion="reduce")
    assert page.locator("#play").evaluate("b => getComputedStyle(b).transitionDuration") == "0s"
    # How long a picture stays is read where it is set: a busy machine may keep a test waiting as long.
    page.evaluate("""() => {
        const [set, stays] = [window.setInterval, []];
        window.setInterval = (work, ms) => (stays.push(ms), set(work, ms));
        window.stays = stays;
    }""")
    press(page, " ", " ")
    stays = page.evaluate("() => window.stays")
    assert 700 in stays
    assert 125 not in stays


def test_every_picture_and_control_has_a_name(make_run, open_page):
    make_run("aaaaaaaa")
    make_run("bbbbbbbb")
    page = open_page("aaaaaaaa", "bbbbbbbb")
    press(page, "Enter", "ArrowDown", "Enter")
    large_picture(page, "#shot-b")
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("[role=img]:not([aria-label])").count() == 0
    names = page.locator("button:visible").evaluate_all("all => all.map((b) => b.ariaLabel ?? b.textContent.trim())")
    assert all(names)
    assert page.locator("#split").get_attribute("aria-label")
