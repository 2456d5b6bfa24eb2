"""The tensors of a LoRA's file, held against one network: which layer each is of, its scale, and what fits nothing.

Next: `read`, which opens files, and refuses those of which a part fits nothing.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json
from flux_ir.models.checkpoints.headers import TensorEntry, read_tensor
from flux_ir.models.checkpoints.inspect import blank_network
from flux_ir.models.checkpoints.lora import names
from flux_ir.models.checkpoints.lora.changes import Layer, check_shapes, method_of, rank_of
from flux_ir.models.checkpoints.lora.names import Target
from flux_ir.models.flux1.transformer import Flux
from flux_ir.models.registry import ModelSpec

_PEFT_CONFIG = "adapter_config.json"


def blank_transformer(spec: ModelSpec) -> Flux:
    """The transformer of a model without its weights."""
    network = blank_network(spec, "transformer")
    assert isinstance(network, Flux)
    return network


class Contents(NamedTuple):
    """The tensors of a file, sorted by what they change."""

    layers: list[Layer]
    of_text: list[str]
    """Names of tensors that change a text encoder."""
    unknown: list[str]
    """Names of tensors that fit nothing."""
    layout: str


def read_contents(file: Path, stored: Mapping[str, TensorEntry], network: Flux) -> Contents | FluxIRError:
    """The file against one network; an error if a layer of the right name is of another shape."""
    known, blank = names.targets(network), network.state_dict()
    of_text = [name for name in stored if names.is_of_a_text_encoder(name)]
    unknown: list[str] = []
    found: dict[tuple[str, Target], dict[str, TensorEntry]] = {}
    for name, entry in stored.items():
        if names.is_of_a_text_encoder(name):
            continue
        parts = names.taken_apart(name)
        target = None if parts is None else names.find(parts.layer, known)
        if parts is None or target is None:
            unknown.append(name)
            continue
        found.setdefault((parts.layer, target), {})[parts.leaf] = entry
    try:
        peft = _peft_settings(file)
        layers = [_layer(name, target, tensors, peft, blank) for (name, target), tensors in found.items()]
        _check_once(layers)
    except FluxIRError as error:
        return error
    return Contents(layers, of_text, unknown, _layout(layers))


def _layer(
    name: str, target: Target, tensors: dict[str, TensorEntry], peft: Mapping[str, Any], blank: Mapping[str, Tensor]
) -> Layer:
    layer = Layer(name, method_of(tensors, name), target, tensors, _scale(name, tensors, peft))
    rows, columns = blank[target.weight][target.rows].shape
    check_shapes(layer, (rows, columns))
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


def _peft_settings(file: Path) -> dict[str, Any]:
    """PEFT's settings: from the header, where diffusers puts them behind a prefix, or from the file beside."""
    with safe_open(file, framework="pt") as opened:
        said = (opened.metadata() or {}).get("lora_adapter_metadata")
    if said is not None:
        try:
            settings = json.loads(said)
            own = {key.removeprefix("transformer."): value for key, value in settings.items()}
        except (ValueError, AttributeError) as error:
            raise FluxIRError(
                f"{file} has settings that cannot be read (lora_adapter_metadata): {error}", hint="fetch it again"
            ) from error
        return own
    beside = file.with_name(_PEFT_CONFIG)
    return read_json(beside) if file.name.startswith("adapter_model") and beside.is_file() else {}


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
    for layer in layers:
        naming, dotted = layer.target.naming, "." in layer.name or "_" not in layer.name
        program = {"BFL": "ComfyUI" if dotted else "kohya", "diffusers": "PEFT" if dotted else "kohya"}.get(naming)
        found.add(naming if program is None else f"{program}, names of {naming}")
    return " and ".join(sorted(found))
