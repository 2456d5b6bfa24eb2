"""The page in a real browser, from file://, offline. Every test also holds: no error, and nothing from elsewhere."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, expect, sync_playwright

from flux_ir.explorer.page import write_explorer

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
HOSTILE = (
    '</script><img src=x onerror="alert(1)"> \'\'"\u2028 \U0001f600 \u05e9\u05dc\u05d5\u05dd <script>alert(1)</script>'
)
HERE = "[role=gridcell][tabindex='0']"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH (apt-get install chromium)")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context_with(browser) -> Callable[..., BrowserContext]:
    """An offline browser window with these settings, shared by the tests that ask for the same ones."""
    contexts: dict[tuple[tuple[str, str], ...], BrowserContext] = {}

    def get(**settings: str) -> BrowserContext:
        key = tuple(sorted(settings.items()))
        if key not in contexts:
            contexts[key] = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True, **settings)
        return contexts[key]

    return get


@pytest.fixture
def open_page(context_with, output_dir) -> Iterator[Open]:
    """Writes the page of these runs and opens it offline: `open_page("1a2b3c4d", address="#step=2")`."""
    pages, errors, requests = [], [], []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            errors.append(message.text)

    def open_it(*ids, address: str = "", single_file: bool = False, target: Path | None = None, **settings) -> Page:
        if target is None:
            target = output_dir / "explorer.html"
            write_explorer(output_dir, ids or ["1a2b3c4d"], target, single_file=single_file)
        page = context_with(**settings).new_page()
        pages.append(page)
        page.set_default_timeout(10_000)
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(target.as_uri() + address)
        page.locator(HERE).wait_for(state="attached")
        page.requests = requests
        return page

    yield open_it
    for page in pages:
        page.close()
    assert errors == []
    outside = [url for url in requests if not url.startswith((output_dir.as_uri(), "blob:", "data:"))]
    assert outside == []


def cell(page: Page, block: str, step: int) -> Locator:
    return page.locator(f"[role=gridcell][data-block='{block}'][data-step='{step}']")


def here(page: Page) -> tuple[str, int]:
    """The selected cell, by its block and step; there is always exactly one."""
    selected = page.locator(HERE)
    expect(selected).to_have_count(1)
    return selected.get_attribute("data-block"), int(selected.get_attribute("data-step"))


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
    next_frame(page)


def next_frame(page: Page) -> None:
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def settled_address(page: Page) -> str:
    """The address once it has been written."""
    page.wait_for_timeout(300)
    return page.evaluate("location.hash")


def pixel(where: Locator, x: float = 0.5, y: float = 0.5) -> tuple[int, ...]:
    """The colour seen on the screen within an element, at a share of its width and height."""
    shot = Image.open(io.BytesIO(where.screenshot(animations="disabled"))).convert("RGB")
    return shot.getpixel((int(shot.width * x), int(shot.height * y)))


def large_picture(page: Page, shot: str = "#shot-a") -> str:
    """The link of the large picture, once it has been loaded and shown."""
    picture = page.locator(f"{shot} img").first
    picture.wait_for()
    return picture.get_attribute("src")


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
        page.locator("#larger").click()
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


def test_a_second_pin_compares_under_a_slider(make_run, open_page, colour):
    make_run(double=2, single=3, steps=(0, 1, 2))
    page = open_page()
    cell(page, "double.1", 0).click()
    expect(cell(page, "double.1", 0)).to_have_attribute("data-pin", "A")
    assert page.locator("#split").is_hidden()
    cell(page, "single.2", 2).click()
    expect(cell(page, "single.2", 2)).to_have_attribute("data-pin", "B")
    large_picture(page)
    large_picture(page, "#shot-b")
    stage = page.locator("#stage")
    assert pixel(stage, 0.25, 0.9) == pytest.approx(colour("x0", 1, 0), abs=8)
    assert pixel(stage, 0.75, 0.9) == pytest.approx(colour("x0", 4, 2), abs=8)
    page.locator("#split").focus()
    press(page, "End")
    assert here(page) == ("single.2", 2)  # the slider moved, not the cell
    assert pixel(stage, 0.75, 0.9) == pytest.approx(colour("x0", 1, 0), abs=8)
    assert page.locator("#numbers-head th").all_inner_texts() == ["A", "B"]
    cell(page, "single.0", 1).hover()
    expect(page.locator("#numbers-head th")).to_have_text(["A", "B", "here"])


def test_pins_come_out_again(make_run, open_page):
    make_run()
    page = open_page()
    press(page, "Enter", "ArrowDown", "Enter", "ArrowDown", "Enter")
    assert page.locator("[data-pin]").evaluate_all("all => all.map((c) => c.dataset.block)") == ["double.0", "single.0"]
    page.locator("#pins button").first.click()
    expect(cell(page, "single.0", 0)).to_have_attribute("data-pin", "A")
    cell(page, "single.0", 0).click()
    expect(page.locator("[data-pin]")).to_have_count(0)
    press(page, "Enter", "ArrowUp", "Enter", "Escape")
    assert page.locator("[data-pin]").count() == 0
    assert page.locator("#pins li").count() == 0


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
    assert here(page) == ("double.0", 0)
    assert settled_address(page) == "#block=double.0&step=0&mode=x0&generation=1a2b3c4d"


def test_curves_have_one_line_per_step_and_mark_what_is_looked_at(make_run, open_page):
    make_run(double=2, single=3, steps=(0, 1, 2))
    page = open_page()
    assert page.locator("#curves path.line").count() == 3
    cell(page, "single.1", 2).hover()
    expect(page.locator("#curves .say")).to_have_text("step 2: 0.250")
    assert page.locator("#curves path.here").get_attribute("d") == page.locator("#curves path.line").nth(
        2
    ).get_attribute("d")
    assert "single 1, step 2: 0.250" in page.locator("#curves").get_attribute("aria-label")
    box = page.locator("#curves").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 14, box["y"] + 120)
    expect(page.locator("#place")).to_have_text("single 2")


def test_a_run_without_numbers_says_so_in_place_of_the_curves(make_run, open_page):
    make_run(with_numbers=False)
    page = open_page()
    assert page.locator("#no-curves").is_visible()
    assert page.locator("#curves").is_hidden()
    assert page.locator("#numbers td").all_inner_texts()[1:] == 3 * ["\N{EN DASH}"]


def test_several_generations_make_a_gallery_of_the_same_block(make_run, open_page, colour):
    make_run("aaaaaaaa", prompt="a red circle", seed=1)
    make_run("bbbbbbbb", prompt="a blue square", seed=2, lenses=("x0",), size=(48, 32))
    page = open_page("aaaaaaaa", "bbbbbbbb", address="#block=single.3&step=1")
    cards = page.locator(".card")
    assert cards.count() == 2
    assert cards.locator(".text").all_inner_texts() == ["a red circle", "a blue square"]
    assert "flux-tiny·seed 2·bbbbbbbb" in cards.nth(1).locator(".facts").first.evaluate(
        "p => [...p.children].map(s => s.textContent).join('·')"
    )
    page.wait_for_timeout(200)
    for index in (0, 1):  # thumbnails, beside the grid
        assert cards.nth(index).locator("img").count() == 1
        assert pixel(cards.nth(index).locator(".shot")) == pytest.approx(colour("x0", 5, 1), abs=8)
    press(page, "g")
    for index in (0, 1):  # large pictures, in place of it
        frame = cards.nth(index).locator(".shot")
        assert frame.get_attribute("aria-label") == "single 3, step 1: the clean image it believes in"
        frame.locator("img").wait_for()
        assert pixel(frame) == pytest.approx(colour("x0", 5, 1), abs=8)
    cards.nth(1).locator("button").click()
    press(page, "g")
    assert page.locator("#prompt").inner_text() == "a blue square"
    assert here(page) == ("single.3", 1)
    assert page.locator("[data-mode=euler]").is_disabled()
    press(page, "n")
    assert page.locator("#prompt").inner_text() == "a red circle"


def test_a_single_generation_needs_no_gallery(make_run, open_page):
    make_run()
    page = open_page()
    assert page.locator("#gallery").is_hidden()
    assert page.locator("#wall").is_hidden()


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


def test_a_missing_picture_is_said_and_not_only_coloured(make_run, open_page):
    make_run(double=1, single=2, steps=(0, 1)).decoded_image("x0", 1, "single", 0).unlink()
    page = open_page(address="#block=single.0&step=1&mode=x0")
    expect(page.locator("#nothing")).to_have_text("Not decoded.")
    assert cell(page, "single.0", 1).get_attribute("aria-label") == "single 0, step 1, no picture"
    press(page, "m", "m")
    assert page.locator("#nothing").is_hidden()
    assert cell(page, "single.0", 1).get_attribute("aria-label") == "single 0, step 1"


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
    press(page, " ")
    page.wait_for_timeout(400)
    assert here(page) == ("double.0", 0)  # the first picture stays longer than that
    press(page, " ")


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
