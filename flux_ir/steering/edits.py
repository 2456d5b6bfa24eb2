"""What is to be changed: one `Edit` says a kind, a direction, a strength, and where and when it holds. Plain data.

    Edit(sae="saes/mine", feature=12, strength=2.0)                       adds twice the feature's own maximum
    Edit(kind="scale", sae="saes/mine", feature=(12, 7), strength=0.0)    takes both out of every token
    Edit(vector="red.safetensors", sites="double.*.img", strength=0.5, unit="norm")

An edit of features is x + (z' - z) W_dec: the code z becomes z', and what the autoencoder does not explain stays in x,
once. Files of edits are JSON, and what they name is found beside them. Next: `apply`, which does it.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import save_file
from torch import Tensor

from flux_ir.errors import FluxIRError, nearest
from flux_ir.files import complete_file, read_json, write_json
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sites import SiteNames, site_names
from flux_ir.steering.regions import Region, region_of

EditKind = Literal["add", "scale", "clamp", "set", "ablate", "replace"]
Unit = Literal["max", "mean", "norm", "raw"]
Gate = Literal["all", "active"]

NEUTRAL: dict[EditKind, float | None] = {
    "add": 0.0,
    "scale": 1.0,
    "clamp": 0.0,
    "set": None,
    "ablate": None,
    "replace": None,
}
"""The strength of each kind that changes nothing, to the bit; None: there is none."""

POOLED = "clip.pooled"
"""CLIP's vector of the whole prompt: no site, for it modulates every block, but edits may name it as one."""

FORMAT = 1
_FILE_FIELDS = ("sae", "vector")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change of what the model computes. Raises FluxIRError for settings that contradict each other.

    Kinds, for a feature with activation z, strength s and unit u: `add` z + s u; `scale` s z; `clamp` max(z, s u);
    `set` s u; `ablate` 0; `replace` s u with every other feature at 0. A vector v counts as a feature with z the
    length of x along v; it may be negative.
    """

    kind: EditKind = "add"
    sae: str | Path | SparseAutoencoder | None = None
    """The autoencoder whose features are meant: its folder, or as it is loaded."""
    feature: int | Sequence[int] = ()
    prompt: str | None = None
    """A steering prompt: its code, the mean over its tokens, is added (kind `add` alone), in units of itself."""
    vector: str | Path | Tensor | None = None
    """A direction [d], or one per step [steps, d]: a tensor, or a .safetensors file (`FILE:NAME` if it has several)."""
    sites: SiteNames | None = None
    """Where; patterns are allowed. None: the site that the autoencoder was trained on."""
    strength: float | Sequence[float] = 1.0
    """One, or one per feature, in units of `unit`; ablate takes none."""
    unit: Unit | None = None
    """max, mean: the feature's own largest activation, or its mean when active, as its autoencoder's folder says; norm:
    the mean length of the site's tokens at that step; raw: 1. None: max for features, norm for vectors."""
    gate: Gate | float = "all"
    """Which tokens of the region: all; those on which the feature is active; or, a number, those above it in units."""
    region: Region | None = None
    """None: all tokens of the site."""
    steps: Sequence[int] | None = None
    """Sampler steps, from 0; None: all."""
    schedule: Sequence[float] | None = None
    """What the change is multiplied by, one number per step; None: 1."""
    weights: Literal["presence"] | float | Sequence[float] | None = None
    """What the change is multiplied by, one number for all sites or one per site; presence: in proportion to the mean
    cosine of the direction with the site's tokens, measured in an unsteered run, 1 in all. None: 1."""

    def __post_init__(self) -> None:
        for name, value in _checked(vars(self)).items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        self._check_direction()
        self._check_amount()

    def _check_direction(self) -> None:
        given = [name for name in ("feature", "prompt", "vector") if getattr(self, name) not in (None, ())]
        pooled = self.sites == (POOLED,)
        if len(given) != 1 and not (pooled and not given and self.kind in ("scale", "ablate")):
            raise FluxIRError(
                f"an edit is of features, of a steering prompt or of a vector: got {' and '.join(given) or 'none'}",
                hint="--sae FOLDER --feature 12 edits one feature",
            )
        if (self.sae is None) != (given in (["vector"], [])):
            raise FluxIRError(
                "features and steering prompts need the autoencoder they are of, and vectors need none: "
                f"got sae={self.sae} with {given[0] if given else 'nothing'}",
                hint="--sae FOLDER names it",
            )
        if given != ["feature"] and self.sites is None and self.sae is None:
            raise FluxIRError("a vector is of no site by itself", hint="--sites double.3.img says where to add it")
        if pooled and given not in ([], ["vector"]):
            raise FluxIRError(
                f"{POOLED} can be scaled, ablated or given a vector: got {given[0]}", hint="leave out --sae"
            )
        if pooled and (self.region is not None or self.steps is not None or self.schedule is not None):
            raise FluxIRError(
                f"{POOLED} is one vector for the whole run: it has no region and no steps",
                hint="leave out --region, --steps and --schedule",
            )
        allowed = {"prompt": ("add",), "vector": ("add", "scale", "clamp", "set", "ablate")}
        if given and self.kind not in allowed.get(given[0], (self.kind,)):
            raise FluxIRError(
                f"a {'steering prompt' if given[0] == 'prompt' else 'vector'} takes the kinds "
                f"{', '.join(allowed[given[0]])}: got {self.kind}",
                hint="edit features for the others",
            )

    def _check_amount(self) -> None:
        if not all(math.isfinite(number) for number in self.strengths):
            raise FluxIRError(f"a strength is a finite number: got {self.strength}", hint="try 1, the unit itself")
        if len(self.strengths) not in (1, len(self.feature)):  # type: ignore[arg-type]  # a tuple by now
            raise FluxIRError(
                f"several features take one strength, or one each: got {len(self.feature)} features and "  # type: ignore[arg-type]
                f"{len(self.strengths)} strengths",
                hint="give one strength, or as many as features",
            )
        if self.vector is not None and self.unit in ("max", "mean"):
            raise FluxIRError(
                f"a vector has no activations of its own to measure strengths by: got --unit {self.unit}",
                hint="norm is the mean length of the site's tokens, raw the vector as it is",
            )
        if self.kind == "clamp" and min(self.strengths) < 0 and self.vector is None:
            raise FluxIRError(
                f"clamp keeps a feature from falling below the strength, and none is below 0: got {self.strength}",
                hint="0 is neutral; scale or ablate make a feature weaker",
            )

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strength, or that of each feature."""
        return (float(self.strength),) if isinstance(self.strength, int | float) else tuple(self.strength)

    @property
    def is_neutral(self) -> bool:
        """Whether it changes nothing, whatever it meets."""
        return NEUTRAL[self.kind] is not None and all(number == NEUTRAL[self.kind] for number in self.strengths)

    @property
    def units(self) -> Unit:
        """The unit, also where it was left open."""
        return self.unit or ("norm" if self.vector is not None else "max")

    def at(self, strength: float | Sequence[float]) -> "Edit":
        """The same edit with another strength."""
        return replace(self, strength=strength)

    def to_json(self) -> dict[str, Any]:
        """Its fields that are given, as JSON can say them. Raises FluxIRError for what has no file yet."""
        if isinstance(self.vector, Tensor) or isinstance(self.sae, SparseAutoencoder):
            raise FluxIRError(
                "a file of edits names vectors and autoencoders by their files: this one is in memory alone",
                hint="export_sae writes an autoencoder, save_edits a vector",
            )
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        plain = {name: value for name, value in values.items() if name == "kind" or value != defaults[name]}
        if self.region is not None:
            plain["region"] = self.region.to_json()
        return {
            name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            for name, value in plain.items()
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Edit":
        """The edit of what `to_json` gave. Raises FluxIRError for fields that there are not."""
        known = [field.name for field in fields(cls)]
        for name in stored:
            if name not in known:
                near = nearest(name, known)
                raise FluxIRError(
                    f"an edit has no field {name!r}",
                    hint=f"did you mean {near}?" if near else f"its fields are {', '.join(known)}",
                )
        return cls(**_checked(stored))


def read_edits(path: str | Path) -> tuple[Edit, ...]:
    """The edits of a JSON file, in the order in which they hold. Files they name are found from its folder.

    Raises FluxIRError for a file that cannot be read or holds something else.
    """
    path = Path(path)
    stored = read_json(path, hint="flux-ir steer writes such a file, edit.json")
    if not isinstance(stored.get("edits"), list) or not stored["edits"]:
        raise FluxIRError(
            f'{path} must hold {{"format": {FORMAT}, "edits": [...]}} with one edit at least',
            hint="flux-ir steer writes such a file, edit.json",
        )
    if stored.get("format") != FORMAT:
        raise FluxIRError(
            f"{path} must have the format {FORMAT}: got {stored.get('format')!r}",
            hint="a newer flux_ir may have written it",
        )
    return tuple(Edit.from_json(_with_files(edit, lambda name: str(path.parent / name))) for edit in stored["edits"])


def as_edits(given: "str | Path | Edit | Sequence[Edit]") -> tuple[Edit, ...]:
    """Edits as people give them: one, several, or their file."""
    if isinstance(given, Edit):
        return (given,)
    return read_edits(given) if isinstance(given, str | Path) else tuple(given)


def save_edits(edits: Iterable[Edit], path: str | Path) -> None:
    """Write edits as JSON; vectors that are tensors go to .safetensors files beside it, under the same name."""
    path = Path(path)
    stored = []
    for number, edit in enumerate(edits):
        if isinstance(edit.vector, Tensor):
            file = path.with_name(f"{path.stem}_vector_{number}.safetensors")
            with complete_file(file) as beside:
                save_file({"vector": edit.vector.detach().float().cpu().contiguous()}, beside)
            edit = replace(edit, vector=file)
        relative = _with_files(edit.to_json(), lambda name: os.path.relpath(name, path.parent))
        stored.append(relative)
    write_json(path, {"format": FORMAT, "edits": stored})


def _with_files(stored: object, moved: Callable[[str], str]) -> dict[str, Any]:
    """The same with every file it names passed through `moved`."""
    if not isinstance(stored, Mapping):
        raise FluxIRError(f"an edit is an object with fields: got {stored!r}", hint="flux-ir steer writes edit.json")
    new = {name: moved(value) if name in _FILE_FIELDS else value for name, value in stored.items()}
    if isinstance(region := new.get("region"), Mapping):
        new["region"] = {name: moved(v) if name in ("image", "map") else v for name, v in region.items()}
    return new


_WORDS: dict[str, tuple[str, ...]] = {"kind": get_args(EditKind), "unit": get_args(Unit), "gate": get_args(Gate)}
_NUMBERS: dict[str, type] = {"feature": int, "steps": int, "schedule": float, "weights": float, "strength": float}


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with tuples for what JSON has as lists and people as one number.

    Raises FluxIRError for a word there is not, and for what is no number.
    """
    values = dict(given)
    for name, words in (_WORDS | {"weights": ("presence",)}).items():
        if isinstance(values.get(name), str):
            _check_word(name, values[name], words)
    for name, kind in _NUMBERS.items():
        value = values.get(name)
        if value is not None and not (name == "weights" and isinstance(value, str)):
            numbers = _numbers(name, value, kind)
            values[name] = numbers[0] if name == "strength" and not isinstance(value, Iterable) else numbers
    if values.get("sites") is not None:
        values["sites"] = site_names(values["sites"])
    if "region" in values:
        values["region"] = region_of(values["region"])
    return values


def _numbers(name: str, given: Any, kind: type) -> tuple[Any, ...]:
    """One number or several as a tuple. Raises FluxIRError for anything else."""
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    types = (int,) if kind is int else (int, float)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, types):
            raise FluxIRError(
                f"--{name} must be {'whole numbers' if kind is int else 'numbers'}: got {value!r}",
                hint="write them with commas between, such as 1,2",
            )
    return tuple(kind(value) for value in values)


def _check_word(name: str, word: str, words: Sequence[str]) -> None:
    if word not in words:
        near = nearest(word, words)
        raise FluxIRError(
            f"--{name} must be one of {', '.join(words)}: got {word!r}",
            hint=f"did you mean {near}?" if near else f"leave it out, or pass {words[0]}",
        )
