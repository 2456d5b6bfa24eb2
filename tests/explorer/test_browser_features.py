"""The pages of features in a real browser, from file://, offline: what is listed, drawn, linked and inspected.

Every test also holds: no error, no dialog, and nothing from elsewhere.
"""

import re
from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import ConsoleMessage, Page, expect

from flux_ir.explorer.feature_pages import PagesSettings, write_pages
from flux_ir.visualize.heatmap import COLOURS
from tests.explorer.browsing import needs_chromium, pixel, press, settled_address
from tests.explorer.feature_folder import add_later_stages, make_feature_folder, picture_colour, random_values

pytestmark = needs_chromium

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> <b>bold</b> red"


@pytest.fixture(scope="module")
def known():
    """Activations of 8 images, 2 steps, 2 x 3 tokens, 6 features: feature 5 has a map that is easy to see."""
    values = random_values(images=8, steps=2, tokens=6, features=6, dead=(3,))
    values[..., 5] = 0
    values[2, 1, :, 5] = [8, 0, 0, 0, 0, 2]  # the top left patch, and the bottom right one
    values[4, 0, 1, 5] = 4
    return values


@pytest.fixture(scope="module")
def site(tmp_path_factory, known):
    """Pages in a folder whose name must not matter, so it has a space and a hash in it."""
    prompts = [HOSTILE, *(f"a {colour} thing" for colour in ("red", "blue", "green", "red", "blue", "pink", "grey"))]
    path = tmp_path_factory.mktemp("out put #1") / "features"
    folder = make_feature_folder(path, {"img": known}, prompts=prompts)
    for _ in write_pages(folder, PagesSettings(patch_features=3)):
        pass
    return path


@pytest.fixture
def visit(context_with, site) -> Iterator:
    """Opens the pages at an address: `visit("#feature=5")`."""
    opened: list[Page] = []
    wrong: list[str] = []
    requests: list[str] = []

    def go(address: str = "", path=site, **settings) -> Page:
        page = context_with(**settings).new_page()
        opened.append(page)
        page.set_default_timeout(10_000)
        page.on("console", lambda message: wrong.append(message.text) if is_wrong(message) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((path / "pages" / "index.html").as_uri() + address)
        page.locator(".shot, .sentence" if "feature=" in address else ".row:not([hidden]) .number").first.wait_for()
        return page

    yield go
    for page in opened:
        page.close()
    assert wrong == []
    assert [url for url in requests if not url.startswith("file://")] == []


def is_wrong(message: ConsoleMessage) -> bool:
    """Whether the page complains; that a test reads a canvas twice is not of its doing."""
    return message.type in ("error", "warning") and not message.text.startswith("Canvas2D: Multiple readback")


def listed(page: Page) -> list[int]:
    """The features of the rows, from above."""
    rows = page.locator(".row:not([hidden])").evaluate_all(
        "rows => rows.map((row) => [row.getBoundingClientRect().top, row.querySelector('.number').textContent])"
    )
    return [int(number) for _, number in sorted(rows)]


def find(page: Page, text: str) -> list[int]:
    page.locator("#find").fill(text)
    page.wait_for_timeout(300)
    return listed(page)


def shown(page: Page) -> int:
    """The feature whose page is shown, once it is."""
    feature = page.evaluate("state.feature")
    expect(page.locator("#examples")).to_have_attribute("data-feature", str(feature))
    return feature


def test_the_list_is_sorted_by_every_number_and_the_unknown_come_last(visit, known):
    page = visit()
    largest = known.max(axis=(0, 1, 2))
    assert listed(page) == list(np.argsort(-largest, kind="stable"))
    page.locator("[data-column=max_active]").click()
    page.wait_for_timeout(100)
    assert listed(page) == list(np.argsort(largest, kind="stable"))
    page.locator("[data-column=feature]").click()
    page.wait_for_timeout(100)
    assert listed(page) == [0, 1, 2, 3, 4, 5]
    page.locator("[data-column=position_r2]").click()
    page.wait_for_timeout(100)
    assert listed(page) == [5, 4, 2, 1, 0, 3]  # nothing is known of 3, which is dead
    assert settled_address(page) == "#sort=-position_r2"


def test_the_list_is_filtered_by_numbers_flags_and_words(visit, known):
    page = visit("#sort=feature")
    largest = known.max(axis=(0, 1, 2))
    assert find(page, "max>4") == list(np.flatnonzero(largest > 4))
    assert find(page, "max>4 feature<5") == list(np.flatnonzero(largest[:5] > 4))
    assert find(page, "is:dead") == [3]
    assert find(page, "density<=0%") == [3]
    assert find(page, "4") == [4]
    in_prompts = [f for f in range(6) if {1, 4} & set(np.argsort(-known.max(axis=(1, 2))[:, f], kind="stable")[:4])]
    assert find(page, "red") == [f for f in in_prompts if f != 3]
    assert find(page, "mx>4") != []
    expect(page.locator("#find-note")).to_contain_text("mx>4 names no number")
    assert find(page, "nosuchword") == []
    expect(page.locator("#no-rows")).to_be_visible()
    page.locator("[data-flag=dead]").click()
    expect(page.locator("#find")).to_have_value("nosuchword is:dead")


def test_a_box_on_the_map_filters_the_list_and_a_click_opens(visit):
    page = visit("#sort=feature&x=frequency&y=max_active")
    x, y = page.evaluate("[dots.x[5], dots.y[5]]")
    frame = page.locator("#scatter").bounding_box()
    page.mouse.move(frame["x"] + x - 12, frame["y"] + y - 12)
    page.mouse.down()
    page.mouse.move(frame["x"] + x + 12, frame["y"] + y + 12, steps=3)
    page.mouse.up()
    expect(page.locator("#box-chip")).to_be_visible()
    assert 5 in listed(page)
    assert len(listed(page)) < 6
    address = settled_address(page)
    assert "box=" in address
    again = visit(address)
    assert listed(again) == listed(page)
    page.mouse.click(frame["x"] + x, frame["y"] + y)
    assert shown(page) == 5


def test_keys_walk_the_list_and_the_features_in_its_order(visit):
    page = visit("#sort=-feature")
    press(page, "ArrowDown", "ArrowDown", "Enter")
    assert shown(page) == 3
    press(page, "ArrowRight")
    assert shown(page) == 2
    press(page, "ArrowLeft", "ArrowLeft")
    assert shown(page) == 4
    press(page, "Home")
    assert shown(page) == 5
    press(page, "End")
    assert shown(page) == 0
    press(page, "ArrowRight")
    assert shown(page) == 0
    press(page, "4")
    expect(page.locator("#jump-number")).to_have_value("4")
    press(page, "Enter")
    assert shown(page) == 4
    press(page, "r")
    assert shown(page) in range(6)
    press(page, "Escape")
    expect(page.locator("#list-view")).to_be_visible()
    press(page, "/")
    assert page.evaluate("document.activeElement.id") == "find"
    page.keyboard.type("max>1?")  # keys of the page rest while somebody types
    assert not page.locator("#keys").is_visible()
    press(page, "Escape", "Escape", "?")
    expect(page.locator("#keys")).to_be_visible()
    press(page, "Escape")
    expect(page.locator("#keys")).to_be_hidden()


def test_an_address_brings_back_the_exact_view(visit):
    page = visit("#sort=-feature&find=max>1&feature=5&overlay=spotlight&opacity=40&smooth=true&close=true&top=50&at=2")
    page.locator(".shot").first.click(position={"x": 20, "y": 10})
    page.locator(".residual").wait_for()
    address = settled_address(page)
    again = visit(address)
    again.locator(".residual").wait_for()
    assert again.evaluate("state") == page.evaluate("state")
    assert again.locator("#patch").inner_text() == page.locator("#patch").inner_text()
    assert again.locator("#feature-facts").inner_text() == page.locator("#feature-facts").inner_text()


def test_what_an_address_says_of_things_that_are_not_there_is_left_out(visit):
    page = visit("#find=max>1&features=99&overlay=wrong&x=none&opacity=700")
    assert page.evaluate("[state.overlay, state.x, state.opacity, state.feature]") == ["heat", "frequency", 100, None]
    page.evaluate("location.hash = '#feature=99'")
    page.wait_for_timeout(100)
    expect(page.locator("#list-view")).to_be_visible()


def test_back_and_forward_go_through_what_was_opened(visit):
    page = visit("#sort=feature")
    page.locator(".row", has_text=re.compile("^5")).click()
    assert shown(page) == 5
    page.go_back()
    expect(page.locator("#list-view")).to_be_visible()
    page.go_forward()
    assert shown(page) == 5


def overlay(page: Page, shot: int = 0) -> np.ndarray:
    """The overlay of a picture as it is drawn: [rows, columns, 4]."""
    found = (
        page.locator(".shot canvas")
        .nth(shot)
        .evaluate("c => [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]")
    )
    return np.array(found[2]).reshape(found[0], found[1], 4)


def test_the_overlay_is_the_map_pixel_by_pixel(visit):
    page = visit("#feature=5&sort=feature")
    drawn = overlay(page)
    assert drawn.shape == (2, 3, 4)
    alpha = np.array([[255, 0, 0], [0, 0, round(255 * (64 / 255) ** 0.5)]])  # 2 of 8 is the byte 64
    assert (drawn[..., 3] == alpha).all()
    assert drawn[0, 0, :3] == pytest.approx(COLOURS[255], abs=1)
    shot = page.locator(".shot").first
    assert shot.bounding_box()["width"] == pytest.approx(1.5 * shot.bounding_box()["height"], abs=1)
    page.mouse.move(5, 5)
    ground = picture_colour(2)
    for row, column in np.ndindex(2, 3):
        seen = pixel(shot, (column + 0.5) / 3, (row + 0.5) / 2)
        cover = 0.8 * drawn[row, column, 3] / 255
        wanted = drawn[row, column, :3] * cover + np.array(ground) * (1 - cover)
        assert seen == pytest.approx(wanted, abs=8)  # the small picture is a WebP
    edge = [pixel(shot, (1 + side * 0.04) / 3, 0.25) for side in (-1, 1)]  # blocky: it ends where the patch ends
    assert edge[0] == pytest.approx(COLOURS[255] * 0.8 + np.array(ground) * 0.2, abs=8)
    assert edge[1] == pytest.approx(ground, abs=8)


def test_one_scale_for_all_pictures_and_a_slider_that_moves_its_end(visit):
    page = visit("#feature=5&sort=feature")
    assert page.locator("#scale-top").inner_text() == "8.00"
    assert overlay(page, 1)[0, 1, 3] == round(255 * (128 / 255) ** 0.5)  # 4 of 8
    page.locator("#top").fill("50")
    page.wait_for_timeout(200)
    assert page.locator("#scale-top").inner_text() == "≥ 4.00"
    assert overlay(page, 1)[0, 1, 3] == 255
    press(page, "m")
    spotlight = overlay(page)
    assert spotlight[0, 0, 3] == 0
    assert spotlight[0, 1, 3] == pytest.approx(0.88 * 255, abs=1)
    press(page, "m")
    expect(page.locator(".shot canvas").first).to_be_hidden()


def test_maps_of_another_step(visit, known):
    page = visit("#feature=5&sort=feature")
    page.locator("#maps button", has_text="2").click()
    page.wait_for_timeout(200)
    assert overlay(page, 0)[..., 3].max() == 0  # image 2 has nothing at step 2
    assert overlay(page, 1)[0, 1, 3] > 0


def test_a_click_on_a_patch_names_its_features_and_its_error(visit, known):
    page = visit("#feature=5&sort=feature")
    shot = page.locator(".shot").first
    box = shot.bounding_box()
    shot.click(position={"x": box["width"] * 5 / 6, "y": box["height"] * 3 / 4})  # row 1, column 2
    page.locator(".residual").wait_for()
    values = known[2, 1, 5]
    strongest = [int(f) for f in np.argsort(-values, kind="stable")[:3] if values[f] > 0]
    links = page.locator("#patch .feature-link")
    assert [int(links.nth(at).get_attribute("data-feature")) for at in range(links.count())] == strongest
    numbers = page.locator("#patch .ranked b.small").all_inner_texts()
    assert [float(text) for text in numbers] == pytest.approx([values[f] for f in strongest], rel=0.01)
    expect(page.locator("#patch")).to_contain_text("row 1, column 2 at step 5")
    expect(page.locator("#patch")).to_contain_text("25.0 % of this patch is left unexplained")
    press(page, "Shift+ArrowUp", "Shift+ArrowLeft")
    expect(page.locator("#patch")).to_contain_text("row 0, column 1 at step 5")
    page.locator("#patch .steps button").first.click()
    expect(page.locator("#patch")).to_contain_text("row 0, column 1 at step 2")
    other = page.locator("#patch .feature-link").last
    wanted = int(other.get_attribute("data-feature"))
    other.click()
    assert shown(page) == wanted
    expect(page.locator("#patch")).to_be_hidden()


def test_hostile_prompts_stay_text(visit, known):
    feature = int(known[0].max(axis=(0, 1)).argmax())
    page = visit(f"#feature={feature}")
    assert HOSTILE in page.locator(".card .prompt").all_inner_texts()
    assert page.locator(".card b:has-text('bold')").count() == 0
    page.locator(".card", has_text="onerror").first.locator(".shot").click()
    expect(page.locator("#patch .prompt")).to_have_text(HOSTILE)
    page.evaluate("location.hash = '#find=' + encodeURIComponent('<img src=x onerror=alert(3)>')")
    page.wait_for_timeout(300)
    expect(page.locator("#find-note")).to_contain_text("onerror")


def test_what_was_not_computed_is_said_and_not_shown(visit):
    page = visit("#feature=5")
    assert "flux-ir label-features" in page.locator("#about").inner_text()
    assert "What it draws" not in page.locator("#about").inner_text()
    assert "Over the steps" in page.locator("#about").inner_text()


def test_numbers_are_chosen_for_the_list(visit):
    page = visit()
    page.locator("#choose-columns").click()
    page.locator("#glossary input[value=entropy]").check()
    page.locator("#numbers button").click()
    page.wait_for_timeout(100)
    assert "entropy" in page.locator("#columns").inner_text()
    assert "entropy" in settled_address(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_map_of_all_features_has_a_dot_for_each(visit, scheme):
    page = visit("#sort=feature", color_scheme=scheme)
    x, y = page.evaluate("[dots.x[5], dots.y[5]]")
    frame = page.locator("#scatter").bounding_box()
    dot, ground = (
        pixel(page.locator("#scatter"), (x + away) / frame["width"], y / frame["height"]) for away in (0, 18)
    )
    assert abs(np.subtract(dot, ground)).max() > 60


def test_pictures_of_one_token_have_no_overlay(visit, tmp_path):
    values = random_values(images=5, steps=1, tokens=1, features=4, share=0.8)
    folder = make_feature_folder(tmp_path / "clip", {"img": values}, grid=None, steps=(0,))
    for _ in write_pages(folder, PagesSettings()):
        pass
    page = visit("#feature=1", path=folder.path)
    expect(page.locator(".shot canvas").first).to_be_hidden()
    expect(page.locator("#scale")).to_be_hidden()
    page.locator(".shot").first.click()
    expect(page.locator("#patch")).to_contain_text("the whole picture")
    page.locator("#patch .feature-link").first.wait_for()


def test_text_tokens_are_coloured_by_value(visit, tmp_path):
    values = {"img": random_values(images=3, steps=1, tokens=6, features=4), "txt": np.zeros((3, 1, 5, 4), np.float32)}
    values["txt"][1, 0, :, 2] = [0, 6, 0, 3, 0]
    folder = make_feature_folder(tmp_path / "both", values, steps=(0,))
    for _ in write_pages(folder, PagesSettings()):
        pass
    page = visit("#stream=txt&feature=2", path=folder.path)
    lit = page.locator(".sentence").first.locator(".token.lit")
    assert lit.evaluate_all("all => all.map((token) => token.title)") == ["token 1: 6.00", "token 3: 3.01"]
    page.locator("#feature-streams button", has_text="image").click()
    page.locator(".shot").first.wait_for()
    assert settled_address(page) == "#feature=2"


def test_labels_words_neighbours_and_drawings_are_shown_and_lead_on(visit, tmp_path, known):
    folder = make_feature_folder(tmp_path / "all", {"img": known})
    folder = add_later_stages(folder)
    for _ in write_pages(folder, PagesSettings()):
        pass
    page = visit("#feature=1", path=folder.path)
    expect(page.locator("#feature-name")).to_have_text("blue <b>things</b>")
    expect(page.locator("#feature-facts")).to_contain_text("label from words, score 0.910 (0.840 to 0.960)")
    drawn = page.locator(".draws img").evaluate_all("all => all.map((image) => image.naturalWidth)")
    assert drawn == [32, 16]
    turned = page.locator(".turned")
    assert turned.locator("img").evaluate_all("all => all.map((image) => image.naturalWidth)") == [48, 48]
    assert turned.locator(".strengths span").all_inner_texts() == ["-2", "0", "+2"]
    expect(turned).to_contain_text("above its random direction: score 0.250, random 0.125, by the distance of latents")
    expect(turned).to_contain_text("a <b>red</b> thing")
    page.locator(".panel", has_text="Nearest directions").locator(".feature-link").click()
    assert shown(page) == 2
    expect(page.locator("#about")).to_contain_text("no better than the bar for a label: red, score 0.550")
    page.go_back()
    assert shown(page) == 1
    page.locator(".ranked a", has_text="blue thing").click()
    expect(page.locator("#find")).to_have_value('"blue thing"')
    page.wait_for_timeout(300)
    assert listed(page) == [1]
    assert find(page, "is:labelled") == [1]
    assert find(page, "") == [0, 1, 2, 3, 4, 5]  # by coherence, as it is known
