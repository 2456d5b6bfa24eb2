"""The page of an atlas in a browser: a heat table whose cells lead to pictures and numbers."""

import pytest
from PIL import Image
from playwright.sync_api import expect

from flux_ir.explorer.atlas_page import write_atlas_page
from tests.explorer.browsing import needs_chromium, settled_address

PROMPT = "a red circle <script>alert(1)</script>"


def row(block, kind, latent, *, window="all", control=False, lost=0.5):
    share = {"mean": lost, "low": 0.1, "high": 0.9}
    said = {"block": block, "kind": kind, "window": window, "control": control, "pictures": 4, "identical": 0}
    distance = {"mean": latent, "low": latent - 0.05, "high": latent + 0.05}
    return said | {"latent": distance, "lost": share, "lost_of": {"colour": share}}


@pytest.fixture(scope="module")
def atlas():
    rows = [row("double.0", "skip", 0.9), row("double.0", "skip", 0.3, control=True), row("double.0", "attn", 0.1)]
    rows += [row("single.1", "skip", 0.2, lost=0.25), row("single.1", "attn", 0.05)]
    rows += [row(block, "skip", 0.4, window="late") for block in ("double.0", "single.1")]
    return {
        "model": "flux-tiny",
        "prompts": 4,
        "kinds": {"skip": "the block is passed over", "attn": "its attention branch is 0"},
        "windows": {"all": [0, 1], "late": [1]},
        "blocks": ["double.0", "single.1"],
        "pictures": [{"id": "ab", "prompt": PROMPT, "seed": 1, "kept": True}],
        "anchors": [row("other prompt", "patch_img", 1.0)],
        "rows": rows,
    }


@pytest.fixture
def shown(atlas, tmp_path, browser):
    for name in (
        "unedited",
        "other_prompt",
        "single.1/skip_all",
        "double.0/skip_all",
        "double.0/skip_all_control",
        "double.0/skip_late",
    ):
        path = tmp_path / "pictures" / "ab" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (200, 30, 30)).save(path)
    page = browser.new_page()
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(write_atlas_page(tmp_path, atlas).as_uri())
    yield page
    page.close()
    assert wrong == []


@needs_chromium
def test_a_cell_leads_to_its_pictures_and_numbers(shown):
    cells = shown.locator("#heat button")
    expect(cells).to_have_count(4)
    expect(cells.first).to_have_text("0.90random 0.30")
    expect(shown.locator("#pictures img")).to_have_count(4)
    expect(shown.locator("#pictures p")).to_have_text(PROMPT)
    shown.locator("#heat button[data-block='single.1'][data-kind='skip']").click()
    expect(shown.locator("#cell-title")).to_have_text("single.1: skip, all steps")
    expect(shown.locator("#pictures a").nth(1)).to_have_attribute("href", "pictures/ab/single.1/skip_all.jpg")
    expect(shown.locator("#numbers tbody tr").first).to_contain_text("0.20 (0.15 to 0.25)")
    assert "block=single.1" in settled_address(shown)
    shown.keyboard.press("ArrowUp")
    expect(shown.locator("#cell-title")).to_have_text("double.0: skip, all steps")


@needs_chromium
def test_measure_and_window_change_the_table(shown):
    shown.get_by_role("button", name="lost: colour").click()
    expect(shown.locator("#heat button").nth(2)).to_have_text("0.25")
    shown.get_by_role("button", name="latent distance").click()
    shown.get_by_role("button", name="late (1)").click()
    expect(shown.locator("#heat button")).to_have_count(2)
    expect(shown.locator("#heat button").first).to_have_text("0.40")
