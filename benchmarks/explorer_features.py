"""How fast the pages of features are at the size of a large autoencoder: 65,536 features, in headless Chromium.

    uv run python benchmarks/explorer_features.py [folder]

Prints how long the pages take to write and how large they are; the time to the first paint and to the whole list; from
a key to the next feature; from a click to the list in another order; and the JavaScript heap. The folder of features is
synthetic: 10,000 pictures, 16 x 16 tokens at three steps, and for each feature all groups of examples with real maps.
It is made anew in a temporary folder (2.5 GB) unless one is named, and used again where one of that name is there.
"""

import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
from measure import machine
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from playwright.sync_api import CDPSession, Page, sync_playwright

from flux_ir.explorer.feature_pages import PagesSettings, write_pages
from flux_ir.features.contents import HISTOGRAM_BINS, FeatureSettings
from flux_ir.features.folder import FORMAT, VERSION, FeatureFolder, open_features, write_tensors
from flux_ir.files import write_json

FEATURES, IMAGES, SIDE, STEPS = 65_536, 10_000, 16, (2, 5, 7)
TOP, QUANTILES, PER_QUANTILE, RANDOM, SILENT = 24, 5, 4, 8, 8
PICTURE_PX, PICTURES = 256, 64  # of each picture there are many copies
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-precise-memory-info"),
]
OPENINGS, PRESSES, SORTS = 5, 60, 12
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "star", "triangle", "ring", "cross")
EDGES = 2.0 ** (np.arange(HISTOGRAM_BINS + 1) / 4 - 8)

WATCH_PAINT = """() => new Promise((done) => {
  new PerformanceObserver((list) => done(list.getEntriesByName("first-contentful-paint")[0]?.startTime))
    .observe({ type: "paint", buffered: true });
})"""
WAIT_FOR_LIST = """() => new Promise((done) => {
  const look = () => {
    const thumbs = [...document.querySelectorAll("#rows .thumb:not([hidden]) img")].filter((image) => image.src);
    const there = thumbs.length > 20 && thumbs.every((image) => image.complete);
    if (there) requestAnimationFrame(() => setTimeout(() => done(performance.now())));
    else requestAnimationFrame(look);
  };
  look();
})"""
# From a key or a click to the frame that shows its answer, and to the one in which all pictures in view are there too.
TO_NEXT_FEATURE = """(key) => new Promise((done) => {
  const before = document.getElementById("examples").dataset.feature;
  const start = performance.now();
  let shown = null;
  const look = () => {
    const { feature } = document.getElementById("examples").dataset;
    if (shown === null && feature !== before) shown = performance.now() - start;
    const inView = [...document.querySelectorAll("#examples img")].filter(
      (image) => image.getBoundingClientRect().top < innerHeight);
    if (shown !== null && inView.every((image) => image.complete))
      setTimeout(() => done([shown, performance.now() - start]));
    else requestAnimationFrame(look);
  };
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  requestAnimationFrame(look);
})"""
TO_NEW_ORDER = """(column) => new Promise((done) => {
  const first = () => document.querySelector("#rows .row.on .number").textContent;
  const before = first();
  const start = performance.now();
  const look = () => {
    if (first() !== before) setTimeout(() => done(performance.now() - start));
    else requestAnimationFrame(look);
  };
  document.querySelector(`[data-column="${column}"]`).click();
  requestAnimationFrame(look);
})"""
TO_FOUND = """(text) => new Promise((done) => {
  const find = document.getElementById("find");
  find.value = text;
  const start = performance.now();
  const before = document.getElementById("find-note").textContent;
  find.dispatchEvent(new Event("input", { bubbles: true }));
  const look = () => {
    if (document.getElementById("find-note").textContent !== before) setTimeout(() => done(performance.now() - start));
    else requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
})"""


# The synthetic folder


def make_folder(path: Path) -> FeatureFolder:
    """A folder of features as the stages leave it."""
    rng = np.random.default_rng(0)
    settings = FeatureSettings(
        weights="0" * 64,
        architecture="batch_topk",
        d_in=3072,
        d_sae=FEATURES,
        k=64,
        captures="synthetic",
        model="flux-schnell",
        site="single.18.img",
        streams=("img",),
        steps=STEPS,
        images=IMAGES,
        tokens={"img": SIDE**2},
    )
    path.mkdir(parents=True)
    write_images(path)
    described = {"format": FORMAT, "version": VERSION, "settings": asdict(settings), "stages": {}}
    described |= {"paths": {"sae": "../sae", "captures": "../captures"}, "fvu": {"overall": 0.18}}
    write_json(path / "features.json", described)
    folder = open_features(path)
    largest = np.exp(rng.normal(1.0, 0.6, FEATURES)).astype(np.float32)
    examples = make_examples(rng, largest)
    write_parts(folder, rng, examples)
    write_tensors(path / "table.safetensors", {f"img/{name}": column for name, column in table(rng, largest).items()})
    folder = folder.mark_done("score", {})
    in_shares = (FEATURES, QUANTILES, PER_QUANTILE)
    shaped = {
        name: array.reshape(in_shares) if name.startswith("quantile") else array for name, array in examples.items()
    }
    edges = largest[:, None] * np.linspace(0.8, 0.2, QUANTILES - 1, dtype=np.float32)
    counts = np.full((FEATURES, QUANTILES), PER_QUANTILE, np.int64)
    tensors = {
        f"img/{name}": array for name, array in (shaped | {"quantile_edges": edges, "quantile_count": counts}).items()
    }
    write_tensors(path / "examples.safetensors", tensors)
    return folder.mark_done("examples", {}, after=("score",))


def write_images(path: Path) -> None:
    """Prompts, and pictures of which there are a few, many times."""
    rng = np.random.default_rng(1)
    captures = path.parent / "captures"
    drawn = [draw_picture(rng) for _ in range(PICTURES)]
    with (path / "images.jsonl").open("w") as lines:
        for index in range(IMAGES):
            name = f"pictures/{index:06d}.jpg"
            file = captures / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(drawn[index % PICTURES])
            colours, shapes = rng.choice(COLOURS, 2), rng.choice(SHAPES, 2)
            prompt = f"a large {colours[0]} {shapes[0]} left of a small {colours[1]} {shapes[1]}, number {index}"
            row = {"index": index, "id": f"{index:016x}", "prompt": prompt, "seed": index, "picture": name}
            row |= {"width": PICTURE_PX, "height": PICTURE_PX, "grid": [SIDE, SIDE], "used_txt": None}
            lines.write(json.dumps(row) + "\n")


def draw_picture(rng: np.random.Generator) -> bytes:
    """A circle and a square on a noisy ground, as JPEG."""
    picture = Image.effect_noise((PICTURE_PX, PICTURE_PX), 60).convert("RGB")
    pen = ImageDraw.Draw(picture)
    x, y, side = (int(number) for number in rng.integers(20, 120, 3))
    pen.ellipse((x, y, x + side, y + side), fill=COLOURS[rng.integers(len(COLOURS))])
    pen.rectangle((y + 90, x + 80, y + 130, x + 130), fill=COLOURS[rng.integers(len(COLOURS))])
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=88)
    return content.getvalue()


def make_examples(rng: np.random.Generator, largest: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
    """All groups of all features; the images of one feature are all different."""
    found: dict[str, NDArray[np.generic]] = {}
    sizes = {"top": TOP, "quantile": QUANTILES * PER_QUANTILE, "random": RANDOM, "silent": SILENT}
    first = rng.integers(IMAGES, size=(FEATURES, 1))
    stride = rng.choice([7, 11, 13, 17, 19, 23, 29, 31], size=(FEATURES, 1)) * 3
    images = ((first + stride * np.arange(sum(sizes.values()))) % IMAGES).astype(np.int32)
    at = 0
    for name, size in sizes.items():
        shape = (FEATURES, size)
        found[name] = images[:, at : at + size]
        at += size
        if name == "silent":
            found["silent_value"] = rng.uniform(0, 1, shape).astype(np.float32)
            continue
        shares = {"top": (0.7, 1.0), "quantile": (0.05, 0.9), "random": (0.05, 0.9)}[name]
        share = -np.sort(-rng.uniform(*shares, shape), axis=1)
        found[f"{name}_value"] = (largest[:, None] * share).astype(np.float32)
        found[f"{name}_token"] = rng.integers(SIDE**2, size=shape).astype(np.int32)
        found[f"{name}_step"] = rng.choice(STEPS, size=shape).astype(np.int16)
    found["top_value"][:, 0] = largest
    return found


def write_parts(folder: FeatureFolder, rng: np.random.Generator, examples: dict[str, NDArray[np.generic]]) -> None:
    """Scores that hold the examples: on each, a spot of up to nine tokens around its place, weaker at other steps."""
    names = ("top", "quantile", "random")
    image = np.concatenate([examples[name] for name in names], axis=1)
    feature = np.broadcast_to(np.arange(FEATURES)[:, None], image.shape).ravel()
    image = image.ravel()
    value, token, step = (
        np.concatenate([examples[f"{name}_{what}"] for name in names], axis=1).ravel()
        for what in ("value", "token", "step")
    )
    order = np.lexsort((feature, image))
    image, feature, value, token, step = (array[order] for array in (image, feature, value, token, step))
    for number in range(folder.parts):
        first = number * folder.part_images
        count = min(folder.part_images, IMAGES - first)
        kept = slice(*np.searchsorted(image, [first, first + count]))
        tensors = part(count, image[kept] - first, feature[kept], value[kept], token[kept], step[kept])
        path = folder.part_file("img", number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors | noise(rng, count), {"settings": folder.settings.digest})


def part(
    count: int,
    image: NDArray[np.generic],
    feature: NDArray[np.generic],
    value: NDArray[np.generic],
    token: NDArray[np.generic],
    step: NDArray[np.generic],
) -> dict[str, NDArray[np.generic]]:
    """The rows and the maps of some images."""
    down, across = (offset.ravel() for offset in np.mgrid[-1:2, -1:2])
    near = np.where(down**2 + across**2 == 0, 1.0, np.where(down * across == 0, 0.6, 0.3))
    row, column = token[:, None] // SIDE + down, token[:, None] % SIDE + across
    inside = (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
    weaker = np.where(np.asarray(STEPS)[None, :] == step[:, None], 1.0, 0.5)  # [rows, steps]
    values = value[:, None, None] * weaker[:, :, None] * near  # [rows, steps, 9]
    places = np.arange(len(STEPS))[None, :, None] * SIDE**2 + (row * SIDE + column)[:, None, :]
    there = np.broadcast_to(inside[:, None, :], values.shape)
    lengths = there.sum(axis=(1, 2))
    return {
        "image_ptr": np.searchsorted(image, np.arange(count + 1)).astype(np.int64),
        "feature": feature.astype(np.uint16),
        "max": value.astype(np.float32),
        "mean": (value / SIDE**2).astype(np.float32),
        "at_token": token.astype(np.int32),
        "at_step": step.astype(np.int16),
        "row_ptr": np.r_[0, np.cumsum(lengths)].astype(np.int64),
        "place": places[there].astype(np.uint16),
        "value": values[there].astype(np.float32),
    }


def noise(rng: np.random.Generator, count: int) -> dict[str, NDArray[np.generic]]:
    """What a part says of its tokens."""
    shape = (count, len(STEPS), SIDE**2)
    return {
        "error": rng.uniform(0.1, 0.3, shape).astype(np.float32),
        "norm": np.ones(shape, np.float32),
        "positions": np.broadcast_to(np.arange(SIDE**2, dtype=np.int32), (count, SIDE**2)),
        "centred": np.zeros((len(STEPS), 1)),
    }


def table(rng: np.random.Generator, largest: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
    """Numbers of all features."""
    frequency = np.exp(rng.normal(-6, 1.5, FEATURES)).clip(1e-6, 0.5)
    tokens = IMAGES * len(STEPS) * SIDE**2
    profile = frequency[:, None] * rng.uniform(0.3, 1.7, (FEATURES, len(STEPS)))
    bins = np.searchsorted(EDGES, largest)[:, None] - np.arange(HISTOGRAM_BINS)
    histogram = np.where(bins >= 0, frequency[:, None] * tokens * np.exp(-0.5 * ((bins - 12) / 5) ** 2) / 12, 0)
    return {
        "count": (frequency * tokens).astype(np.int64),
        "frequency": frequency,
        "images": (frequency * tokens).clip(80, IMAGES).astype(np.int64),
        "mean_active": (0.2 * largest).astype(np.float32),
        "max_active": largest,
        "share": frequency * largest**2 / (frequency * largest**2).sum(),
        "step_frequency": profile,
        "step_mean": profile * largest[:, None] * 0.2,
        "histogram": histogram.astype(np.int64),
        "edges": EDGES,
        **{name: rng.uniform(0, 1, FEATURES) for name in ("centre_x", "centre_y", "entropy", "position_r2")},
        "spread": rng.uniform(0.05, 0.4, FEATURES),
    }


# The measurements


@contextmanager
def chromium() -> Iterator[Page]:
    """A page in a browser of its own, with a fresh profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser.new_page(viewport={"width": 1400, "height": 900})
        browser.close()


def open_list(page: Page, index: Path) -> tuple[float, float]:
    """Time to the first paint and to the whole list, its pictures included [ms]."""
    page.goto("about:blank")
    page.goto(index.as_uri(), wait_until="commit")
    return page.evaluate(WATCH_PAINT), page.evaluate(WAIT_FOR_LIST)


def heap_mb(session: CDPSession) -> float:
    """The JavaScript heap as it is, what nobody needs any more included [MB]."""
    metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    return metrics["JSHeapUsedSize"] / 1e6


def report(name: str, times_ms: list[float]) -> None:
    """One line: the median and the worst."""
    print(f"{name:<34} median {median(times_ms):6.0f} ms   worst {max(times_ms):6.0f} ms   ({len(times_ms)} times)")


def measure(page: Page, index: Path) -> None:
    """All measurements in one visit after another."""
    painted, complete = zip(*[open_list(page, index) for _ in range(OPENINGS)], strict=True)
    report("first paint", list(painted))
    report("list with its pictures", list(complete))
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    columns = ["frequency", "max_active", "images", "position_r2"]
    report("sorting", [page.evaluate(TO_NEW_ORDER, columns[turn % len(columns)]) for turn in range(SORTS)])
    page.evaluate(TO_FOUND, "circle")  # reads the index of words
    page.wait_for_timeout(1000)
    report("searching", [page.evaluate(TO_FOUND, text) for text in ("red", "max>3", "blue star", "density<1%")])
    page.evaluate(TO_FOUND, "")
    heaps = [heap_mb(session)]
    page.wait_for_timeout(500)  # until the address has been written
    page.goto(f"{index.as_uri()}#feature=40000&sort=-max_active")
    page.wait_for_selector(".shot")
    shown, complete = [], []
    for press in range(PRESSES):
        first, last = page.evaluate(TO_NEXT_FEATURE, "r" if press % 3 == 2 else "ArrowRight")
        shown.append(first)
        complete.append(last)
        page.wait_for_timeout(100)
        heaps.append(heap_mb(session))
    report("feature to feature", shown)
    report("  with all pictures in view", complete)
    print(f"{'JavaScript heap':<34} largest {max(heaps):5.0f} MB")


def main(folder: Path) -> None:
    """Make the folder where there is none, write the pages, and look at them."""
    print(machine())
    path = folder / "features"
    if not (path / "examples.safetensors").exists():
        start = time.perf_counter()
        make_folder(path)
        print(f"{'making the folder':<34} {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    for _ in write_pages(open_features(path), PagesSettings()):
        pass
    sizes = {
        name: sum(file.stat().st_size for file in (path / name).rglob("*") if file.is_file())
        for name in ("pages/records", "pages/patches", "thumbnails")
    }
    said = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
    print(f"{'writing the pages':<34} {time.perf_counter() - start:.0f} s: {said}")
    print(f"{'a record':<34} {sizes['pages/records'] / FEATURES / 1e3:.1f} kB")
    with chromium() as page:
        measure(page, path / "pages" / "index.html")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
