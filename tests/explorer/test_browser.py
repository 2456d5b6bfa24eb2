"""The page in a real browser, from file://, offline. Every test also holds: no error, and nothing from elsewhere."""

import io

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.explorer.browsing import cell, here, large_picture, needs_chromium, pixel, press

pytestmark = needs_chromium


def test_the_grid_is_complete_and_in_order(make_run, open_page):
    make_run(double=2, single=11, steps=(0, 1, 10))
    page = open_page()
    blocks = ["double.0", "double.1", *(f"single.{i}" for i in range(11))]
    found = page.locator("[role=gridcell]").evaluate_all("all => all.map((c) => [c.dataset.block, +c.dataset.step])")
    assert found == [[block, step] for block in blocks for step in (0, 1, 10)]
    assert page.locator("[role=columnheader]").all_inner_texts()[1:] == ["0", "1", "10"]
    assert page.locator("[role=rowgroup]").evaluate_all("all => all.map((g) => g.ariaLabel)") == [
        "double blocks",
        "single blocks",
    ]
    tops = page.locator(".blocks").evaluate_all("all => all.map((row) => row.getBoundingClientRect().top)")
    assert tops == sorted(tops)


@pytest.mark.parametrize("mode", ["euler", "x0", "difference"])
def test_every_cell_shows_its_own_picture(mode, make_run, open_page, colour):
    make_run(double=2, single=2, steps=(0, 1, 2), size=(32, 16))
    page = open_page(address=f"#mode={mode}&lens=euler")
    page.wait_for_timeout(200)
    grid = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for depth, block in enumerate(["double.0", "double.1", "single.0", "single.1"]):
        for step in range(3):
            box = cell(page, block, step).bounding_box()
            assert box["width"] == pytest.approx(2 * box["height"], abs=1)
            seen = grid.getpixel((int(box["x"] + box["width"] / 2), int(box["y"] + box["height"] / 2)))
            if mode != "difference":
                assert seen == pytest.approx(colour(mode, depth, step), abs=8)
            elif depth > 0:
                assert seen == pytest.approx((0, 4 * 16, 0), abs=24)


def test_heads_stay_in_view_when_the_grid_scrolls(make_run, open_page):
    make_run(double=19, single=38, steps=tuple(range(12)), size=(8, 8))
    page = open_page(address="#block=double.0&step=0")
    for _ in range(8):
        page.locator("[data-key='+']").click()
    before = page.locator(".steps").bounding_box()["y"]
    corner = page.locator(".row-head").last.bounding_box()["x"]
    press(page, "PageDown", "End")
    assert here(page) == ("single.37", 11)
    assert page.locator("#scroller").evaluate("s => s.scrollTop > 500 && s.scrollLeft > 100")
    assert page.locator(".steps").bounding_box()["y"] == before
    assert page.locator(".row-head").last.bounding_box()["x"] == corner
    scroller, chosen = page.locator("#scroller").bounding_box(), cell(page, "single.37", 11).bounding_box()
    assert chosen["y"] + chosen["height"] <= scroller["y"] + scroller["height"] + 1
    press(page, "PageUp", "Home")
    assert cell(page, "double.0", 0).bounding_box()["y"] >= before + page.locator(".steps").bounding_box()["height"]


def test_the_size_of_the_grid_costs_few_requests(make_run, open_page):
    make_run(double=19, single=38, steps=tuple(range(50)), size=(16, 16), lenses=("x0",))
    page = open_page()
    assert page.locator("[role=gridcell]").count() == 57 * 50
    page.wait_for_timeout(300)
    assert len(page.requests) < 10
    cell(page, "single.0", 30).hover()
    assert large_picture(page) == "1a2b3c4d/intermediates/decoded_x0/step_30/single_block_0.jpg"


def test_hover_shows_the_large_picture_and_its_numbers(make_run, open_page, colour):
    make_run(double=2, single=3, steps=(0, 1))
    page = open_page()
    assert here(page) == ("double.0", 0)
    cell(page, "single.0", 1).hover()
    expect(page.locator("#place")).to_have_text("single 0")
    assert large_picture(page) == "1a2b3c4d/intermediates/decoded_x0/step_1/single_block_0.jpg"
    assert page.locator("#shot-a img").get_attribute("alt") == "single 0, step 1: the clean image it believes in"
    assert pixel(page.locator("#stage")) == pytest.approx(colour("x0", 2, 1), abs=8)
    assert page.locator("#numbers td").all_inner_texts() == ["0.500", "0.500", "0.500", "22.0"]
    page.mouse.move(5, 5)
    expect(page.locator("#place")).to_have_text("double 0")
    assert here(page) == ("double.0", 0)


def test_a_difference_asked_for_twice_while_it_loads_is_subtracted_once(make_run, open_page):
    make_run(double=2, single=3, steps=(0, 1))
    page = open_page(address="#block=double.1&step=0&mode=difference")
    large_picture(page)
    # As on loading: the frame forgets its shot while the first is still waiting for the pointer to rest.
    page.evaluate("showAgain(), requestAnimationFrame(() => requestAnimationFrame(showAgain))")
    page.wait_for_timeout(500)
    assert page.locator("#shot-a img").count() == 2
    assert pixel(page.locator("#shot-a")) == pytest.approx((0, 4 * 16, 0), abs=24)


def test_arrows_move_the_one_cell_that_has_the_focus(make_run, open_page):
    make_run(double=2, single=3, steps=(0, 1, 2))
    page = open_page()
    for key, place in [
        ("ArrowRight", ("double.0", 1)),
        ("ArrowDown", ("double.1", 1)),
        ("ArrowDown", ("single.0", 1)),
        ("ArrowLeft", ("single.0", 0)),
        ("ArrowLeft", ("single.0", 0)),
        ("ArrowUp", ("double.1", 0)),
        ("End", ("double.1", 2)),
        ("PageDown", ("single.2", 2)),
        ("Home", ("single.2", 0)),
        ("PageUp", ("double.0", 0)),
    ]:
        press(page, key)
        assert here(page) == place
        assert page.evaluate("[document.activeElement.dataset.block, +document.activeElement.dataset.step]") == list(
            place
        )


def test_the_keyboard_alone_reaches_the_grid_and_shows_where_it_is(make_run, open_page):
    make_run()
    page = open_page()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.role") == "gridcell":
            break
    assert page.evaluate("document.activeElement.matches('[role=gridcell]:focus-visible')")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_space_plays_down_the_blocks_and_on_to_the_next_step(make_run, open_page):
    make_run(double=1, single=2, steps=(0, 1))
    page = open_page()
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => {
        const { block, step } = document.querySelector("[aria-selected=true]")?.dataset ?? {};
        if (block) window.seen.push(`${block} ${step}`);
      }).observe(document.getElementById("grid"), { subtree: true, attributeFilter: ["aria-selected"] });
    }""")
    press(page, " ")
    assert page.locator("#play").inner_text() == "Stop"
    page.wait_for_function("() => new Set(window.seen).size === 6")
    press(page, " ")
    assert page.locator("#play").inner_text() == "Play"
    order = list(dict.fromkeys(page.evaluate("seen")))
    film = [f"{block} {step}" for step in (0, 1) for block in ("double.0", "single.0", "single.1")]
    start = film.index(order[0])
    assert order == film[start:] + film[:start]
    stopped = here(page)
    page.wait_for_timeout(400)
    assert here(page) == stopped


def test_m_switches_the_reading(make_run, open_page, colour):
    make_run(double=2, single=2, steps=(0, 1))
    page = open_page(address="#block=double.1&step=1&mode=euler")
    shown = page.locator("#modes [aria-pressed=true]")
    for mode in ("euler", "x0", "difference", "euler"):
        assert shown.all_inner_texts() == [mode]
        large_picture(page)
        wanted = (0, 64, 0) if mode == "difference" else colour(mode, 1, 1)
        assert pixel(page.locator("#stage")) == pytest.approx(wanted, abs=24)
        press(page, "m")


def test_the_first_block_has_nothing_to_be_compared_with(make_run, open_page):
    make_run()
    page = open_page(address="#block=double.0&mode=difference")
    expect(page.locator("#nothing")).to_have_text("No block comes before this one.")
    assert cell(page, "double.0", 0).get_attribute("aria-label") == "double 0, step 0, no picture"
    assert cell(page, "double.1", 0).get_attribute("aria-label") == "double 1, step 0"


def test_a_question_mark_lists_the_keys(make_run, open_page):
    make_run()
    page = open_page()
    press(page, "?")
    assert page.locator("#keys").is_visible()
    listed = page.locator("#keys dt").all_inner_texts()
    for key in ("←", "↑", "Space", "Enter", "Esc", "m", "?"):
        assert any(key in entry for entry in listed)
    press(page, "m")  # keys of the page rest while the list is open
    assert page.locator("#modes [aria-pressed=true]").inner_text() == "x0"
    press(page, "Escape")
    assert not page.locator("#keys").is_visible()


def test_a_missing_picture_is_said_and_not_only_coloured(make_run, open_page):
    make_run(double=1, single=2, steps=(0, 1)).decoded_image("x0", 1, "single", 0).unlink()
    page = open_page(address="#block=single.0&step=1&mode=x0")
    expect(page.locator("#nothing")).to_have_text("Not decoded.")
    assert cell(page, "single.0", 1).get_attribute("aria-label") == "single 0, step 1, no picture"
    press(page, "m", "m")
    assert page.locator("#nothing").is_hidden()
    assert cell(page, "single.0", 1).get_attribute("aria-label") == "single 0, step 1"
