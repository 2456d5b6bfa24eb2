"""The tensors of a LoRA's file, held against one model: which layer each is of, its scale, and what fits nothing.

Next: `read`, which opens files, and refuses those of which a part fits nothing.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json
from flux_ir.models.architecture import AnyTransformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.checkpoints.encoder_configs import Encoder, config_of, linear_layers
from flux_ir.models.checkpoints.headers import TensorEntry, read_tensor
from flux_ir.models.checkpoints.inspect import blank_network
from flux_ir.models.checkpoints.lora import names
from flux_ir.models.checkpoints.lora.changes import Layer, check_shapes, method_of, rank_of
from flux_ir.models.checkpoints.lora.names import Part, Target
from flux_ir.models.registry import ModelSpec

ENCODERS: tuple[Encoder, ...] = ("t5", "clip")
_PEFT_CONFIG = "adapter_config.json"
# What diffusers calls the networks.
_COMPONENTS: dict[str, Part] = {"transformer": "transformer", "text_encoder_2": "t5", "text_encoder": "clip"}


def blank_transformer(spec: ModelSpec) -> AnyTransformer:
    """The transformer of a model without its weights."""
    network = blank_network(spec, "transformer")
    assert not isinstance(network, AutoEncoder)
    return network


class Contents(NamedTuple):
    """The tensors of a file, sorted by what they change."""

    layers: list[Layer]
    unused: list[str]
    """Names of tensors that change what FLUX.1 does not use of a text encoder."""
    unknown: list[str]
    """Names of tensors that fit nothing."""
    layout: str


class _Changeable(NamedTuple):
    """What a LoRA can change of a model: every linear layer by all its names, and the columns of its weight."""

    targets: Mapping[str, Target]
    columns: Mapping[str, int]


@cache
def _changeable(spec: ModelSpec) -> _Changeable:
    network = blank_transformer(spec)
    found, shapes = names.targets(network), {name: tuple(one.shape) for name, one in network.state_dict().items()}
    for encoder in ENCODERS if spec.t5_layers else ():  # FLUX.2 has others, which are not read
        layers = linear_layers(encoder, config_of(spec, encoder))
        found |= names.text_targets(encoder, layers)
        shapes |= layers
    return _Changeable(found, {target.weight: shapes[target.weight][1] for target in found.values()})


def read_contents(file: Path, stored: Mapping[str, TensorEntry], spec: ModelSpec) -> Contents | FluxIRError:
    """The file against one model; an error if a layer of the right name is of another shape."""
    known = _changeable(spec)
    unused: list[str] = []
    unknown: list[str] = []
    found: dict[tuple[str, Target], dict[str, TensorEntry]] = {}
    for name, entry in stored.items():
        parts = names.taken_apart(name)
        target = None if parts is None else names.find(parts.layer, known.targets)
        if parts is None or target is None:
            (unused if names.is_unused(name) else unknown).append(name)
            continue
        found.setdefault((parts.layer, target), {})[parts.leaf] = entry
    try:
        peft = _peft_settings(file)
        layers = [_layer(name, target, tensors, peft, known) for (name, target), tensors in found.items()]
        _check_once(layers)
    except FluxIRError as error:
        return error
    return Contents(layers, unused, unknown, _layout(layers))


def _layer(
    name: str,
    target: Target,
    tensors: dict[str, TensorEntry],
    peft: Mapping[Part, Mapping[str, Any]],
    known: _Changeable,
) -> Layer:
    layer = Layer(name, method_of(tensors, name), target, tensors, _scale(name, tensors, peft[target.part]))
    check_shapes(layer, (target.cuts[-1] - target.cuts[0], known.columns[target.weight]))
    return layer


def _scale(name: str, tensors: Mapping[str, TensorEntry], peft: Mapping[str, Any]) -> float:
    """Alpha / rank, where the file or its settings say alpha, else 1."""
    rank = rank_of(tensors)
    if "alpha" in tensors:
        alpha = read_tensor(tensors["alpha"])
        if alpha.numel() != 1:
            raise FluxIRError(f"{name}.alpha must be one number: it is {list(alpha.shape)}", hint="download it again")
        # Of a LoKr whose two factors are whole, LyCORIS takes no alpha.
        return 1.0 if rank is None else float(alpha) / rank
    alpha = _patterned(peft, "alpha_pattern", "lora_alpha", name)
    if alpha is None or rank is None:
        return 1.0
    said = _patterned(peft, "rank_pattern", "r", name)
    if said is not None and said != rank:
        raise FluxIRError(
            f"{name} has rank {rank}, and the file's own settings say {said}",
            hint="the file is damaged: fetch it again",
        )
    return float(alpha) / (math.sqrt(rank) if peft.get("use_rslora") else rank)


def _patterned(peft: Mapping[str, Any], patterns: str, default: str, name: str) -> Any:
    """A setting of PEFT for one layer: patterns are regular expressions of the end of its name."""
    for pattern, value in (peft.get(patterns) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return peft.get(default)


def _peft_settings(file: Path) -> dict[Part, dict[str, Any]]:
    """PEFT's settings of each network: from the header, where diffusers puts them behind prefixes, or from the file
    beside, which is of one network.
    """
    with safe_open(file, framework="pt") as opened:
        said = (opened.metadata() or {}).get("lora_adapter_metadata")
    if said is not None:
        try:
            settings = json.loads(said)
            own = {part: _of_component(settings, component) for component, part in _COMPONENTS.items()}
        except (ValueError, AttributeError) as error:
            raise FluxIRError(
                f"{file} has settings that cannot be read (lora_adapter_metadata): {error}", hint="fetch it again"
            ) from error
        return own
    beside = file.with_name(_PEFT_CONFIG)
    read = read_json(beside) if file.name.startswith("adapter_model") and beside.is_file() else {}
    return dict.fromkeys(_COMPONENTS.values(), read)


def _of_component(settings: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Those of one of diffusers' networks; what has no prefix is of the transformer, as in files of one network."""
    own = {key.removeprefix(f"{component}."): one for key, one in settings.items() if key.startswith(f"{component}.")}
    if component != "transformer":
        return own
    return {key: one for key, one in settings.items() if not key.startswith(tuple(f"{c}." for c in _COMPONENTS))} | own


def _check_once(layers: Sequence[Layer]) -> None:
    """Raises FluxIRError for rows that two layers of the file change."""
    rows: dict[str, list[Layer]] = {}
    for layer in layers:
        for other in rows.get(layer.target.weight, ()):
            mine, its = layer.target.rows, other.target.rows
            if mine.start < its.stop and its.start < mine.stop:
                raise FluxIRError(
                    f"{other.name} and {layer.name} both change {layer.target.weight}",
                    hint="two LoRAs are in one file: pass them as two files",
                )
        rows.setdefault(layer.target.weight, []).append(layer)


def _layout(layers: Sequence[Layer]) -> str:
    """Whose names these are, as people call the layouts."""
    found = set()
    # Text encoders have one naming: in a file that changes the transformer as well it says nothing.
    telling = [layer for layer in layers if layer.target.part == "transformer"] or layers
    for layer in telling:
        naming, dotted = layer.target.naming, "." in layer.name or "_" not in layer.name
        programs = {"BFL": ("ComfyUI", "kohya"), "diffusers": ("PEFT", "kohya"), "transformers": ("PEFT", "kohya")}
        program = programs[naming][0 if dotted else 1] if naming in programs else None
        found.add(naming if program is None else f"{program}, names of {naming}")
    return " and ".join(sorted(found))
