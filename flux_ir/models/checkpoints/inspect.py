"""What a weight file holds, and whether it is what a model needs: all of it from headers, before anything is loaded.

Next: `locate`, which decides which file to look at, and `load`, which loads what passed here.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json
from flux_ir.models.architecture import AnyTransformer, autoencoder_of, transformer_of
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints import variants
from flux_ir.models.checkpoints.formats.refused import READABLE
from flux_ir.models.checkpoints.formats.weights import (
    join_weights,
    read_entries,
    refuse_unreadable,
    stored_as,
    weight_names,
)
from flux_ir.models.checkpoints.headers import TensorEntry
from flux_ir.models.checkpoints.keymap import Parts, diffusers_parts
from flux_ir.models.checkpoints.paths import RECORDED
from flux_ir.models.flux2.transformer import Flux2Params
from flux_ir.models.registry import MODELS, ModelSpec

Part = Literal["transformer", "autoencoder"]
Layout = Literal["bfl", "diffusers"]

# A tensor that every file of this part and layout has.
_MARKS: dict[tuple[Part, Layout], str] = {
    ("transformer", "bfl"): "img_in.weight",
    ("transformer", "diffusers"): "x_embedder.weight",
    ("autoencoder", "bfl"): "encoder.down.0.block.0.conv1.weight",
    ("autoencoder", "diffusers"): "encoder.down_blocks.0.resnets.0.conv1.weight",
}
_GUIDANCE_MARKS: dict[Layout, str] = {
    "bfl": "guidance_in.in_layer.weight",
    # Behind "time_text_" in FLUX.1, behind "time_guidance_" in FLUX.2.
    "diffusers": "embed.guidance_embedder.linear_1.weight",
}
_FLUX2_MARK = "double_stream_modulation_img."  # what FLUX.2's transformer has beside the marks of FLUX.1's
# Files that hold several networks put a prefix before the names of each.
_PREFIXES: dict[Part, tuple[str, ...]] = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model."),
    "autoencoder": ("", "vae.", "first_stage_model."),
}
_ALL_PREFIXES = (*_PREFIXES["transformer"][1:], *_PREFIXES["autoencoder"][1:], "text_encoders.", "cond_stage_model.")
# Other transformers, by the start of a name that only they have (after any prefix). Some have all of FLUX's marks too.
_OTHER_TRANSFORMERS = {
    "distilled_guidance_layer.": "Chroma, which was made of FLUX.1 and is built otherwise",
    "txt_in.individual_token_refiner.": "HunyuanVideo",
    "joint_blocks.": "Stable Diffusion 3",
    "pos_embed.proj.": "Stable Diffusion 3 or a transformer like it",
    "input_blocks.": "Stable Diffusion or SDXL",
    "down_blocks.0.attentions.": "Stable Diffusion or SDXL",
}
# Networks that are added to another one, by parts of their names.
_ADAPTERS = {
    "lora": "a LoRA",
    "lokr_": "a LoKr",
    "hada_": "a LoHa",
    "oft_": "an OFT adapter",
    "ia3_": "an IA3 adapter",
    "controlnet": "a ControlNet",
    "dora_scale": "a DoRA",
}
_LATENTS = {4: "as those of Stable Diffusion and SDXL have", 32: "as those of FLUX.2 have"}
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class WeightSource:
    """Weights that were found and fit their model. `origin` says what led to them: a flag, a variable, hub, package."""

    part: Part
    path: Path
    layout: Layout
    origin: str
    entries: Mapping[str, TensorEntry] = field(repr=False)
    """Every weight of the network by its name in this layout, without prefix: its shape, and how it becomes numbers."""

    @property
    def nbytes(self) -> int:
        """Bytes that loading will read."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def stored_as(self) -> dict[str, int]:
        """How many weights are stored as what, for those that become wider when they are loaded."""
        return stored_as(self.entries)


def blank_network(spec: ModelSpec, part: Part) -> AnyTransformer | AutoEncoder:
    """The network on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return transformer_of(spec.flux) if part == "transformer" else autoencoder_of(spec.autoencoder)


def layout_parts(layout: Layout, network: AnyTransformer | AutoEncoder) -> dict[str, Parts]:
    """For each tensor of the network, the names it has in a file of this layout."""
    names = network.state_dict()
    return {name: Parts((name,)) for name in names} if layout == "bfl" else diffusers_parts(names, network.params)


def inspect(spec: ModelSpec, part: Part, path: Path, origin: str) -> WeightSource:
    """The file (or index of shards) as a source of this part of the model, if every name and shape fits.

    Raises FluxIRError saying what the file is instead: broken, of another part, another model, incomplete.
    """
    stored = read_entries(path)
    found = layout_and_prefix(part, stored)
    hint = f"{_remedy(spec, origin)}, in {READABLE}"
    if found is None:
        refuse_unreadable(stored, _named(path, origin), hint=hint)
        raise _wrong_part(spec, part, path, origin, stored)
    _check_other_transformer(spec, part, path, origin, stored)
    layout, prefix = found
    own = {
        name.removeprefix(prefix): entry
        for name, entry in stored.items()
        if (prefix and name.startswith(prefix)) or not name.startswith(_ALL_PREFIXES)
    }
    source = WeightSource(part, path, layout, origin, join_weights(own, _named(path, origin), hint=hint))
    if part == "transformer":
        _check_family(spec, source)
    else:
        _check_autoencoder_config(spec, source)
    _check_tensors(spec, source)
    return source


def holds(part: Part, path: Path) -> bool:
    """Whether the file (or index of shards) has this part of a FLUX model among what it holds."""
    return layout_and_prefix(part, read_entries(path)) is not None


def _check_other_transformer(spec: ModelSpec, part: Part, path: Path, origin: str, names: Iterable[str]) -> None:
    """Raises FluxIRError for a file with another model's transformer, whichever part was asked for.

    The autoencoder of Stable Diffusion 3 has the names and shapes of FLUX's and other factors: only the transformer in
    the same file, or a config.json, tells them apart.
    """
    other = other_transformer(names)
    own = isinstance(spec.flux, Flux2Params)
    if other is None and layout_and_prefix("transformer", names) and is_flux2(names) != own:
        other = "FLUX.1" if own else "FLUX.2"
    if other is not None:
        raise FluxIRError(
            f"{_named(path, origin)} must hold the {part} of {spec.name}: it holds that of {other}",
            hint=_remedy(spec, origin),
        )


def other_transformer(names: Iterable[str]) -> str | None:
    """The model that has a transformer with such names, if it is another one than FLUX.1 and FLUX.2."""
    names = list(names)
    return next((other for mark, other in _OTHER_TRANSFORMERS.items() if _any_begins(names, mark)), None)


def is_flux2(names: Iterable[str]) -> bool:
    """Whether such names are of FLUX.2's transformer."""
    return _any_begins(names, _FLUX2_MARK)


def _any_begins(names: Iterable[str], mark: str) -> bool:
    starts = tuple(prefix + mark for prefix in _PREFIXES["transformer"])
    return any(name.startswith(starts) for name in names)


def layout_and_prefix(part: Part, names: Iterable[str]) -> tuple[Layout, str] | None:
    """How a file with such names has this part of a FLUX model; None: it does not have it."""
    present = weight_names(names)
    for (marked, layout), mark in _MARKS.items():
        for prefix in _PREFIXES[part]:
            if marked == part and prefix + mark in present:
                return layout, prefix
    return None


class _Family(NamedTuple):
    """What tells one transformer from another at a glance."""

    guidance: bool
    img_channels: int
    hidden_size: int


def _family_in_file(source: WeightSource) -> _Family:
    shape = source.entries[_MARKS["transformer", source.layout]].shape
    guidance = any(name.endswith(_GUIDANCE_MARKS[source.layout]) for name in source.entries)
    return _Family(guidance, shape[-1], shape[0])


def _family_of_spec(spec: ModelSpec) -> _Family:
    return _Family(spec.flux.guidance_embed, spec.flux.in_channels, spec.flux.hidden_size)


def _check_family(spec: ModelSpec, source: WeightSource) -> None:
    found, wanted = _family_in_file(source), _family_of_spec(spec)
    if found == wanted:
        return
    variant = variants.of_channels(found.img_channels) if found.img_channels != wanted.img_channels else None
    if variant is not None:
        raise FluxIRError(
            f"{_named(source.path, source.origin)} is not {spec.name}: it is {variant.name} "
            f"({found.img_channels} latent channels, not {wanted.img_channels})",
            hint=f"use {variant.instead}",
        )
    if found.hidden_size != wanted.hidden_size:
        reason = f"its hidden size is {found.hidden_size}, not {wanted.hidden_size}"
    elif found.img_channels != wanted.img_channels:
        reason = f"it takes {found.img_channels} latent channels, not {wanted.img_channels}"
    elif found.guidance:
        reason = "it has guidance_in, as only the guidance-distilled dev family has"
    else:
        reason = "it lacks guidance_in, which the guidance-distilled dev family has"
    alike = [other.name for other in MODELS.values() if _family_of_spec(other) == found]
    looks_like = f"; it looks like {' or '.join(alike)}" if alike else ""
    raise FluxIRError(
        f"{_named(source.path, source.origin)} is not {spec.name}: {reason}{looks_like}",
        hint=" or ".join([*(f"--model {name}" for name in alike), _remedy(spec, source.origin)]),
    )


def _check_autoencoder_config(spec: ModelSpec, source: WeightSource) -> None:
    """Other families' autoencoders have the same tensors and other factors: they would decode to wrong colours."""
    entry = source.entries.get("decoder.conv_in.weight")
    channels = None if entry is None or len(entry.shape) != 4 else entry.shape[1]
    if channels not in (None, spec.autoencoder.z_channels):
        note = f" ({_LATENTS[channels]})" if channels in _LATENTS else ""
        raise FluxIRError(
            f"{_named(source.path, source.origin)} is not the autoencoder of {spec.name}: "
            f"its latents have {channels} channels, not {spec.autoencoder.z_channels}{note}",
            hint=_remedy(spec, source.origin),
        )
    config = source.path.with_name("config.json")
    if source.layout != "diffusers" or not config.is_file():
        return
    stored = read_json(config)
    params = spec.autoencoder
    wanted = {
        "scaling_factor": params.scale_factor,
        "shift_factor": params.shift_factor,
        "norm_num_groups": params.norm_groups,
    }
    for key, value in wanted.items():
        if stored.get(key) is not None and not math.isclose(stored[key], value, rel_tol=1e-6):
            raise FluxIRError(
                f"{_named(source.path, source.origin)} is not the autoencoder of {spec.name}: "
                f"its {key} is {stored[key]}, not {value}",
                hint=_remedy(spec, source.origin),
            )


def _check_tensors(spec: ModelSpec, source: WeightSource) -> None:
    network = blank_network(spec, source.part)
    parts = layout_parts(source.layout, network)
    expected = {
        name: shape
        for ours, tensor in network.state_dict().items()
        for name, shape in zip(parts[ours].names, parts[ours].shapes(tuple(tensor.shape)), strict=True)
    }
    where = _named(source.path, source.origin)
    missing = [name for name in expected if name not in source.entries]
    unexpected = [name for name in source.entries if name not in expected]
    if missing or unexpected:
        faults = [f"it lacks {_listed(missing)}"] if missing else []
        faults += [f"it has {_listed(unexpected)} too many"] if unexpected else []
        raise FluxIRError(
            f"{where} must hold the {len(expected)} tensors of the {source.part} of {spec.name}: {', '.join(faults)}",
            hint=_remedy(spec, source.origin),
        )
    wrong = [name for name, shape in expected.items() if source.entries[name].shape != shape]
    if wrong:
        name = wrong[0]
        raise FluxIRError(
            f"{where} does not fit {spec.name}: {name} must have the shape {expected[name]} and has "
            f"{source.entries[name].shape}" + (f"; {len(wrong) - 1} more differ" if len(wrong) > 1 else ""),
            hint=_remedy(spec, source.origin),
        )


def _wrong_part(spec: ModelSpec, part: Part, path: Path, origin: str, names: Iterable[str]) -> FluxIRError:
    return FluxIRError(
        f"{_named(path, origin)} must hold the {part} of {spec.name}: it holds {_description(list(names))}",
        hint=_remedy(spec, origin),
    )


def _description(names: list[str]) -> str:
    if adapters := [kind for mark, kind in _ADAPTERS.items() if any(mark in name for name in names)]:
        return f"{adapters[0]}, which is not a whole network"
    if other := other_transformer(names) or ("FLUX.2" if is_flux2(names) else None):
        return f"the transformer of {other}"
    if beside := variants.beside_networks(names):
        return beside
    for part in ("transformer", "autoencoder"):
        if layout_and_prefix(part, names):
            return f"a FLUX {part}"
    if any(name.startswith(("text_model.", "encoder.block.", "shared.")) for name in names):
        return "a text encoder"
    return f"{len(names)} tensors of something else ({', '.join(sorted(names)[:_NAMES_SHOWN])})"


def _named(path: Path, origin: str) -> str:
    return f"{path} (from {origin})"


def _remedy(spec: ModelSpec, origin: str) -> str:
    """What to change so that another file is taken."""
    if origin.startswith("--"):
        return f"pass the weights of {spec.name} with {origin}"
    if origin.isupper():
        return f"set {origin} to the weights of {spec.name}, or unset it"
    if origin == RECORDED:
        return "name the weights with --checkpoint and --ae_checkpoint"
    return "delete the file and let it be fetched again"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{len(names)} ({shown}{', ...' if len(names) > _NAMES_SHOWN else ''})"
