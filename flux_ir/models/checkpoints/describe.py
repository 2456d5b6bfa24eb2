"""What any file of weights holds, said from its header: for people who have a file and want to know what it is.

`inspect` asks whether a file is what one model needs; here nothing is asked for. A file may hold several networks.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints import variants
from flux_ir.models.checkpoints.formats.weights import join_weights, read_entries, stored_as
from flux_ir.models.checkpoints.headers import TensorEntry
from flux_ir.models.checkpoints.inspect import inspect, is_flux2, layout_and_prefix, other_transformer
from flux_ir.models.checkpoints.lora import names as lora_names
from flux_ir.models.checkpoints.lora.names import PART_NAMES
from flux_ir.models.checkpoints.lora.read import LoRA, fitting_models, read_lora
from flux_ir.models.registry import get_spec, model_names

# What stands before the names of one network in a file that holds several.
_PREFIXES = (
    *("model.diffusion_model.", "diffusion_model.", "vae.", "first_stage_model."),
    *("text_encoders.t5xxl.transformer.", "text_encoders.clip_l.transformer.", "text_encoders.", "cond_stage_model."),
    *("conditioner.embedders.0.", "conditioner.embedders.1."),
)


class _Mark(NamedTuple):
    """A name, or the start of one, that only one kind of network has."""

    start: str
    kind: str


_MARKS = (
    _Mark("double_stream_modulation_img.", "the transformer of FLUX.2"),
    _Mark("redux_up.", variants.REDUX.name),
    _Mark("controlnet_", "a ControlNet"),
    _Mark("input_hint_block.", "a ControlNet"),
    _Mark("image_proj", "an IP-Adapter"),
    _Mark("ip_adapter", "an IP-Adapter"),
    _Mark("encoder.block.0.layer.0.SelfAttention.", "the T5 text encoder"),
    _Mark("decoder.block.0.layer.0.SelfAttention.", "a T5 text decoder"),
    _Mark("text_model.", "the text encoder of CLIP"),
    _Mark("embeddings.token_embedding.", "the text encoder of CLIP"),  # as newer versions of transformers save it
    _Mark("vision_model.", "the picture encoder of CLIP or SigLIP"),
    _Mark("model.layers.0.self_attn.", "a language model"),
    _Mark("language_model.", "a language model"),
    _Mark("W_dec", "a sparse autoencoder"),
    _Mark("encoder.down.", "an autoencoder"),
    _Mark("encoder.down_blocks.", "an autoencoder"),
)
_LATENTS = {4: "as that of Stable Diffusion and SDXL", 16: "as that of FLUX.1", 32: "as that of FLUX.2"}


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network, or one adapter, of a file."""

    kind: str
    """What it is, in words."""
    models: tuple[str, ...] = ()
    """The models known here that take it as it is."""
    prefix: str = ""
    layout: str = ""
    """Whose names it has."""
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    """How many tensors are of each type, as safetensors spells them."""
    quantised: str = ""
    """How many weights are stored as what, for those that are widened when they are loaded, or why none can be read."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else there is to say: sizes, ranks."""


def describe_file(path: Path) -> list[Network]:
    """Every network in a safetensors file or an index of shards.

    Raises FluxIRError for a file that is broken or of another kind.
    """
    stored = read_entries(path)
    if not stored:
        raise FluxIRError(f"{path} holds no tensors", hint="download it again")
    if lora_names.is_adapter(stored):
        return [_adapter(path, stored)]
    groups: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in stored.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        groups.setdefault(prefix, {})[name.removeprefix(prefix)] = entry
    return [_network(path, prefix, entries) for prefix, entries in groups.items()]


def _network(path: Path, prefix: str, stored: Mapping[str, TensorEntry]) -> Network:
    entries, quantised = _joined(stored)
    models: tuple[str, ...] = ()
    layout, facts = "", {}
    if other := other_transformer(entries):
        kind = f"the transformer of {other}"
    elif found := layout_and_prefix("transformer", entries):
        layout, facts = found[0], _transformer_facts(entries)
        models = _models_with("transformer", path)
        kind = f"the transformer of {' or '.join(models)}" if models else "a FLUX transformer of no model known here"
    elif found := layout_and_prefix("autoencoder", entries):
        layout, facts = found[0], _autoencoder_facts(entries)
        models = _models_with("autoencoder", path)
        kind = f"the autoencoder of {' or '.join(models)}" if models else "an autoencoder of no model known here"
    else:
        kind = _kind_of(entries)
        facts = {"not run here": f"use {variants.REDUX.instead}"} if kind == variants.REDUX.name else _width(entries)
    return Network(
        kind=kind,
        models=models,
        prefix=prefix,
        layout=layout,
        facts=facts,
        quantised=quantised,
        **_counts(stored, entries),
    )


def _joined(stored: Mapping[str, TensorEntry]) -> tuple[Mapping[str, TensorEntry], str]:
    """The weights among the tensors, and how they are stored if that is not plainly."""
    try:
        weights = join_weights(stored, "it", hint="take another file")
    except FluxIRError as error:
        return stored, f"not readable: {error.message}"
    return weights, ", ".join(f"{name} ({count})" for name, count in stored_as(weights).items())


def _counts(stored: Mapping[str, TensorEntry], weights: Mapping[str, TensorEntry]) -> dict[str, Any]:
    return {
        "tensors": len(stored),
        "parameters": sum(prod(entry.shape) for entry in weights.values()),
        "nbytes": sum(entry.nbytes for entry in stored.values()),
        "dtypes": dict(Counter(entry.dtype for entry in stored.values()).most_common()),
    }


def _models_with(part: Any, path: Path) -> tuple[str, ...]:
    """The models whose part this is, name by name and shape by shape."""
    fits = []
    for name in model_names():
        try:
            inspect(get_spec(name), part, path, "FILE")
        except FluxIRError:
            continue
        fits.append(name)
    return tuple(fits)


def _transformer_facts(entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    into = next(entries[name] for name in ("img_in.weight", "x_embedder.weight") if name in entries)
    blocks = {
        "double": _count_blocks(entries, "double_blocks", "transformer_blocks"),
        "single": _count_blocks(entries, "single_blocks", "single_transformer_blocks"),
    }
    embedders = ("guidance_in.", "time_text_embed.guidance_embedder.", "time_guidance_embed.guidance_embedder.")
    guidance = any(name.startswith(embedders) for name in entries)
    channels = into.shape[-1]
    variant = None if is_flux2(entries) else variants.of_channels(channels)
    return {
        "blocks": f"{blocks['double']} double, {blocks['single']} single, {into.shape[0]} wide",
        "latent channels": channels if variant is None else f"{channels}, as those of {variant.name}",
        **({} if variant is None else {"not run here": f"use {variant.instead}"}),
        "guidance": "distilled, as in the dev family" if guidance else "none, as in flux-schnell",
    }


def _count_blocks(names: Iterable[str], *folders: str) -> int:
    pattern = re.compile(rf"(?:{'|'.join(folders)})\.(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def _autoencoder_facts(entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    into = next(entries[name] for name in ("decoder.conv_in.weight",) if name in entries)
    channels = into.shape[1]
    return {"latent channels": f"{channels}, {_LATENTS[channels]}" if channels in _LATENTS else channels}


def _kind_of(entries: Mapping[str, TensorEntry]) -> str:
    for start, kind in _MARKS:
        if any(name.startswith(start) or f".{start}" in name for name in entries):
            return kind
    return f"something that is not known here ({', '.join(sorted(entries)[:3])})"


def _width(entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """The width of a text encoder, and its layers."""
    tables = ("shared.weight", "text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")
    for name in tables:
        if name in entries:
            layers = _count_blocks(entries, r"encoder\.block", r"text_model\.encoder\.layers", r"encoder\.layers")
            return {"shape": f"{layers} layers, {entries[name].shape[1]} wide, {entries[name].shape[0]} tokens known"}
    return {}


def _adapter(path: Path, stored: Mapping[str, TensorEntry]) -> Network:
    """A LoRA or its like, of whichever model."""
    models = tuple(fitting_models(path, stored))
    if models:
        lora = read_lora(path, get_spec(models[0]))
        kind = f"a {lora.method} of {' or '.join(models)}"
        return Network(kind=kind, models=models, layout=lora.layout, facts=lora_facts(lora), **_counts(stored, stored))
    if family := lora_names.other_family(stored):
        return Network(kind=f"a LoRA of {family}", **_counts(stored, stored))
    reasons = {}
    for name in model_names()[:1]:
        try:
            read_lora(path, get_spec(name))
        except FluxIRError as error:
            reasons["because"] = error.message.removeprefix(f"{path} ")
    return Network(kind="an adapter of no model known here", facts=reasons, **_counts(stored, stored))


def lora_facts(lora: LoRA) -> dict[str, Any]:
    """What there is to say of a LoRA before it is compared with the weights."""
    facts: dict[str, Any] = {"layers": len(lora.all_layers)}
    if lora.ranks:
        facts["rank"] = ", ".join(f"{rank} ({count} layers)" for rank, count in lora.ranks.items())
    facts["alpha / rank"] = ", ".join(f"{scale:g}" for scale in lora.scales)
    if set(lora.parts) != {"transformer"}:
        facts["layers"] = f"{facts['layers']}: {', '.join(f'{n} of {PART_NAMES[p]}' for p, n in lora.parts.items())}"
    if lora.unused:
        facts["not used"] = f"{len(lora.unused)} tensors of text encoders"
    return facts
