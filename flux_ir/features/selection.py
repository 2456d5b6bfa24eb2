"""Which features deserve a look: numbers that stages of their own put beside the table, and lists made of them.

`selection.safetensors` has every column for every feature, NaN (or -1) where it was not computed. Columns come in
groups, each with its settings in the file's metadata: a run computes what it is asked for unless it is there for the
same settings, and leaves the other groups as they are. `selection.json` holds the lists, which follow from the columns.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flux_ir.features.folder import FeatureFolder, read_tensors, write_tensors
from flux_ir.files import read_json, write_json
from flux_ir.sites import Stream

FILE, LISTS = "selection.safetensors", "selection.json"

GROUPS: Mapping[str, tuple[str, ...]] = {
    "coherence": ("coherence", "coherence_z", "coherence_p", "coherence_q"),
    "stability": ("stability", "stability_feature"),
    "contrast": ("contrast", "contrast_difference", "contrast_p", "contrast_q"),
    "region": ("region",),
    "steps": ("step_variance",),
    "effect": ("effect", "effect_active"),
}
"""The columns of each group:

coherence, _z, _p, _q     monosemanticity, its z and p against permuted images, and q (Benjamini-Hochberg) over features
stability, _feature       best cosine in another autoencoder, and the number of that feature there
contrast, _difference, _p, _q    mean |delta| x |mean sign| between prompts, mean difference, p and q of the latter
region                    mean activation inside a region minus outside
step_variance             variance over steps of the largest activation, mean over images
effect, effect_active     how far the velocity moves per unit of activation: over all tokens, over those it is active on
"""
_NUMBERS = ("stability_feature",)


class Ranked(NamedTuple):
    """A list of features, best first."""

    name: str
    column: str
    features: list[int]
    values: list[float]
    q: list[float] | None
    """The q-value of each in a list of significant features; None for a list that was not tested."""
    images: list[list[int]] | None = None
    """The images that the list `distinct` gives to each; None for other lists."""


class Selection:
    """The columns that a folder has so far. Raises FluxIRError for a broken file."""

    def __init__(self, folder: FeatureFolder) -> None:
        self.folder, self.groups, self._columns = folder, dict[str, Any](), dict[str, NDArray[Any]]()
        path = folder.path / FILE
        if path.is_file():
            arrays, metadata = read_tensors(path)
            if metadata.get("scores") == folder.settings.digest:  # columns of other scores are computed again
                self.groups = dict(metadata["groups"])
                self._columns = {name: np.array(array) for name, array in arrays.items()}

    def has(self, group: str, settings: Mapping[str, Any]) -> bool:
        """Whether a group has been computed with these settings."""
        return self.groups.get(group) == _as_json(settings)

    def put(
        self, group: str, settings: Mapping[str, Any], columns: Mapping[Stream, Mapping[str, NDArray[Any]]]
    ) -> None:
        """Add a group, and write the file."""
        for stream, named in columns.items():
            for name in GROUPS[group]:
                kind = np.int32 if name in _NUMBERS else np.float32
                self._columns[f"{stream}/{name}"] = np.asarray(named[name], kind)
        self.groups[group] = _as_json(settings)
        self.write()

    def write(self) -> None:
        """Write the columns as they are known now."""
        arrays = {}
        for stream in self.folder.streams:
            for name in (name for names in GROUPS.values() for name in names):
                arrays[f"{stream}/{name}"] = self.column(stream, name)
        metadata = {"scores": self.folder.settings.digest, "groups": dict(sorted(self.groups.items()))}
        write_tensors(self.folder.path / FILE, arrays, metadata)

    def column(self, stream: Stream, name: str) -> NDArray[Any]:
        """One column, [d_sae]."""
        empty = np.full(self.folder.settings.d_sae, -1, np.int32) if name in _NUMBERS else None
        missing = np.full(self.folder.settings.d_sae, np.nan, np.float32) if empty is None else empty
        return self._columns.get(f"{stream}/{name}", missing)


def ranked(
    name: str,
    column: str,
    values: NDArray[np.floating],
    most: int,
    *,
    q: NDArray[np.floating] | None = None,
    significance: float = 0.05,
    chosen: NDArray[np.bool_] | None = None,
) -> Ranked:
    """The features with the largest values, of equals the smaller number first; NaN is in no list.

    With `q` only those whose q is at most `significance`; with `chosen` only these.
    """
    fits = ~np.isnan(values) if chosen is None else ~np.isnan(values) & chosen
    if q is not None and not np.isnan(q).all():
        fits &= np.nan_to_num(q, nan=np.inf) <= significance
    else:
        q = None
    order = np.argsort(-np.where(fits, values, -np.inf), kind="stable")[: min(most, int(fits.sum()))]
    features = order.tolist()
    return Ranked(name, column, features, _floats(values[order]), None if q is None else _floats(q[order]))


def distinct(order: Sequence[int], top: NDArray[np.integer], each: int, most: int) -> tuple[list[int], list[list[int]]]:
    """Features whose examples share no image: in this order, each feature with `each` strong images not yet taken.

    `top` [d_sae, n] are the strongest images of every feature, -1 where there are no more. Gives the features and, for
    each of them, its images.
    """
    used: set[int] = set()
    features, images = list[int](), list[list[int]]()
    for feature in order:
        own = [image for image in top[feature].tolist() if image >= 0 and image not in used][:each]
        if len(own) == each:
            features.append(int(feature))
            images.append(own)
            used.update(own)
        if len(features) == most:
            break
    return features, images


def make_lists(selection: Selection, stream: Stream, *, most: int, significance: float, each: int) -> list[Ranked]:
    """The lists that follow from the columns that are there, without features that are dead on these images.

    `each`: examples of a feature in the list `distinct`.
    """
    groups, alive = selection.groups, selection.folder.table(stream).alive

    def column(name: str) -> NDArray[Any]:
        return selection.column(stream, name)

    lists = []
    if "coherence" in groups:
        q = column("coherence_q")
        lists.append(ranked("coherent", "coherence", column("coherence"), most, q=q, significance=significance))
    if "stability" in groups:
        lists.append(ranked("stable", "stability", column("stability"), most, chosen=alive))
    if "contrast" in groups:
        name, difference, q = groups["contrast"]["name"], column("contrast_difference"), column("contrast_q")
        first, _, second = name.partition(" against ")
        for title, chosen in ((name, difference > 0), (f"{second} against {first}", difference < 0)):
            score = column("contrast")
            lists.append(ranked(title, "contrast", score, most, q=q, significance=significance, chosen=chosen))
    if "region" in groups:
        inside = ",".join(f"{share:g}" for share in groups["region"]["region"])
        lists.append(ranked(f"inside {inside}", "region", column("region"), most, chosen=alive))
    if "steps" in groups:
        lists.append(ranked("changing over steps", "step_variance", column("step_variance"), most, chosen=alive))
    if "effect" in groups:
        lists.append(ranked("of most effect", "effect", column("effect"), most, chosen=alive))
    if "examples" in selection.folder.stages:
        lists.append(_distinct_list(selection, stream, most=most, each=each))
    return lists


def _distinct_list(selection: Selection, stream: Stream, *, most: int, each: int) -> Ranked:
    """The list `distinct`, from the most coherent features on; without coherence, from those of the largest share."""
    coherent = "coherence" in selection.groups and not np.isnan(selection.column(stream, "coherence")).all()
    name = "coherence" if coherent else "share"
    table = selection.folder.table(stream)
    values = np.asarray(selection.column(stream, name) if coherent else table.share, np.float64)
    order = ranked("", name, values, len(values), chosen=table.alive & ~table.means_place).features
    features, images = distinct(order, selection.folder.examples(stream).top, each, most)
    return Ranked("distinct", name, features, _floats(values[features]), None, images)


def write_lists(path: Path, lists: Mapping[Stream, Iterable[Ranked]], settings: Mapping[str, Any]) -> None:
    """Write the lists of every stream, and what the columns they are made of were computed with."""
    described = {stream: [_described(one) for one in some] for stream, some in lists.items()}
    write_json(path / LISTS, {"settings": _as_json(settings), "lists": described})


def _described(one: Ranked) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for row_number, (feature, value) in enumerate(zip(one.features, one.values, strict=True)):
        row: dict[str, Any] = {"feature": feature, "value": value}
        row |= {} if one.q is None else {"q": one.q[row_number]}
        row |= {} if one.images is None else {"images": one.images[row_number]}
        rows.append(row)
    return {"name": one.name, "column": one.column, "tested": one.q is not None, "features": rows}


def read_lists(folder: FeatureFolder, stream: Stream) -> list[Ranked]:
    """The lists that were written last; none where no selection was made."""
    path = folder.path / LISTS
    if not path.is_file():
        return []
    lists = read_json(path, required=("lists",))["lists"].get(stream, [])
    return [
        Ranked(
            one["name"],
            one["column"],
            [row["feature"] for row in one["features"]],
            [row["value"] for row in one["features"]],
            [row["q"] for row in one["features"]] if one["tested"] else None,
            [row["images"] for row in one["features"]] if one["name"] == "distinct" else None,
        )
        for one in lists
    ]


def _floats(values: NDArray[Any]) -> list[float]:
    """Rounded to five digits: lists are read by people, columns by programs."""
    return [float(f"{value:.5g}") for value in values]


def _as_json(settings: Mapping[str, Any]) -> Any:
    """Settings as they come back from a file, keys sorted."""
    return json.loads(json.dumps(settings, sort_keys=True))
