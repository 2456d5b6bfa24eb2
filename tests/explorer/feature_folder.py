"""A folder of features made of given activations, as the stages leave it: no model, no autoencoder, known answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from flux_ir.features.contents import HISTOGRAM_BINS, FeatureSettings
from flux_ir.features.folder import FORMAT, VERSION, FeatureFolder, open_features, part_images, write_tensors
from flux_ir.files import write_json

PIXELS = 16
EDGES = 2.0 ** (np.arange(HISTOGRAM_BINS + 1) / 4 - 8)


def make_feature_folder(
    path: Path,
    values: Mapping[str, np.ndarray],
    *,
    grid: tuple[int, int] | None = (2, 3),
    steps: Sequence[int] = (2, 5),
    prompts: Sequence[str] | None = None,
    pictures: bool = True,
    top: int = 4,
    with_examples: bool = True,
) -> FeatureFolder:
    """`values` by stream: [images, steps, tokens, features], 0 where a feature is silent; pictures of one colour."""
    images, _, _, d_sae = next(iter(values.values())).shape
    captures = path.parent / "captures"
    settings = FeatureSettings(
        weights="0" * 64,
        architecture="topk",
        d_in=8,
        d_sae=d_sae,
        k=4,
        captures="synthetic",
        model="flux-tiny",
        site="single.2" if len(values) > 1 else f"single.2.{next(iter(values))}",
        streams=tuple(values),
        steps=tuple(steps),
        images=images,
        tokens={stream: array.shape[2] for stream, array in values.items()},
    )
    prompts = prompts or [f"a picture of thing {image}" for image in range(images)]
    path.mkdir(parents=True)
    with (path / "images.jsonl").open("w") as lines:
        for image in range(images):
            height, width = (side * PIXELS for side in grid or (1, 1))
            name = f"pictures/{image:04d}.png" if pictures else None
            row = {"index": image, "id": f"{image:08x}", "prompt": prompts[image], "seed": 100 + image}
            row |= {"width": width, "height": height, "grid": grid, "picture": name, "used_txt": None}
            lines.write(json.dumps(row) + "\n")
            if name is not None:
                (captures / name).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (width, height), picture_colour(image)).save(captures / name)
    described = {"format": FORMAT, "version": VERSION, "settings": asdict(settings), "stages": {}}
    described["paths"] = {"sae": "../sae", "captures": "../captures"}
    described["fvu"] = {"overall": 0.25}
    write_json(path / "features.json", described)
    folder = open_features(path)
    tables = {}
    for stream, array in values.items():
        _write_parts(folder, stream, array)
        tables |= {f"{stream}/{name}": column for name, column in _table(array, grid).items()}
    write_tensors(path / "table.safetensors", tables)
    folder = folder.mark_done("score", {})
    if not with_examples:
        return folder
    examples = {}
    for stream, array in values.items():
        examples |= {f"{stream}/{name}": column for name, column in _examples(array, steps, top).items()}
    write_tensors(path / "examples.safetensors", examples)
    return folder.mark_done("examples", {"top": top}, after=("score",))


def random_values(
    *, images: int, steps: int, tokens: int, features: int, share: float = 0.3, dead: Sequence[int] = ()
) -> np.ndarray:
    """Activations of which so large a share is above 0."""
    rng = np.random.default_rng(0)
    shape = (images, steps, tokens, features)
    values = rng.gamma(1.0, 1.0, shape) * (rng.random(shape) < share)
    values[..., list(dead)] = 0
    return values.astype(np.float32)


def picture_colour(image: int) -> tuple[int, int, int]:
    """The colour of a picture."""
    return (40 + 50 * (image % 4), 60 + 30 * (image % 6), 90)


def _write_parts(folder: FeatureFolder, stream: str, array: np.ndarray) -> None:
    size = part_images(folder.settings)
    for number, start in enumerate(range(0, len(array), size)):
        some = array[start : start + size]  # [n, steps, tokens, features]
        n, steps, tokens, _ = some.shape
        flat = some.reshape(n, steps * tokens, -1).transpose(0, 2, 1)  # [n, features, steps * tokens]
        image, feature = np.nonzero((flat > 0).any(axis=2))
        maps = flat[image, feature]
        row, place = np.nonzero(maps > 0)
        best = maps.argmax(axis=1)
        tensors = {
            "image_ptr": np.searchsorted(image, np.arange(n + 1)).astype(np.int64),
            "feature": feature.astype(np.uint16),
            "max": maps.max(axis=1).astype(np.float32) if len(maps) else np.zeros(0, np.float32),
            "mean": maps.mean(axis=1).astype(np.float32) if len(maps) else np.zeros(0, np.float32),
            "at_token": (best % tokens).astype(np.int32),
            "at_step": np.asarray(folder.steps)[best // tokens].astype(np.int16),
            "row_ptr": np.searchsorted(row, np.arange(len(maps) + 1)).astype(np.int64),
            "place": place.astype(np.uint16),
            "value": maps[row, place].astype(np.float32),
            "error": np.full((n, steps, tokens), 0.25, np.float32),
            "norm": np.full((n, steps, tokens), 1.0, np.float32),
            "positions": np.broadcast_to(np.arange(tokens, dtype=np.int32), (n, tokens)),
            "centred": np.zeros((steps, folder.settings.d_in)),
        }
        path = folder.part_file(stream, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"settings": folder.settings.digest})


def _table(array: np.ndarray, grid: tuple[int, int] | None) -> dict[str, np.ndarray]:
    array = array.astype(np.float64)
    images, steps, tokens, d_sae = array.shape
    active = array > 0
    count = active.sum(axis=(0, 1, 2))
    total = array.sum(axis=(0, 1, 2))
    rows, columns = grid or (1, tokens)
    weight = array.sum(axis=(0, 1)) / np.maximum(total, 1e-9)  # [tokens, features]
    across, down = (np.arange(tokens) % columns + 0.5) / columns, (np.arange(tokens) // columns + 0.5) / rows
    energy = (array**2).sum(axis=(0, 1, 2))
    histogram = np.stack([np.histogram(array[..., f][active[..., f]], EDGES)[0] for f in range(d_sae)])
    with np.errstate(invalid="ignore"):
        return {
            "count": count.astype(np.int64),
            "frequency": count / (images * steps * tokens),
            "images": active.any(axis=(1, 2)).sum(axis=0).astype(np.int64),
            "mean_active": (total / np.maximum(count, 1)).astype(np.float32),
            "max_active": array.max(axis=(0, 1, 2)).astype(np.float32),
            "share": energy / energy.sum(),
            "step_frequency": active.mean(axis=(0, 2)).T,
            "step_mean": array.mean(axis=(0, 2)).T,
            "histogram": histogram.astype(np.int64),
            "edges": EDGES,
            "centre_x": np.where(count > 0, (weight * across[:, None]).sum(axis=0), np.nan),
            "centre_y": np.where(count > 0, (weight * down[:, None]).sum(axis=0), np.nan),
            "spread": np.where(count > 0, 0.2, np.nan),
            "entropy": np.where(count > 0, 0.5, np.nan),
            "position_r2": np.where(count > 0, np.linspace(0, 0.9, d_sae), np.nan),
        }


def _examples(array: np.ndarray, steps: Sequence[int], top: int) -> dict[str, np.ndarray]:
    images, _, tokens, d_sae = array.shape
    flat = array.reshape(images, -1, d_sae)
    best, at = flat.max(axis=1).T, flat.argmax(axis=1).T  # [features, images]
    order = np.argsort(-best, axis=1, kind="stable")
    shares = order[:, : 2 * (images // 2)].reshape(d_sae, 2, -1)[..., :2]
    kinds = {"top": order[:, :top], "quantile": shares, "random": order[:, 1:3]}
    found: dict[str, np.ndarray] = {}
    for kind, image in kinds.items():
        chosen = image.reshape(d_sae, -1)
        value = np.take_along_axis(best, chosen, axis=1).reshape(image.shape)
        place = np.take_along_axis(at, chosen, axis=1).reshape(image.shape)
        found[kind] = np.where(value > 0, image, -1).astype(np.int32)
        found[f"{kind}_value"] = value.astype(np.float32)
        found[f"{kind}_token"] = (place % tokens).astype(np.int32)
        found[f"{kind}_step"] = np.asarray(steps)[place // tokens].astype(np.int16)
    found["quantile_edges"] = (best.max(axis=1, keepdims=True) / 2).astype(np.float32)
    found["quantile_count"] = np.full((d_sae, 2), images // 2, np.int64)
    last = order[:, -1:]
    found["silent"] = np.where(np.take_along_axis(best, last, axis=1) > 0, -1, last).astype(np.int32)
    found["silent_value"] = np.full(last.shape, 0.5, np.float32)
    return found


def add_later_stages(folder: FeatureFolder) -> FeatureFolder:
    """What the later stages leave, of image tokens: a label, words, neighbours, numbers, and what feature 1 draws."""
    d_sae, path = folder.settings.d_sae, folder.path
    numbers = {"img/coherence": np.linspace(0.9, 0.1, d_sae, dtype=np.float32), "img/stability": np.full(d_sae, np.nan)}
    numbers |= {"img/stability_feature": np.full(d_sae, -1, np.int32)}
    write_tensors(path / "selection.safetensors", numbers)
    nearest = np.stack([np.roll(np.arange(d_sae), -1), np.full(d_sae, -1)], axis=1).astype(np.int64)
    likeness = np.stack([np.linspace(0.5, 0.9, d_sae), np.full(d_sae, np.nan)], axis=1).astype(np.float32)
    decoder = {"img/nearest": nearest, "img/nearest_cosine": likeness, "img/together": nearest[:, ::-1]}
    decoder |= {"img/together_jaccard": likeness[:, ::-1], "img/encoder_decoder_cosine": likeness[:, 0]}
    write_tensors(path / "decoder.safetensors", decoder)
    words = {"words": ["red", "blue thing"], "columns": ["word", "pmi", "both", "q"]}
    words["features"] = {"1": [[1, 2.5, 7, 0.01], [0, 1.25, 3, 0.04]]}
    write_json(path / "words.json", {"version": 1, "streams": {"img": words}})
    good = {"feature": 1, "text": "blue <b>things</b>", "candidate": "blue <b>things</b>", "source": "words"}
    good |= {"score": 0.91, "low": 0.84, "high": 0.96}
    poor = good | {"feature": 2, "text": None, "candidate": "red", "score": 0.55}
    write_json(path / "labels.json", {"version": 1, "streams": {"img": [good, poor]}})
    turned = {"feature": 1, "strengths": [-2, 0, 2], "scenes": [{"prompt": "a <b>red</b> thing"}], "distance": "latent"}
    write_json(path / "steering" / "1.json", turned | {"score": 0.25, "control": 0.125, "above": True, "above_at": [2]})
    strips = (("steering/strips/1_0", 48), ("steering/strips/1_0_random", 48))
    for name, width in (("draws/1", 32), ("draws/untouched", 16), *strips):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, 16), (200, 30, 30)).save(path / f"{name}.png")
    return folder.mark_done("labels", {}, after=("score",))
