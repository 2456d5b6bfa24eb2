"""Comparing in the browser: pins under a slider, curves, and a gallery of several generations."""

import pytest
from playwright.sync_api import expect

from flux_ir.files import read_json, write_json
from tests.explorer.browsing import cell, here, large_picture, needs_chromium, pixel, press

pytestmark = needs_chromium


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


def test_curves_of_all_lenses_that_a_run_has_at_the_step_that_is_looked_at(make_run, open_page):
    folder = make_run(double=2, single=3, steps=(0, 1), lenses=("x0", "tuned", "jacobian"))
    report = read_json(folder.lens_json)
    for depth, rows in enumerate(report["sites"].values()):
        for row in rows:
            row |= {
                "tuned_relative_distance": 0.1 * (4 - depth),
                "jacobian_relative_distance": 0.5 + 0.25 * row["step"],
            }
    write_json(folder.lens_json, report)
    page = open_page()
    page.get_by_role("button", name="of all lenses").click()
    assert page.locator("#curves path.line").count() == 3
    assert page.locator("#lens-legend span").all_inner_texts() == ["plain", "tuned", "Jacobian"]
    page.wait_for_url("**&curves=lenses")
    cell(page, "single.1", 1).hover()
    expect(page.locator("#curves .say")).to_have_text("plain: 0.250")
    assert "single 1, step 1: plain 0.250, tuned 0.100, Jacobian 0.750" in page.locator("#curves").get_attribute(
        "aria-label"
    )
    page.locator('[data-mode="tuned"]').click()
    cell(page, "single.0", 0).hover()
    expect(page.locator("#curves .say")).to_have_text("tuned: 0.200")
    press(page, "c")
    expect(page.locator("#curve-note")).to_contain_text("Through the tuned lens.")
    assert page.locator("#curves path.line").count() == 2


def test_a_run_without_numbers_says_so_in_place_of_the_curves(make_run, open_page):
    make_run(with_numbers=False)
    page = open_page()
    assert page.locator("#no-curves").is_visible()
    assert page.locator("#curves").is_hidden()
    assert page.locator("#numbers td").all_inner_texts()[1:] == 3 * ["\N{EN DASH}"]


def test_two_runs_that_were_compared_have_curves_of_their_difference(make_run, open_page):
    folders = [make_run(name, double=2, single=3, lenses=("x0",)) for name in ("aaaaaaaa", "bbbbbbbb")]
    blocks = ["double.0", "double.1", *(f"single.{number}" for number in range(3))]
    sites = {
        block: [{"step": step, "distance": 0.01 * (depth + step), "cka": 0.5} for step in range(3)]
        for depth, block in enumerate(blocks)
    }
    for folder, other in zip(folders, ("bbbbbbbb", "aaaaaaaa"), strict=True):
        write_json(folder.difference_json, {"other": other, "mode": "forced", "sites": sites})
    page = open_page("aaaaaaaa", "bbbbbbbb")
    assert "final answer" in page.locator("#curve-note").inner_text()
    page.get_by_role("button", name="to the other run").click()
    expect(page.locator("#curve-note")).to_contain_text("evaluated at the first one")
    expect(page.locator("#curve-title")).to_have_text("Where do the two runs differ?")
    cell(page, "single.1", 2).hover()
    expect(page.locator("#curves .say")).to_have_text("step 2: 0.050")
    assert page.locator("#numbers td").all_inner_texts()[-2:] == ["0.0500", "0.5000"]
    assert page.locator("#curves text").all_text_contents()[:3] == ["0", "0.05", "0.1"]
    page.get_by_role("button", name="to the final answer").click()
    expect(page.locator("#curves text").nth(2)).to_have_text("1")


def test_a_run_that_was_not_compared_has_no_choice_of_curves(make_run, open_page):
    make_run()
    page = open_page()
    assert page.locator("#curve-choice").is_hidden()
    assert page.locator("#numbers th").count() == 4


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
