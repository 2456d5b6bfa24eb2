"""What the stages of a folder of features have found, read for the pages. A stage not run yet has no entry here."""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flux_ir.explorer.feature_records import Group, Panels
from flux_ir.features.contents import digest_of
from flux_ir.features.drawings import UNTOUCHED
from flux_ir.features.folder import FeatureFolder
from flux_ir.features.labels import LABELS_FILE
from flux_ir.features.words import STAGE, WORDS_FILE, find_tokenizer, prompt_tokens, read_result
from flux_ir.files import read_json
from flux_ir.sites import Stream
from flux_ir.steering.demonstrations import strip_names

NUMBERS = ("selection.safetensors", "decoder.safetensors")
DRAWS, STEERING = "draws", "steering"
"""Folders of pictures of features, {feature}.png. `draw_features` makes the first, `demonstrate` the second, where
{feature}.json has its numbers (see `steering.demonstrations`)."""

NEEDED = ("feature", "strengths", "scenes", "distance", "score", "control", "above", "above_at")
"""What the page shows of steering/{feature}.json."""


def read_groups(folder: FeatureFolder, stream: Stream) -> list[Group]:
    """The examples of every feature, a group per kind, and of quantiles one for each."""
    examples = folder.examples(stream)
    nowhere = np.zeros_like(examples.silent)
    edges = examples.quantile_edges.astype(np.float64)  # the largest first
    unbounded = np.full((len(edges), 1), np.nan)
    bounds = np.concatenate([unbounded, edges, unbounded], axis=1)
    shares = [
        Group(
            "quantile",
            examples.quantile[:, share],
            examples.quantile_value[:, share],
            examples.quantile_token[:, share],
            examples.quantile_step[:, share],
            low=bounds[:, share + 1],
            high=bounds[:, share],
        )
        for share in range(examples.quantile.shape[1])
    ]
    return [
        Group("top", examples.top, examples.top_value, examples.top_token, examples.top_step),
        *shares,
        Group("random", examples.random, examples.random_value, examples.random_token, examples.random_step),
        Group("silent", examples.silent, examples.silent_value, nowhere, nowhere),
    ]


def read_later(folder: FeatureFolder, stream: Stream) -> dict[str, NDArray[Any]]:
    """Numbers per feature that later stages found, [d_sae] each, by name; what is known of no feature is left out."""
    d_sae, found = folder.settings.d_sae, dict[str, NDArray[Any]]()
    for file in NUMBERS:
        if (folder.path / file).is_file():
            found |= folder.columns(file, stream)
    if labels := _read(folder, LABELS_FILE, stream):
        found["label_score"] = np.full(d_sae, np.nan, np.float32)
        found["label_score"][[row["feature"] for row in labels]] = [row["score"] for row in labels]
    tokens = (_read(folder, WORDS_FILE, stream) or {}).get("tokens") or {}
    found |= {name: np.asarray(tokens[name], np.float32) for name in ("on_end", "on_padding") if name in tokens}
    numbers = {name: array for name, array in found.items() if array.shape == (d_sae,) and array.dtype.kind == "f"}
    return {name: array for name, array in numbers.items() if np.isfinite(array).any()}


def read_panels(folder: FeatureFolder, stream: Stream) -> Panels:
    """What the page of a feature shows beside its pictures."""
    table = folder.table(stream)
    rows: dict[str, Mapping[int, Sequence[Sequence[Any]]]] = {}
    if words := _read(folder, WORDS_FILE, stream):
        texts = words["words"]
        rows["words"] = {
            int(feature): [(texts[word], float(pmi), both) for word, pmi, both, _ in some]
            for feature, some in words["features"].items()
        }
        if tokens := words.get("tokens"):
            strings = tokens["strings"]
            rows["tokens"] = {
                int(feature): [(strings[token], float(mean), fired, of) for token, fired, of, mean in some]
                for feature, some in tokens["features"].items()
            }
    if (folder.path / "decoder.safetensors").is_file():
        columns = folder.columns("decoder.safetensors", stream)
        for name, value in (("nearest", "nearest_cosine"), ("together", "together_jaccard")):
            rows[name] = _Neighbours(columns[name], columns[value])
    if stream == folder.streams[0]:
        if (folder.path / DRAWS).is_dir():
            rows[DRAWS] = _pictures(folder.path / DRAWS)
        if turned := _turned(folder.path / STEERING):
            rows[STEERING] = turned
    labels = {int(row["feature"]): row for row in _read(folder, LABELS_FILE, stream) or []}
    return Panels(table.max_active, table.histogram, table.step_frequency, table.step_mean, rows, labels)


def token_strings(folder: FeatureFolder) -> list[list[str]]:
    """The tokens of the text of every image, up to its end; empty where they are not scored, or have no names here."""
    if "txt" not in folder.streams:
        return []
    asked = folder.stages.get(STAGE, {"settings": {}})["settings"].get("tokenizer")
    tokenizer = find_tokenizer(folder.settings.model, None if asked is None else Path(asked))
    if tokenizer is None:
        return []
    tokens = prompt_tokens(tokenizer, [row.prompt for row in folder.images], folder.settings.tokens["txt"])
    return [[tokens.strings[number] for number in row if number != tokens.padding] for row in tokens.ids.tolist()]


def stages_digest(folder: FeatureFolder) -> str:
    """A digest of all that is read here besides the scores and the examples."""
    files = [folder.path / name for name in (*NUMBERS, WORDS_FILE, LABELS_FILE)]
    digests = [sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in files]
    drawn = sorted(path.name for path in (folder.path / DRAWS).glob("*.png"))
    turned = [[path.name, sha256(path.read_bytes()).hexdigest()] for path in _demonstrations(folder.path / STEERING)]
    return digest_of([digests, [drawn, turned]])


class _Neighbours(Mapping[int, Sequence[Sequence[Any]]]):
    """Other features of each, as rows of a number and how near it is; they stay arrays until they are needed."""

    def __init__(self, feature: NDArray[Any], likeness: NDArray[Any]) -> None:
        self.feature, self.likeness = feature, likeness

    def __getitem__(self, feature: int) -> list[tuple[int, float]]:
        there = self.feature[feature] >= 0
        pairs = zip(self.feature[feature][there].tolist(), self.likeness[feature][there].tolist(), strict=True)
        return [(int(other), float(value)) for other, value in pairs]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.feature)))

    def __len__(self) -> int:
        return len(self.feature)


def _pictures(folder: Path) -> dict[int, list[tuple[str, str]]]:
    """Addresses and captions of what each feature draws."""
    about = "read out by the last layer, and as an icon"
    untouched = [(f"../{folder.name}/{UNTOUCHED}.png", "the empty prompt without it")]
    shown = untouched if (folder / f"{UNTOUCHED}.png").is_file() else []
    return {
        int(path.stem): [(f"../{folder.name}/{path.name}", about), *shown]
        for path in sorted(folder.glob("*.png"))
        if path.stem.isdecimal()
    }


def _demonstrations(folder: Path) -> list[Path]:
    """The numbers of every feature that was turned."""
    return [path for path in sorted(folder.glob("*.json")) if path.stem.isdecimal()]


def _turned(folder: Path) -> dict[int, list[tuple[Any, ...]]]:
    """What turning each feature does: a row per prompt, with its strips, and what is said of the feature."""
    rows: dict[int, list[tuple[Any, ...]]] = {}
    for path in _demonstrations(folder):
        one = read_json(path, required=NEEDED, hint="run flux-ir demonstrate again")
        said = tuple(one[name] for name in ("distance", "score", "control", "above", "above_at"))
        labels = [f"{strength:+g}" if strength else "0" for strength in one["strengths"]]
        rows[int(path.stem)] = [
            (*(f"../{folder.name}/{name}" for name in strip_names(one["feature"], number)), prompt, labels, *said)
            for number, prompt in enumerate(scene["prompt"] for scene in one["scenes"])
        ]
    return rows


def _read(folder: FeatureFolder, file: str, stream: Stream) -> Any:
    """What words.json or labels.json says of a stream; None where there is none."""
    found = read_result(folder, file)
    return None if found is None else found["streams"].get(stream)
