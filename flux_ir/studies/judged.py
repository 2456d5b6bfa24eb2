"""What the judge sees on the pictures of a collection of flux-tiny. It takes 10 ms a picture, so it is kept in a file.

The file has the name of the collection's content, so that it serves every autoencoder and every study. Next: `labels`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from flux_ir.activations.blocks import DrawnSource, Generation, TokenSource
from flux_ir.demo.judge import Sight, compare, find_objects, match_objects
from flux_ir.demo.scenes import Scene, parse_caption
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file

PATCH_PX = 16
"""The side of the square of pixels that an image token stands for."""
ASPECTS = ("number", "background", "colour", "shape", "size", "place", "relation")
"""What a picture and its caption can agree in; in a place or a relation only if the caption names one."""
_VERSION = 2  # of the judge: another finds other objects


@dataclass(frozen=True)
class Judged:
    """The pictures of a collection, or some of them, against their captions."""

    images: np.ndarray
    """int64 [images]: which generations of the source."""
    scenes: Sequence[Scene]
    """The scene of each caption."""
    cover: np.ndarray
    """float32 [images, 2, tokens]: the share of each patch that the first and the second object of the caption cover.

    0 for an object that is not there.
    """
    agrees: Mapping[str, np.ndarray]
    """For each of `ASPECTS`, whether the picture shows what the caption says: bool [images]."""

    def chosen(self, kept: np.ndarray) -> "Judged":
        """Only these pictures: bool [images]."""
        agrees = {aspect: right[kept] for aspect, right in self.agrees.items()}
        scenes = [scene for scene, stays in zip(self.scenes, kept, strict=True) if stays]
        return Judged(self.images[kept], scenes, self.cover[kept], agrees)


Follow = Callable[[Sequence[Path]], Iterator[Path]]


def judge_collection(source: TokenSource, folder: Path | None = None, follow: Follow = iter) -> Judged:
    """What the judge sees on every picture of a collection, read from `folder` if it is kept there, else kept.

    `follow` iterates over the pictures, and may report progress.

    Raises FluxIRError for captions that flux-tiny does not know, for generations without a picture, and for pictures
    that are not square.
    """
    scenes = [_scene(generation) for generation in source.generations]
    path = None if folder is None else folder / f"judged_{source.identity}.safetensors"
    kept = _read(path) if path is not None and path.is_file() else None
    if kept is None:
        looked = zip(follow(pictures_of(source)), scenes, strict=True)
        pixels, right = zip(*(_look(picture, scene) for picture, scene in looked), strict=True)
        kept = np.stack(pixels), np.array(right, dtype=bool)
        if path is not None:
            with complete_file(path) as beside:
                save_file({"covered_px": kept[0], "agrees": kept[1].astype(np.uint8)}, beside, _METADATA)
    covered_px, agrees = kept
    return Judged(
        images=np.arange(len(scenes)),
        scenes=scenes,
        cover=covered_px.astype(np.float32) / PATCH_PX**2,
        agrees={aspect: agrees[:, column].astype(bool) for column, aspect in enumerate(ASPECTS)},
    )


def pictures_of(source: TokenSource) -> list[Path]:
    """The pictures of a source's generations. Raises FluxIRError if one has none."""
    drawn = [
        source.drawn(image).picture if isinstance(source, DrawnSource) else None
        for image in range(len(source.generations))
    ]
    if missing := [image for image, picture in enumerate(drawn) if picture is None]:
        raise FluxIRError(
            f"every generation must have its picture: {len(missing)} of {len(drawn)} have none, such as generation "
            f"{source.generations[missing[0]].id}",
            hint="collect with --save_images, or give --labels FILE",
        )
    return [picture for picture in drawn if picture is not None]


def agreement(sight: Sight, scene: Scene) -> tuple[bool, ...]:
    """For each of `ASPECTS`, whether a picture shows what its caption says."""
    verdict = compare(sight, scene)
    objects = verdict.objects
    return (
        verdict.number,
        verdict.background,
        all(found.colour for found in objects),
        all(found.shape for found in objects),
        all(found.size for found in objects),
        all(found.place is not False for found in objects),
        verdict.relation is not False,
    )


def covered_px(masks: np.ndarray) -> np.ndarray:
    """The pixels of each patch, row by row, that masks cover, bool [objects, height, width]: int [objects, tokens]."""
    count, height, width = masks.shape
    patches = masks.reshape(count, height // PATCH_PX, PATCH_PX, width // PATCH_PX, PATCH_PX)
    return patches.sum((2, 4)).reshape(count, -1)


_METADATA = {"format": "flux_ir judged pictures", "aspects": json.dumps(ASPECTS), "judge": str(_VERSION)}


def _read(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Pixels and agreement as they were kept; None if another version of the judge kept them."""
    with safe_open(path, framework="np") as file:
        if file.metadata() != _METADATA:
            return None
        return file.get_tensor("covered_px"), file.get_tensor("agrees")


def _scene(generation: Generation) -> Scene:
    try:
        return parse_caption(generation.prompt)
    except ValueError as error:
        raise FluxIRError(
            f"labels come from the captions of flux-tiny's world: got {generation.prompt!r}",
            hint="give the labels of other pictures with --labels FILE",
        ) from error


def _look(path: Path, scene: Scene) -> tuple[np.ndarray, tuple[bool, ...]]:
    """The pixels of each patch that the caption's objects cover, uint16 [2, tokens], and their agreement by aspect."""
    with Image.open(path) as file:
        picture = np.asarray(file.convert("RGB"))
    height, width = picture.shape[:2]
    if height != width or height % PATCH_PX:
        raise FluxIRError(
            f"the judge looks at square pictures with a side that {PATCH_PX} divides: {path} has {width} x {height} px",
            hint="collect flux-tiny at 128 x 128 px",
        )
    sight, masks = find_objects(picture)
    covered = np.zeros((2, (height // PATCH_PX) ** 2), dtype=np.uint16)
    for number, found in enumerate(match_objects(sight.objects, scene)):
        if found is not None:
            covered[number] = covered_px(masks[found : found + 1])[0]
    return covered, agreement(sight, scene)
