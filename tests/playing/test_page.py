"""The page in a real browser: prompt, patch, feature, steer, the same picture at 0; nothing leaves the machine."""

import re
import socket
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import expect, sync_playwright

from flux_ir.playing.server import bound, serve
from tests.explorer.browsing import CHROMIUM, needs_chromium
from tests.explorer.conftest import FLAGS

pytest.importorskip("gradio")
pytestmark = needs_chromium


@pytest.fixture
def connected(monkeypatch):
    """Every address that Python connects to."""
    addresses, connect = [], socket.socket.connect

    def note(self, address):
        addresses.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", note)
    return addresses


@pytest.fixture
def served(studio, connected):
    page = serve(studio, bound(0))
    yield page
    page.close()
    outside = [to for to in connected if isinstance(to, tuple) and to[0] not in ("127.0.0.1", "localhost", "::1")]
    assert outside == []


def test_from_a_prompt_to_a_turned_feature_and_back_to_the_same_bytes(served):
    requests, wrong = [], []
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(served.address)
        page.locator("#prompt textarea").fill("a small green star on a black background")
        page.locator("#generate").click()
        picture = page.locator("#before img")
        expect(picture).to_have_attribute("src", re.compile("^data:image/png"))
        expect(page.locator("#blocks img")).to_have_count(12)
        assert "a small green star" in page.locator("#command textarea").input_value()

        page.locator("#before canvas").click()
        rows = page.locator("#features li")
        expect(rows).to_have_count(8)
        rows.first.get_by_role("button", name="turn feature").click()
        strength = page.locator("#strength-0 input[type=number]")
        expect(page.locator("#steer")).to_be_enabled()
        page.locator("#steer").click()
        expect(page.locator("#price")).to_contain_text("The same bytes as the unsteered picture.")
        steered = page.locator("#after img")
        assert steered.get_attribute("src") == picture.get_attribute("src")

        strength.fill("4")
        strength.press("Enter")
        page.locator("#steer").click()
        expect(page.locator("#price")).to_contain_text("dB")
        assert steered.get_attribute("src") != picture.get_attribute("src")
        assert "--edit" in page.locator("#command textarea").input_value()

        number = page.locator("#number input, #number textarea")
        expect(number).to_have_value("")
        number.fill("twelve")
        page.locator("#add").click()
        expect(page.get_by_text("a feature has a number: got 'twelve'")).to_be_visible()
        number.fill("12")
        page.locator("#add").click()
        expect(page.locator("#strength-1")).to_contain_text("Feature 12")
        browser.close()
    expect.set_options(timeout=5_000)
    assert wrong == []
    assert [url for url in requests if not url.startswith((served.address, "data:", "blob:"))] == []


def test_a_page_elsewhere_cannot_reach_it_under_its_own_name(served):
    answer = urlopen(served.address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    with pytest.raises(OSError, match="403"):
        urlopen(Request(served.address, headers={"Host": "elsewhere.example"}))
