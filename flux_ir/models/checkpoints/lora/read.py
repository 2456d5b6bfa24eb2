"""A LoRA's file as changes to the weights of one model. Whatever is in it is used, or told, or the file is refused.

A LoRA that fits nothing, and one that fits in part, draw pictures as if nothing had happened: they are errors here.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError, counted
from flux_ir.models.checkpoints.formats.weights import join_weights, read_entries
from flux_ir.models.checkpoints.headers import TensorEntry, read_tensor
from flux_ir.models.checkpoints.hub import Announce
from flux_ir.models.checkpoints.lora import names
from flux_ir.models.checkpoints.lora.changes import Layer, add_product, change
from flux_ir.models.checkpoints.lora.contents import Contents, read_contents
from flux_ir.models.checkpoints.lora.names import PART_NAMES, Part
from flux_ir.models.registry import ModelSpec, get_spec, model_names

Paths = str | Path | Sequence[str | Path] | None
Strengths = float | Sequence[float] | None

_FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_SHOWN = 3


@dataclass(frozen=True)
class LoRA:
    """A file of changes to a model's weights, checked, and how strongly they are made."""

    path: Path
    strength: float
    sha256: str
    """Hex digest of the file."""
    layout: str
    """Whose names the file has, and between what."""
    layers: Mapping[str, Sequence[Layer]] = field(repr=False)
    """By the name of the weight in its network: no two networks of a model have one of the same name."""
    unused: tuple[str, ...] = field(default=(), repr=False)
    """Tensors that change what FLUX.1 does not use of a text encoder."""

    @property
    def all_layers(self) -> list[Layer]:
        """The layers of the file."""
        return [layer for layers in self.layers.values() for layer in layers]

    @property
    def parts(self) -> dict[Part, int]:
        """The networks that are changed, and how many of the layers are theirs."""
        counts = Counter(layer.target.part for layer in self.all_layers)
        return {part: counts[part] for part in PART_NAMES if part in counts}

    @property
    def method(self) -> str:
        """LoRA, LoHa or LoKr, or several of these, with what they are turned to by norms of their own."""
        found = {
            ("DoRA" if layer.method == "LoRA" else f"{layer.method} with DoRA") if layer.is_dora else layer.method
            for layer in self.all_layers
        }
        return " and ".join(sorted(found))

    @property
    def ranks(self) -> dict[int, int]:
        """How many layers have which rank."""
        return dict(sorted(Counter(layer.rank for layer in self.all_layers if layer.rank is not None).items()))

    @property
    def scales(self) -> list[float]:
        """What the products are multiplied with at strength 1: alpha / rank."""
        return sorted({layer.scale for layer in self.all_layers})

    def __str__(self) -> str:
        ranks = "/".join(map(str, self.ranks))
        rank = f" of rank {ranks}" if ranks else ""
        return f"{self.method}{rank}, {self.told_layers()} ({self.layout}), strength {self.strength:g}"

    def told_layers(self) -> str:
        """How many layers it has, and of which networks if not of the transformer alone."""
        if set(self.parts) == {"transformer"}:
            return counted(len(self.all_layers), "layer")
        told = [f"{counted(count, 'layer')} of {PART_NAMES[part]}" for part, count in self.parts.items()]
        return " and ".join(told) if len(told) < 3 else f"{', '.join(told[:-1])} and {told[-1]}"

    def notes(self) -> list[str]:
        """What of the file has no effect, in sentences."""
        if not self.unused:
            return []
        return [
            f"{self.path.name} also changes parts of text encoders that FLUX.1 does not use "
            f"({counted(len(self.unused), 'tensor')}, {_listed(self.unused)}): they have no effect"
        ]

    def to_json(self) -> dict[str, Any]:
        """What a result says about the LoRA it was made with."""
        return {"path": str(self.path.absolute()), "sha256": self.sha256, "strength": self.strength}


def merge(weight: Tensor, name: str, loras: Sequence[LoRA]) -> None:
    """Add the changes that LoRAs make to one weight of a network, float32 on the CPU, in their order."""
    changing = [(lora, layer) for lora in loras if lora.strength for layer in lora.layers.get(name, ())]
    # Before anything is added: norms of a DoRA are those of the weight as it was.
    wholes = [None if layer.is_plain else change(layer, weight[layer.target.rows]) for _, layer in changing]
    for (lora, layer), whole in zip(changing, wholes, strict=True):
        rows = weight[layer.target.rows]
        if whole is None:
            add_product(layer, rows, lora.strength)
        else:
            rows += whole if lora.strength == 1 else whole.mul_(lora.strength)


def changes_of(name: str, loras: Sequence[LoRA]) -> bool:
    """Whether a weight of this name is changed by any of them."""
    return any(lora.strength and name in lora.layers for lora in loras)


def merged_into(target: Tensor, name: str, loras: Sequence[LoRA], fill: Callable[[Tensor], None]) -> None:
    """Fill `target`, on its device and in its dtype, with the weight of this name with its changes.

    `fill` fills a tensor with the weight as it is in its file. Without changes it is given the target itself.
    """
    if not changes_of(name, loras):
        fill(target)
        return
    merged = target
    if target.dtype != torch.float32 or target.device.type != "cpu":
        merged = torch.empty(target.shape, dtype=torch.float32)
    fill(merged)
    merge(merged, name, loras)
    if merged is not target:
        target.copy_(merged)  # the only rounding


def read_loras(
    spec: ModelSpec, paths: Paths, strengths: Strengths = None, announce: Announce | None = None
) -> tuple[LoRA, ...]:
    """One LoRA or several, each with its own strength, or all with the same one (None: 1).

    `announce` is told of each, and of what in it has no effect. Raises FluxIRError for what `read_lora` refuses, for
    other numbers of strengths, and for a file that is named twice.
    """
    named = [paths] if isinstance(paths, str | Path) else list(paths or ())
    if not named and strengths is not None:
        raise FluxIRError("--lora_strength is that of a LoRA: got no --lora", hint="name its file with --lora")
    own = list(strengths) if isinstance(strengths, Sequence) else [1.0 if strengths is None else strengths] * len(named)
    own = own * len(named) if len(own) == 1 else own
    if len(own) != len(named):
        raise FluxIRError(
            f"--lora_strength must be one number, or one for each LoRA: got {len(own)} for {len(named)}",
            hint="give as many as --lora has files",
        )
    loras = tuple(read_lora(path, spec, strength=strength) for path, strength in zip(named, own, strict=True))
    for number, lora in enumerate(loras):
        if any(lora.sha256 == other.sha256 for other in loras[:number]):
            raise FluxIRError(f"--lora names the same file twice: {lora.path}", hint="name it once, more strongly")
        for line in (f"LoRA: {lora.path}: {lora}", *(f"note: {note}" for note in lora.notes())):
            if announce is not None:
                announce(line)
    return loras


def read_lora(path: str | Path, spec: ModelSpec, *, strength: float = 1.0) -> LoRA:
    """The LoRA in a file, or in a folder of PEFT or diffusers, for the transformer and the text encoders of a model.

    Raises FluxIRError for a file that is broken or something else, that is of another model, of which a part fits
    nothing, and for what is not read (`names.refusal`).
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
        raise FluxIRError(f"--lora_strength must be a finite number: got {strength!r}", hint="1 is as it was trained")
    file = lora_file(path)
    stored = _plain(file)
    contents = read_contents(file, stored, spec)
    if isinstance(contents, FluxIRError) or contents.unknown or not contents.layers:
        raise _unfit(file, spec, stored, contents)
    _check_values(file, contents)
    layers: dict[str, list[Layer]] = {}
    for layer in contents.layers:
        layers.setdefault(layer.target.weight, []).append(layer)
    return LoRA(file, float(strength), _digest(file), contents.layout, layers, tuple(contents.unused))


def check_recorded(lora: Mapping[str, Any]) -> None:
    """Raises FluxIRError if the LoRA that a run was made with is not where it was, or is another file by now."""
    path, again = (
        Path(lora["path"]),
        "put it back, or name the file with --lora and --lora_strength where there are these",
    )
    if not path.is_file():
        raise FluxIRError(f"the run was made with the LoRA {path}, which is not there", hint=again)
    if (found := _digest(path)) != lora["sha256"]:
        raise FluxIRError(
            f"{path} is another file than the LoRA that the run was made with: its sha256 is {found[:12]}..., not "
            f"{lora['sha256'][:12]}...",
            hint=again,
        )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def lora_file(path: str | Path) -> Path:
    """The file that a path stands for: itself, or the one in a folder. Raises FluxIRError if there is none."""
    named = Path(path).expanduser()
    if not str(path) or not named.exists():
        raise FluxIRError(
            f"--lora must name a file or a folder that exists: got {str(path)!r}", hint="correct the path"
        )
    if named.is_file():
        return named
    usual = [named / name for name in _FOLDER_FILES if (named / name).is_file()]
    files = usual[:1] or sorted(named.glob("*.safetensors"))
    if len(files) != 1:
        held = ", ".join(file.name for file in files[:_SHOWN])
        problem = f"{len(files)} that it may be ({held})" if files else "none"
        raise FluxIRError(
            f"--lora must lead to one .safetensors file: the folder {named} has {problem}", hint="name the file itself"
        )
    return files[0]


def _plain(file: Path) -> dict[str, TensorEntry]:
    stored = join_weights(read_entries(file), str(file), hint="take the LoRA in bfloat16, float16 or float32")
    if not stored:
        raise FluxIRError(f"{file} holds no tensors", hint="download it again")
    return stored


def _check_values(file: Path, contents: Contents) -> None:
    for layer in contents.layers:
        for leaf, entry in layer.tensors.items():
            if not torch.isfinite(read_tensor(entry).to(torch.float32)).all():
                raise FluxIRError(
                    f"{file} has values that are no numbers (NaN or infinite): {leaf} of {layer.name}",
                    hint="its training went wrong, or the file is damaged: take another one",
                )


def _unfit(
    file: Path, spec: ModelSpec, stored: Mapping[str, TensorEntry], contents: Contents | FluxIRError
) -> FluxIRError:
    """Why a file is no LoRA of a model, and what it is instead."""
    if control := _control_channels(stored, spec):
        return FluxIRError(
            f"{file} is one of BFL's control LoRAs (Canny, Depth): it widens img_in from {spec.flux.in_channels} to "
            f"{control} channels for a control picture, which {spec.name} does not take",
            hint="take a LoRA that changes only what the model draws",
        )
    own = [name for name in stored if not names.is_of_a_text_encoder(name)]
    if family := names.other_family(own):
        return FluxIRError(f"{file} is a LoRA of {family}, and {spec.name} is FLUX.1", hint="take a LoRA of FLUX.1")
    if not names.is_adapter(stored):
        return FluxIRError(
            f"{file} is no LoRA: it has {_listed(list(stored))}", hint="whole networks are passed with --checkpoint"
        )
    fits = [name for name in fitting_models(file, stored) if name != spec.name]
    elsewhere = f"it fits {' or '.join(fits)}" if fits else "flux-ir weights FILE says what a file is"
    if isinstance(contents, FluxIRError):
        return FluxIRError(
            f"{file} is no LoRA of {spec.name}: {contents.message}", hint=elsewhere if fits else contents.hint
        )
    if what := names.refusal(contents.unknown):
        return FluxIRError(
            f"{file} holds {what}, and only LoRA, DoRA, LoKr and LoHa of linear layers are read: "
            f"{_listed(contents.unknown)}",
            hint="take another file",
        )
    if not contents.unknown:
        return FluxIRError(
            f"{file} changes nothing that FLUX.1 uses of its text encoders: it has {_listed(contents.unused)}",
            hint="take another file",
        )
    matched = len(stored) - len(contents.unknown) - len(contents.unused)
    some = "none" if not matched else f"only {matched}"
    return FluxIRError(
        f"{some} of the {len(stored)} tensors in {file} fit a layer of {spec.name}: without one are "
        f"{len(contents.unknown)}, {_listed(contents.unknown)}",
        hint=elsewhere,
    )


def fitting_models(file: Path, stored: Mapping[str, TensorEntry]) -> list[str]:
    """The models for which every tensor of the file has a layer, of its shape."""
    fits = []
    for name in model_names():
        try:
            contents = read_contents(file, stored, get_spec(name))
        except FluxIRError:  # a packaged model whose files are not there
            continue
        if isinstance(contents, Contents) and contents.layers and not contents.unknown:
            fits.append(name)
    return fits


def _control_channels(stored: Mapping[str, TensorEntry], spec: ModelSpec) -> int | None:
    """The input channels of a LoRA that gives the network more of them."""
    for name, entry in stored.items():
        apart = names.taken_apart(name)
        if apart and apart.leaf == "down" and apart.layer.endswith(("img_in", "x_embedder")) and len(entry.shape) == 2:
            return entry.shape[1] if entry.shape[1] in (2 * spec.flux.in_channels, 6 * spec.flux.in_channels) else None
    return None


def _listed(found: Sequence[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
