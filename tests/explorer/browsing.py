"""What tests do and see on the page in a browser."""

import io
import shutil

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

CHROMIUM = shutil.which("chromium")
HERE = "[role=gridcell][tabindex='0']"
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium on the PATH (apt-get install chromium)"
)


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
