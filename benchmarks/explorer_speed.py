"""How fast the explorer is at FLUX.1's size: 57 blocks x 50 steps, 2,850 pictures, in headless Chromium.

    uv run python benchmarks/explorer_speed.py [folder]

Prints the time to the first paint and to the first complete view, and the time from a key press to the frame that shows
its answer. The pictures are synthetic (noise that turns into a scene), of real sizes; they are made anew in a temporary
folder unless one is named.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from measure import machine
from PIL import Image, ImageDraw
from playwright.sync_api import Page, sync_playwright

from flux_ir.explorer.data import decoded_runs
from flux_ir.explorer.page import write_explorer
from flux_ir.files import write_json
from flux_ir.layout import RunFolder

DOUBLE, SINGLE, STEPS, SIDE_PX = 19, 38, 50, 256
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
OPENINGS, PRESSES = 5, 60
KEYS = ["ArrowDown", "ArrowRight", "m", "ArrowUp", "ArrowRight", "ArrowDown"]

# The time of a key press is from the event's own time stamp to the frame in which its answer was drawn: a frame
# callback asked for in the handler runs before that frame is painted, the message it posts arrives after it.
WATCH_KEYS = """() => {
  window.answers = [];
  addEventListener("keydown", (event) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => window.answers.push(performance.now() - event.timeStamp);
    requestAnimationFrame(() => channel.port2.postMessage(null));
  });
}"""
WATCH_PAINT = """() => new Promise((done) => {
  new PerformanceObserver((list) => done(list.getEntriesByName("first-contentful-paint")[0]?.startTime))
    .observe({ type: "paint", buffered: true });
})"""
WATCH_COMPLETE = """async () => {
  const band = new Image();
  band.src = /url\\("(.*?)"\\)/.exec(document.querySelector(".film").style.backgroundImage)[1];
  await band.decode();
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now();
}"""


def make_run(output_dir: Path, generation_id: str) -> None:
    """A run folder of FLUX.1's depth: pictures from noise to scene, and numbers that fall with depth."""
    folder = RunFolder(output_dir, generation_id)
    noise = Image.effect_noise((SIDE_PX, SIDE_PX), 90).convert("RGB")
    scene = Image.new("RGB", (SIDE_PX, SIDE_PX), "#dfe7ea")
    pen = ImageDraw.Draw(scene)
    pen.ellipse((40, 60, 150, 170), fill="#b5402f")
    pen.rectangle((165, 120, 225, 180), fill="#2f55a4")
    timesteps = [1 - step / STEPS for step in range(STEPS + 1)]
    facts = {"model": "flux-dev", "seed": 7, "width": SIDE_PX, "height": SIDE_PX, "guidance": 2.5, "num_steps": STEPS}
    facts |= {"prompt": "a large red circle left of a small blue square", "timesteps": timesteps}
    write_json(folder.metadata_file("20260101_000000", "flux-dev"), facts | {"timestamp": "20260101_000000"})
    sites = {}
    for depth, (kind, block) in enumerate(blocks()):
        share = depth / (DOUBLE + SINGLE - 1)
        site = f"double.{block}.img" if kind == "double" else f"single.{block}"
        sites[site] = [number(step, share) for step in range(STEPS)]
        for step in range(STEPS):
            path = folder.decoded_image("x0", step, kind, block)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.blend(noise, scene, share * (0.3 + 0.7 * step / STEPS)).save(path, quality=90)
    write_json(folder.lens_json, {"generation_id": generation_id, "sites": sites})
    scene.save(folder.image())


def blocks() -> Iterator[tuple[str, int]]:
    """Every block in depth order."""
    yield from (("double", block) for block in range(DOUBLE))
    yield from (("single", block) for block in range(SINGLE))


def number(step: int, share: float) -> dict[str, float]:
    """One entry of lens.json."""
    distance = (1 - share) ** (0.7 + 1.5 * step / STEPS) * (1 - 0.2 * step / STEPS)
    return {"step": step, "cosine": 1 - distance / 2, "relative_distance": distance, "psnr_x0_db": 10 + 20 * share}


@contextmanager
def chromium() -> Iterator[Page]:
    """A page in a browser of its own, with a fresh profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser.new_page(viewport={"width": 1440, "height": 900})
        browser.close()


def open_page(page: Page, target: Path) -> tuple[float, float]:
    """Time to the first paint and to the whole view, thumbnails included [ms]."""
    page.goto("about:blank")
    page.goto(target.as_uri(), wait_until="commit")
    return page.evaluate(WATCH_PAINT), page.evaluate(WATCH_COMPLETE)


def press_keys(page: Page) -> list[float]:
    """Times from key press to answer [ms]."""
    page.evaluate(WATCH_KEYS)
    for press in range(PRESSES):
        page.keyboard.press(KEYS[press % len(KEYS)])
        page.wait_for_timeout(60)
    return page.evaluate("answers")


def report(name: str, times_ms: list[float]) -> None:
    """One line: the median and the worst."""
    print(f"{name:<28} median {median(times_ms):6.0f} ms   worst {max(times_ms):6.0f} ms   ({len(times_ms)} times)")


def main(output_dir: Path) -> None:
    """Make the run where there is none, write the page, open it, press keys."""
    print(machine())
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        make_run(output_dir, "57057057")
    start = time.perf_counter()
    target = write_explorer(output_dir, decoded_runs(output_dir), output_dir / "explorer.html")
    print(f"{'writing the page':<28} {time.perf_counter() - start:.1f} s, {target.stat().st_size / 1e3:.0f} kB")
    with chromium() as page:
        painted, complete = zip(*[open_page(page, target) for _ in range(OPENINGS)], strict=True)
        report("first paint", list(painted))
        report("all thumbnails in view", list(complete))
        report("key press to its answer", press_keys(page))
        print(f"cells: {page.locator('.cell').count()}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
