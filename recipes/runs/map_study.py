"""Do maps find what words stand for? Attention maps and concept maps of flux-tiny against the judge's masks.

uv run python recipes/runs/map_study.py --scenes 50

Two objects that differ in colour and shape from each other, and in colour from the background; the judge's masks say
which patches each covers (half of the patch or more). Beside the maps stand a position prior, the mean map of the same
word's place in all other captions, and the map of the other object's word. AUROC is over the 64 patches of a picture;
IoU is that of the patches above the map's mean. Means over objects and pictures, with the standard error over pictures.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import flux_ir
from flux_ir.demo.judge import find_objects, match_objects
from flux_ir.demo.scenes import Scene, held_out_scenes
from flux_ir.models.suite import Suite

KINDS = ("colour", "shape", "background")
Maps = dict[str, dict[str, list[np.ndarray]]]
"""By method and kind: the map of the first object's word and of the second's, or the background's alone."""


def fitting(scene: Scene) -> bool:
    """Whether every word of the caption that is asked for stands there once, for one thing."""
    if len(scene.things) != 2:
        return False
    first, second = scene.things
    colours = {first.colour, second.colour, scene.background}
    return len(colours) == 3 and first.shape != second.shape


def masks_of(picture: Path, scene: Scene) -> list[np.ndarray] | None:
    """The patches of the first object, the second and the background; None if the picture lacks one."""
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    sight, masks = find_objects(pixels)
    found = match_objects(sight.objects, scene)
    if None in found:
        return None
    side = pixels.shape[0] // 16
    share = [masks[number].reshape(side, 16, side, 16).mean(axis=(1, 3)) for number in found]
    return [share[0] >= 0.5, share[1] >= 0.5, masks.any(axis=0).reshape(side, 16, side, 16).mean(axis=(1, 3)) < 0.5]


def auroc(values: np.ndarray, mask: np.ndarray) -> float:
    """The share of pairs of a patch inside and one outside in which the inside one is higher; ties are half."""
    inside, outside = values[mask][:, None], values[~mask][None]
    return float(((inside > outside) + 0.5 * (inside == outside)).mean())


def iou(values: np.ndarray, mask: np.ndarray) -> float:
    """Overlap of the mask with the patches above the map's mean."""
    high = values > values.mean()
    return float((high & mask).sum() / (high | mask).sum())


def maps_of(model: Suite, scene: Scene, seed: int, folder: Path) -> tuple[Path, Maps]:
    """The picture, and {method: {kind: [map of the first object, of the second]}}, or one map of the background."""
    things = scene.things
    found: Maps = defaultdict(dict)
    for kind in ("colour", "shape"):
        names = [getattr(thing, kind) for thing in things]
        done = flux_ir.attention_maps(
            scene.caption,
            words=[*names, "background"],
            concepts=[*names, "background"],
            concept_blocks=range(model.spec.flux.depth),
            model=model,
            seed=seed,
            output_dir=folder,
        )
        steps = [load_file(path) for path in done.steps]
        depth = model.spec.flux.depth
        concepts = {
            "concepts, last block": [step[f"double.{depth - 1}/concepts"] for step in steps],
            "concepts, all double": [step[f"double.{n}/concepts"] for step in steps for n in range(depth)],
        }
        groups = {f"image to word, {group}": maps["to_words"] for group, maps in done.mean.items()}
        groups |= {f"word to image, {group}": maps["from_words"] for group, maps in done.mean.items()}
        groups |= {name: torch.stack(maps).mean(dim=0) for name, maps in concepts.items()}
        for method, maps in groups.items():
            found[method][kind] = list(maps[:2].double().numpy())
            found[method]["background"] = [maps[2].double().numpy()]
    return done.picture, found


def main() -> None:
    """Prints a table of AUROC and one of IoU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = flux_ir.load_model("flux-tiny", dtype="float32")
    chosen = [scene for scene in held_out_scenes(40 * arguments.scenes, 11) if fitting(scene)][: arguments.scenes]
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        for number, scene in enumerate(chosen):
            picture, maps = maps_of(model, scene, arguments.seed + number, Path(folder))
            if (masks := masks_of(picture, scene)) is not None:
                pictures.append((masks, maps))
    print(f"{len(pictures)} pictures of {len(chosen)} show what the caption asks for\n")
    rows = scores(pictures)
    print("| map | " + " | ".join(f"{kind} AUROC | {kind} IoU" for kind in KINDS) + " |")
    print("| --- |" + " --- |" * 2 * len(KINDS))
    for method, cells in rows.items():
        texts = [f"{mean:.2f} ± {error:.2f}" for kind in KINDS for mean, error in cells[kind]]
        print(f"| {method} | " + " | ".join(texts) + " |")


def scores(pictures: list[tuple[list[np.ndarray], Maps]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{method: {kind: [(mean, standard error) of AUROC, of IoU]}}, with both controls of the first method."""
    rows: dict[str, dict[str, list[tuple[float, float]]]] = {}
    methods = list(pictures[0][1])
    for method in [*methods, "position prior", "the other object's word"]:
        rows[method] = {}
        for kind in KINDS:
            per_picture = []
            for number, (masks, maps) in enumerate(pictures):
                own = maps[methods[0] if method not in maps else method][kind]
                if method == "position prior":
                    others = [other[methods[0]][kind] for at, (_, other) in enumerate(pictures) if at != number]
                    own = list(np.mean(others, axis=0))
                elif method == "the other object's word":
                    own = own[::-1] if kind != "background" else [maps[methods[0]]["colour"][0]]
                truths = masks[2:] if kind == "background" else masks[:2]
                pairs = [(auroc(m, t), iou(m, t)) for m, t in zip(own, truths, strict=True) if t.any() and not t.all()]
                if pairs:
                    per_picture.append(np.mean(pairs, axis=0))
            values = np.array(per_picture)
            errors = values.std(axis=0, ddof=1) / len(values) ** 0.5
            rows[method][kind] = list(zip(values.mean(axis=0), errors, strict=True))
    return rows


if __name__ == "__main__":
    main()
