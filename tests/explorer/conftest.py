"""Run folders without a model, every picture one colour that tells its lens, block and step; and their page, opened."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from flux_ir.explorer.page import write_explorer
from flux_ir.files import write_json
from flux_ir.layout import RunFolder
from tests.explorer.browsing import CHROMIUM, HERE

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
BEGINNING = "#block=double.0&step=0"
MakeRun = Callable[..., RunFolder]
Open = Callable[..., Page]


def colour_of(lens: str, depth: int, step: int) -> tuple[int, int, int]:
    """Red says the step, green the block (double before single), blue the lens."""
    return (20 + 24 * step, 20 + 16 * depth, 220 if lens == "x0" else 40)


@pytest.fixture
def colour() -> Callable[[str, int, int], tuple[int, int, int]]:
    """The colour of a picture, by its lens, its depth and its step."""
    return colour_of


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """The folder that holds the runs; its own name must not matter, so it has a space and a hash in it."""
    folder = tmp_path / "out put #1"
    folder.mkdir()
    return folder


@pytest.fixture
def make_run(output_dir: Path) -> MakeRun:
    """Makes a run: `make_run("1a2b3c4d", double=2, single=11, steps=(0, 1, 2))`."""

    def make(
        generation_id: str = "1a2b3c4d",
        *,
        double: int = 2,
        single: int = 11,
        steps: tuple[int, ...] = (0, 1, 2),
        lenses: tuple[str, ...] = ("euler", "x0"),
        size: tuple[int, int] = (32, 32),
        prompt: str = "a red circle",
        seed: int = 7,
        model: str = "flux-tiny",
        with_numbers: bool = True,
    ) -> RunFolder:
        folder = RunFolder(output_dir, generation_id)
        blocks = [("double", i) for i in range(double)] + [("single", i) for i in range(single)]
        for lens in lenses:
            for depth, (kind, block) in enumerate(blocks):
                for step in steps:
                    path = folder.decoded_image(lens, step, kind, block)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", size, colour_of(lens, depth, step)).save(path, quality=95)
        facts = {"generation_id": generation_id, "model": model, "prompt": prompt, "seed": seed, "guidance": 2.5}
        total = max(steps) + 1
        facts |= {"width": size[0], "height": size[1], "num_steps": total, "timestamp": "20260102_030405"}
        facts |= {"timesteps": [1 - step / total for step in range(total + 1)]}
        write_json(folder.metadata_file("20260102_030405", model), facts)
        if with_numbers:
            write_json(folder.lens_json, {"generation_id": generation_id, "sites": numbers(blocks, steps)})
        Image.new("RGB", size, (200, 30, 30)).save(folder.image())
        return folder

    return make


def numbers(blocks: list[tuple[str, int]], steps: tuple[int, ...]) -> dict[str, list[dict[str, float | None]]]:
    """What lens.json says: distances that fall with depth, PSNR that is unknown at the last block."""
    last = len(blocks) - 1
    return {
        f"{kind}.{block}.img" if kind == "double" else f"{kind}.{block}": [
            {
                "step": step,
                "cosine": depth / last,
                "relative_distance": round(1 - depth / last, 4),
                "psnr_euler_db": 10.0 + depth,
                "psnr_x0_db": None if depth == last else 20.0 + depth,
            }
            for step in steps
        ]
        for depth, (kind, block) in enumerate(blocks)
    }


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
    """Writes the page of these runs and opens it offline: `open_page("1a2b3c4d", address="#step=2")`.

    At the first block and step, unless the address says otherwise.
    """
    pages, errors, requests = [], [], []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            errors.append(message.text)

    def open_it(
        *ids, address: str = BEGINNING, single_file: bool = False, target: Path | None = None, **settings
    ) -> Page:
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
