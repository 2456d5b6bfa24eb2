"""compare.json and compare.png: the settings of a comparison, the table of its pairs, and a picture of them.

Next: `compare_features`, which makes what is written here.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flux_ir.api.arguments import check_least, check_words
from flux_ir.errors import FluxIRError
from flux_ir.features.compare import Alignment, Change
from flux_ir.features.contents import digest_of
from flux_ir.features.folder import FeatureFolder
from flux_ir.features.matching import Pairs, Tested
from flux_ir.files import complete_file
from flux_ir.lens.measures import json_number
from flux_ir.plots.charts import ScatterGroup, scatter
from flux_ir.sites import Stream

CompareBy = Literal["auto", "activations", "decoder"]
CompareLevel = Literal["image", "token"]
RESULT, PICTURE = "compare.json", "compare.png"
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What a comparison depends on, besides its two folders. Raises FluxIRError for numbers out of range."""

    by: CompareBy = "auto"
    level: CompareLevel = "image"
    stream: Stream | None = None
    candidates: int = 16
    min_likeness: float = 0.5
    min_images: int = 10
    max_images: int = 20_000
    permutations: int = 10_000
    fdr: float = 0.05
    cka_tokens: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_words(CompareSettings, {name: getattr(self, name) for name in ("by", "level", "stream")})
        check_least(asdict(self), permutations=1)  # the null is made of them
        for bounded in ("fdr", "min_likeness"):
            if getattr(self, bounded) > 1:
                raise FluxIRError(f"--{bounded} is at most 1: got {getattr(self, bounded)}", hint="leave it out")


class Findings(NamedTuple):
    """The results of a comparison; where there are two sides, in the order of the folders."""

    by: Literal["activations", "decoder"]
    generations: int
    """Generations that both sides have and that were compared."""
    usable: Sequence[NDArray[np.int64]]
    """The features of each side that are active on enough images to be compared."""
    pairs: Pairs
    tested: Tested
    null_draws: int
    matched: NDArray[np.bool_]
    """Which of the pairs are one feature: alike enough, and beyond the null."""
    changes: Mapping[str, Change]
    """By what is measured; empty where the sides have no generations in common."""
    alignments: Sequence[Alignment]


class Comparison(NamedTuple):
    """The content of compare.json, and its path."""

    path: Path
    """compare.json; compare.png is beside it."""
    content: Mapping[str, Any]

    @property
    def matched(self) -> list[tuple[int, int]]:
        """The features that are the same one, beyond the null: numbers in the first folder and in the second."""
        pairs = self.content["pairs"]
        return [(a, b) for a, b, is_one in zip(pairs["a"], pairs["b"], pairs["matched"], strict=True) if is_one]


# ---- The files


def result_folder(a: FeatureFolder, b: FeatureFolder, name: str | None) -> Path:
    """Where a comparison goes. Raises FluxIRError for a name that leads elsewhere."""
    name = b.path.resolve().name if name is None else name
    if name in ("", ".", "..") or Path(name).name != name:
        raise FluxIRError(f"--name is the name of one folder: got {name!r}", hint="it is made below compare/")
    return a.path / "compare" / name


def check_same_other(where: Path, known: Mapping[str, Any], b: FeatureFolder) -> None:
    """Raises FluxIRError where `where` holds a comparison with other features, whose folder has the same name."""
    side = known.get("b", {})
    if side.get("scored", b.settings.digest) != b.settings.digest:
        raise FluxIRError(
            f"{where} holds a comparison with another folder {side.get('features')}, of "
            f"{side.get('site') or 'an array'}: {b.path} has other features",
            hint="give this comparison a --name of its own, or delete that one",
        )


def write_content(where: Path, content: Mapping[str, Any]) -> Comparison:
    """Both files. compare.json comes last: where it is, the picture is."""
    _draw(where / PICTURE, content)
    with complete_file(where / RESULT) as beside:
        beside.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return Comparison(where / RESULT, content)


def comparison_digest(a: FeatureFolder, b: FeatureFolder, settings: CompareSettings) -> str:
    """A digest of all that a comparison depends on."""
    return digest_of([VERSION, a.settings.digest, b.settings.digest, asdict(settings)])


# ---- The table


def content_of(
    folders: tuple[FeatureFolder, FeatureFolder],
    streams: tuple[Stream, Stream],
    settings: CompareSettings,
    found: Findings,
) -> dict[str, Any]:
    """All that compare.json holds."""
    pairs, tested = found.pairs, found.tested
    sides = [_side(folders[side], streams[side], found, side) for side in (0, 1)]
    return {
        "version": VERSION,
        "digest": comparison_digest(*folders, settings),
        "a": sides[0],
        "b": sides[1],
        "by": found.by,
        "level": settings.level if found.by == "activations" else None,
        "fdr": settings.fdr,
        "generations": found.generations,
        "settings": asdict(settings),
        "null": {
            "kind": "images permuted" if found.by == "activations" else "random directions of the same covariance",
            "draws": found.null_draws,
            **{f"quantile_{q}": json_number(float(np.quantile(tested.null, q))) for q in (0.5, 0.95, 0.99)},
        },
        "pairs": {
            "a": pairs.row.tolist(),
            "b": pairs.column.tolist(),
            "likeness": _numbers(pairs.score),
            "mutual": pairs.mutual.tolist(),
            "matched": found.matched.tolist(),
            "p": _numbers(tested.p),
            "q": _numbers(tested.q),
        },
        "changes": {
            measure: {name: _numbers(values) for name, values in change._asdict().items()}
            for measure, change in found.changes.items()
        },
        "cka": [
            one._asdict() | {"cka": json_number(one.cka), "permuted": json_number(one.permuted)}
            for one in found.alignments
        ],
    }


def _side(folder: FeatureFolder, stream: Stream, found: Findings, side: int) -> dict[str, str | int | list[int] | None]:
    usable, paired = found.usable[side], (found.pairs.row, found.pairs.column)[side]
    return {
        "features": folder.path.resolve().name,
        "scored": folder.settings.digest,
        "model": folder.settings.model,
        "site": folder.settings.site,
        "stream": stream,
        "steps": list(folder.steps),
        "d_sae": folder.settings.d_sae,
        "compared": len(usable),
        "unmatched": np.setdiff1d(usable, paired[found.matched]).tolist(),
    }


def _numbers(values: NDArray[np.floating[Any]]) -> list[float | str | None]:
    return [json_number(None if math.isnan(value) else float(value)) for value in values]


def _draw(path: Path, content: Mapping[str, Any]) -> None:
    """Each pair by its frequency on the two sides; where generations differ, by its likeness and its rank."""
    pairs, matched = content["pairs"], np.array(content["pairs"]["matched"], np.bool_)
    names = [f"{content[side]['features']}, {content[side]['site'] or 'an array'}" for side in ("a", "b")]
    subtitle = f"{int(matched.sum())} of {content['a']['compared']} features matched by {content['by']}"
    if not content["changes"]:
        order = np.argsort(-np.array(pairs["likeness"]), kind="stable")
        points = np.stack([np.arange(1, len(order) + 1), np.array(pairs["likeness"])[order]], 1)
        groups = [
            ScatterGroup("matched", points[matched[order]]),
            ScatterGroup("paired, and not alike", points[~matched[order]]),
        ]
        scatter(path, groups, f"{names[0]} and {names[1]}", x="features by rank", y="likeness", subtitle=subtitle)
        return
    change = content["changes"]["frequency"]
    points = np.stack([np.array(change["a"]), np.array(change["b"])], 1)
    moved = matched & (np.array(change["q"], np.float64) <= content["fdr"])
    groups = [
        ScatterGroup("paired, and not alike", points[~matched]),
        ScatterGroup("matched", points[matched & ~moved]),
        ScatterGroup("matched, and more or less frequent", points[moved]),
    ]
    scatter(
        path,
        groups,
        "The same features on both sides",
        x=f"share of images active on: {names[0]}",
        y=f"share of images active on: {names[1]}",
        subtitle=subtitle,
        shares=True,
    )
