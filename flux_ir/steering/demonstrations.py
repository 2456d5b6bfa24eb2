"""Demonstrations: what turning a feature down and up does, beside the same with a direction that means nothing.

For the strength s, let p and n be the distances of the pictures at s and at -s from the unsteered one. The
responsiveness of a feature is the mean over the strengths above 0 of

    (p + n) / 2 * (1/2 + 1/2 min(p, n) / max(p, n)),

so what changes the picture to one side alone counts half. Random directions that move every token as far have the same
number, and a feature does something of its own only if it is above all of them. Next: `flux_ir.api.demonstrate`.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest

from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, write_json
from flux_ir.steering.folder import SteeringFolder
from flux_ir.steering.table import EDIT, RANDOM, UNSTEERED, Run
from flux_ir.tables import write_rows
from flux_ir.visualize.feature_sheet import FeatureLine, SheetPicture, draw_feature_sheet
from flux_ir.visualize.sheet import MOST_CELL_PX

FOLDER = "steering"
"""Where a folder of features keeps its demonstrations; the pages of features look for them there."""
OVERVIEW_PX, OVERVIEW_FEATURES = 96, 24
DRAWS = 1000
"""The random directions of feature f are those numbered from 1,000 f on: every feature has its own."""

Distance = Literal["lpips", "latent"]
NAMED: Mapping[Distance, str] = {"lpips": "LPIPS", "latent": "latent distance"}


# ---- Which features, at which strengths


def features_in(
    values: NDArray[np.floating[Any]], usable: NDArray[np.bool_], window: tuple[float, float], number: int
) -> list[int]:
    """So many features, evenly spaced by value through a window of percentiles; all of it where it holds fewer.

    Percentiles are those of the features that are `usable`: the others are dead, and would shift them.
    """
    if not usable.any():
        return []
    low, high = np.percentile(values[usable], window)
    inside = np.flatnonzero(usable & (values >= low) & (values <= high))
    ordered = inside[np.argsort(values[inside], kind="stable")]
    places = np.unique(np.linspace(0, len(ordered) - 1, min(number, len(ordered))).round().astype(int))
    return [int(feature) for feature in ordered[places]]


def symmetric(strengths: Sequence[float]) -> tuple[float, ...]:
    """The strengths in order, with 0. Raises FluxIRError unless each has its negative."""
    chosen = {float(strength) + 0.0 for strength in strengths}  # + 0.0: -0 is 0
    if not all(np.isfinite(list(chosen))) or any(-strength not in chosen for strength in chosen) or not chosen - {0.0}:
        raise FluxIRError(
            "strengths go as far down as up, and some are not 0: "
            f"got {', '.join(f'{strength:g}' for strength in strengths) or 'none'}",
            hint="--strength=-4,-2,-1,0,1,2,4",
        )
    return tuple(sorted(chosen | {0.0}))


# ---- What came of it


class Scene(NamedTuple):
    """One feature on one prompt and noise. Distances are from the unsteered picture, in the order of the strengths."""

    prompt: str
    seed: int
    folder: str
    """Of its pictures, below that of the demonstrations."""
    distances: tuple[float, ...]
    random: tuple[tuple[float, ...], ...]
    """The same of every random direction."""

    def responses(self, strengths: Sequence[float]) -> NDArray[np.float64]:
        """[1 + random directions, strengths above 0]: of the feature, then of every random direction."""
        rows = (self.distances, *self.random)
        return np.array([list(responses(strengths, distances).values()) for distances in rows])


class Demonstration(NamedTuple):
    """One feature."""

    feature: int
    maximum: float
    """What a strength of 1 is: its largest activation."""
    strengths: tuple[float, ...]
    """From below 0 to above 0, with 0."""
    distance: Distance
    """What distances are: LPIPS, or |difference| / |unsteered| of the latent."""
    scenes: tuple[Scene, ...]

    @property
    def responses(self) -> NDArray[np.float64]:
        """[1 + random directions, strengths above 0]: the mean over prompts."""
        return np.mean([scene.responses(self.strengths) for scene in self.scenes], axis=0)

    @property
    def score(self) -> float:
        """The responsiveness."""
        return float(self.responses[0].mean())

    @property
    def controls(self) -> list[float]:
        """The same of each random direction."""
        return [float(mean) for mean in self.responses[1:].mean(axis=1)]

    @property
    def control(self) -> float:
        """The mean of the random directions."""
        return float(np.mean(self.controls))

    @property
    def above(self) -> bool:
        """Whether the feature does more than each of its random directions."""
        return self.score > max(self.controls)

    @property
    def above_at(self) -> list[float]:
        """The strengths above 0 for which that holds by itself: very strong edits ruin a picture, whatever they are."""
        own, *random = self.responses
        positive = [strength for strength in self.strengths if strength > 0]
        return [strength for strength, more in zip(positive, own > np.max(random, axis=0), strict=True) if more]

    def to_json(self) -> dict[str, Any]:
        """As JSON can say it."""
        names = ("score", "control", "controls", "above", "above_at")
        return (
            self._asdict()
            | {name: getattr(self, name) for name in names}
            | {"scenes": [scene._asdict() for scene in self.scenes]}
        )


def responses(strengths: Sequence[float], distances: Sequence[float]) -> dict[float, float]:
    """What the mean above is of, by strength. Strengths are symmetric; the one that is 0 does not count."""
    at = dict(zip(strengths, distances, strict=True))
    found = {}
    for strength in strengths:
        if strength > 0:
            p, n = at[strength], at[-strength]
            found[strength] = (p + n) / 2 * (0.5 + 0.5 * min(p, n) / max(p, n)) if max(p, n) > 0 else 0.0
    return found


def scene_of(
    prompt: str, folder: str, runs: Sequence[Run], strengths: Sequence[float], controls: int, distance: Distance
) -> Scene:
    """What the pictures of one scene say."""
    found = {(run.row, run.strength): _distance(run, distance) for run in runs}

    def along(row: str) -> tuple[float, ...]:
        return tuple(found[row, strength] if strength else 0.0 for strength in strengths)

    random = tuple(along(f"{RANDOM}_{number}") for number in range(controls))
    return Scene(prompt, runs[0].seed, folder, along(EDIT), random)


def _distance(run: Run, distance: Distance) -> float:
    if run.price is None:
        return 0.0  # the unsteered picture
    found = run.price.lpips if distance == "lpips" else run.price.latent_inside
    assert found is not None  # it was measured before it is asked for
    return found


def ranked(demonstrations: Sequence[Demonstration]) -> list[Demonstration]:
    """By how far they are above their random directions: the failures come last."""
    return sorted(demonstrations, key=lambda one: (one.control - one.score, one.feature))


class Summary(NamedTuple):
    """How many features do more than random directions, and how many would by chance."""

    features: int
    above: int
    by_chance: float
    """How many of features that do nothing of their own: one out of as many as a feature and its controls are."""
    p: float
    """The probability of as many or more of these by chance (binomial)."""

    @classmethod
    def of(cls, demonstrations: Sequence[Demonstration]) -> "Summary":
        """That of some features with as many random directions each."""
        share = 1 / (1 + len(demonstrations[0].controls))
        above, number = sum(one.above for one in demonstrations), len(demonstrations)
        return cls(number, above, number * share, float(binomtest(above, number, share, alternative="greater").pvalue))

    def sentence(self) -> str:
        """For people."""
        return (
            f"{self.above} of {self.features} features are above their random directions; by chance it would be "
            f"{self.by_chance:g} (p {self.p:.2g})"
        )


# ---- What a person looks at


def draw_strips(path: Path, about: str, demonstration: Demonstration) -> Path:
    """Writes {feature}.png, all prompts with labels, and strips/: a picture per prompt and row, without them.

    `path` is the folder of the demonstrations.
    """
    lines = [line for number in range(len(demonstration.scenes)) for line in _lines(path, demonstration, number, None)]
    sheet = path / f"{demonstration.feature}.png"
    title = f"{about}: feature {demonstration.feature} turned down and up"
    draw_feature_sheet(title, _explained(demonstration.distance), lines, sheet, cell_px=MOST_CELL_PX)
    for number in range(len(demonstration.scenes)):
        for name, strip in zip(strip_names(demonstration.feature, number), (EDIT, f"{RANDOM}_0"), strict=True):
            pictures = _pictures(path, demonstration, number, strip, MOST_CELL_PX)
            width, height = pictures[0].size
            gap = max(1, width // 48)
            whole = Image.new("RGBA", (len(pictures) * (width + gap) - gap, height))
            for place, picture in enumerate(pictures):
                whole.paste(picture, (place * (width + gap), 0))
            encoded = BytesIO()
            whole.save(encoded, format="PNG")
            with complete_file(path / name) as beside:
                beside.write_bytes(encoded.getbuffer())
    return sheet


def strip_names(feature: int, scene: int) -> tuple[str, str]:
    """The feature's own strip and that of a random direction, below the folder of the demonstrations."""
    return f"strips/{feature}_{scene}.png", f"strips/{feature}_{scene}_random.png"


def draw_overview(path: Path, about: str, demonstrations: Sequence[Demonstration]) -> list[Path]:
    """All features in their order, the first prompt of each, on one sheet or as many as it takes."""
    sheets = list[Path]()
    for start in range(0, len(demonstrations), OVERVIEW_FEATURES):
        some = demonstrations[start : start + OVERVIEW_FEATURES]
        lines = [line for one in some for line in _lines(path, one, 0, OVERVIEW_PX)]
        sheets.append(path / (f"overview_{len(sheets) + 1}.png" if sheets else "overview.png"))
        summary = Summary.of(demonstrations)
        title = f"{about}: {summary.above} of {summary.features} features do more than random"
        subtitle = f"by chance {summary.by_chance:g} (p {summary.p:.2g}); {_explained(some[0].distance)}"
        draw_feature_sheet(title, subtitle, lines, sheets[-1], cell_px=OVERVIEW_PX)
    return sheets


def _explained(distance: Distance) -> str:
    return f"strengths in its own maxima; below each picture its {NAMED[distance]} from the unsteered one"


def _lines(path: Path, one: Demonstration, number: int, cell_px: int | None) -> list[FeatureLine]:
    """The feature and a random direction on one prompt. `cell_px` None: as large as a strip."""
    scene, side = one.scenes[number], cell_px or MOST_CELL_PX
    said = "above its random direction" if one.above else "NOT above its random direction"
    said = said if len(one.controls) == 1 else f"{said}s"
    at = "" if len(one.above_at) == len(one.strengths) // 2 else f"above at {_list(one.above_at)}"
    score, control = (f"score {value:.3f}" for value in (one.score, one.control))
    maximum = f"maximum {one.maximum:.3g}"
    prompts = f", {len(one.scenes)} prompts" if len(one.scenes) > 1 else ""
    rows = [
        (f"feature {one.feature}", said, [score + prompts, *([at] if at else []), maximum], EDIT, scene.distances),
        ("random direction", scene.prompt, [control + prompts], f"{RANDOM}_0", scene.random[0]),
    ]
    return [
        FeatureLine(
            name,
            label,
            numbers,
            None,
            [
                SheetPicture(picture, None, label_of(strength) + (f": {distance:.3f}" if strength else ""), "")
                for picture, strength, distance in zip(
                    _pictures(path, one, number, row, side), one.strengths, distances, strict=True
                )
            ],
        )
        for name, label, numbers, row, distances in rows
    ]


def _list(strengths: Sequence[float]) -> str:
    return ", ".join(f"{strength:g}" for strength in strengths) or "no strength"


def label_of(strength: float) -> str:
    """A strength with its sign; the unsteered picture has no strength."""
    return f"{strength:+g}" if strength else "unsteered"


def _pictures(path: Path, one: Demonstration, number: int, row: str, longest_px: int) -> list[Image.Image]:
    scene = one.scenes[number]
    pictures = []
    for strength in one.strengths:
        file = SteeringFolder.picture_in(path / scene.folder, row if strength else UNSTEERED, strength, scene.seed)
        with Image.open(file) as picture:
            whole = picture.convert("RGB")
        whole.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
        pictures.append(whole)
    return pictures


# ---- Numbers


def write_numbers(
    path: Path, settings: Mapping[str, Any], demonstrations: Sequence[Demonstration], versions: Mapping[str, str]
) -> tuple[Path, Path]:
    """demonstrations.json, with everything, and demonstrations.csv, a line per feature; features as they are ranked."""
    numbers, table = path / "demonstrations.json", path / "demonstrations.csv"
    write_json(
        numbers,
        {
            "settings": dict(settings),
            "summary": Summary.of(demonstrations)._asdict(),
            "features": [one.to_json() for one in demonstrations],
            "versions": dict(versions),
        },
    )
    rows = [
        {
            "rank": rank,
            "feature": one.feature,
            "score": one.score,
            "control": one.control,
            "difference": one.score - one.control,
            "above": one.above,
            "above_at": " ".join(f"{strength:g}" for strength in one.above_at),
            "distance": one.distance,
            "maximum": one.maximum,
            "prompts": len(one.scenes),
        }
        for rank, one in enumerate(demonstrations, start=1)
    ]
    write_rows(table, rows)
    return numbers, table
