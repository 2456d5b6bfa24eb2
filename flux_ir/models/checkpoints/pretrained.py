"""Text and picture encoders from files as transformers writes them: every weight from the files, and none left over.

LoRAs are merged here, into each weight of a text encoder before it is rounded to its dtype, as `load` does it for the
transformer.

Next: `text` and `clip`.
"""

import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.files import read_json
from flux_ir.models.checkpoints.encoder_configs import CONFIG_FILE
from flux_ir.models.checkpoints.formats.refused import READABLE
from flux_ir.models.checkpoints.formats.weights import join_weights, read_entries
from flux_ir.models.checkpoints.headers import TensorEntry, is_index, read_tensor
from flux_ir.models.checkpoints.lora.changes import columns_of
from flux_ir.models.checkpoints.lora.names import Part
from flux_ir.models.checkpoints.lora.read import LoRA, merged_into
from flux_ir.models.checkpoints.paths import first_file, weight_names
from flux_ir.models.streaming import stream_blocks

Network = TypeVar("Network", bound=nn.Module)
Params = TypeVar("Params")

WEIGHTS = (*weight_names("model"), "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where a folder of transformers may have its weights, the first that is there counts."""
_NAMES_SHOWN = 3
_READ_METHODS = ("bitsandbytes", "quanto")
"""Ways to quantise that folders of transformers name, and of which weights can be read, as `formats` finds them."""


class Stored(NamedTuple):
    """One tensor of a file, unread."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Opened(Generic[Network]):
    """A network without its weights, and the weights that its files have for it."""

    network: Network
    """On the meta device: names and shapes, no memory."""
    state: Mapping[str, Stored]
    loras: Sequence[LoRA] = ()

    def read_into(self, target: Tensor, name: str) -> None:
        """Fill `target`, which has the shape of the weight of this name, on its device and in its dtype."""

        def fill(weight: Tensor) -> None:
            weight.copy_(self.state[name].read())

        merged_into(target, name, self.loras, fill)


def load_pretrained(
    kind: Callable[[Params], Network],
    params: Params,
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    what: str,
    aliases: Mapping[str, str],
    left_out: tuple[str, ...],
    prefix: str = "",
    streamed: Sequence[str] = (),
    loras: Sequence[LoRA] = (),
    part: Part | None = None,
) -> Network:
    """The network `kind(params)` with every weight from `path` and the changes of `loras`, ready to run.

    `part` is what the network is to a LoRA. The modules named in `streamed`, but for embeddings inside them, come from
    the file one after another whenever the network runs (`streaming`). `open_pretrained` says all else, and raises.
    """
    opened = open_pretrained(kind, params, path, what=what, aliases=aliases, left_out=left_out, prefix=prefix)
    opened = replace(opened, loras=loras)
    _check_changes(opened, path, part, what=what)
    network = opened.network.eval().requires_grad_(requires_grad=False)
    if streamed:
        stream_blocks(network, streamed, opened.read_into, device, dtype, without=nn.Embedding)
        return network
    # Into memory of its own: a weight that is only mapped would change, or end the process, with its file.
    loaded = {name: torch.empty(stored.shape, device=device, dtype=dtype) for name, stored in opened.state.items()}
    for name, weight in loaded.items():
        opened.read_into(weight, name)
    network.load_state_dict(loaded, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def open_pretrained(
    kind: Callable[[Params], Network],
    params: Params,
    path: Path,
    *,
    what: str,
    aliases: Mapping[str, str],
    left_out: tuple[str, ...],
    prefix: str = "",
) -> Opened[Network]:
    """The network `kind(params)` on the meta device, and every weight of it in `path`, unread.

    `path` is a folder, or a file of weights, where `prefix` stands before the names of the network's tensors.
    `aliases` are starts of names in files and what stands for them in the network; `left_out` the starts of names, as
    they would be in the network, of other parts of the checkpoint, such as T5's decoder. `what` is the network's name
    in errors.

    Raises FluxIRError for files that are broken, lack weights, or have some that the network has no place for, and for
    such as are quantised in a way that cannot be read.
    """
    state = _named_as_in_the_network(
        _state(weights_file(path, what), prefix, what=what), aliases, left_out, path, what=what
    )
    with torch.device("meta"):  # names and shapes, no memory
        network = kind(params)
    _check(network, state, path, what=what)
    return Opened(network, state)


def _check_changes(opened: Opened[Network], path: Path, part: Part | None, *, what: str) -> None:
    """Raises FluxIRError for a LoRA that changes a layer which this network has not, or has in another shape.

    It fits the text encoder that the model was trained with, and this one may be another.
    """
    for lora in opened.loras:
        for layer in lora.all_layers:
            name, rows = layer.target.weight, layer.target.cuts[-1]
            found = opened.state[name].shape if name in opened.state else None
            if layer.target.part == part and (found is None or found != (rows, columns_of(layer))):
                raise FluxIRError(
                    f"{lora.path} does not fit {what} in {path}: it changes {name} [{rows}, {columns_of(layer)}], and "
                    + ("there is no such weight" if found is None else f"that is {list(found)}"),
                    hint="leave the LoRA out, or take the text encoder that the model was trained with",
                )


def read_params(
    kind: type[Params], path: Path, *, what: str, config: Mapping[str, Any] | None = None, section: str = ""
) -> Params:
    """The shape of a network, from the configuration beside its weights or, for a file without one, from `config`.

    `kind` is a dataclass with the configuration's names, and the model types that it is the shape of in `MODEL_TYPES`.
    `section`: the key of the configuration under which the network's own stands, as in CLIP's, which has two. Raises
    FluxIRError for another type of model, and for a value that `kind` does not take.
    """
    if config is None:
        config = read_config(weights_file(path, what).parent, what=what)
    own = config.get(section, config)
    shape: Any = kind  # a dataclass, which its type variable does not say
    values = {field.name: own[field.name] for field in fields(shape) if own.get(field.name) is not None}
    if (model_type := own.get("model_type")) not in (None, *shape.MODEL_TYPES):
        problem = f"model_type must be {' or '.join(shape.MODEL_TYPES)}: got {model_type!r}"
        raise unreadable(path, f"{CONFIG_FILE}: {problem}", what=what)
    try:
        for field in fields(shape):
            _check_type(field, values.get(field.name, field.default))
        return kind(**values)
    except FluxIRError as error:
        raise unreadable(path, f"{CONFIG_FILE}: {error.message}", what=what) from error


def read_config(folder: Path, *, what: str) -> dict[str, Any]:
    """The configuration of the model in a folder. Raises FluxIRError if there is none, or if it names a way to quantise
    of which weights cannot be read.
    """
    config = read_json(folder / CONFIG_FILE)
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        if method not in _READ_METHODS:
            raise FluxIRError(
                f"{what} in {folder} is quantised by {method}, which cannot be read", hint=f"take it in {READABLE}"
            )
    return config


def weight_entries(path: Path, prefix: str, *, what: str) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file or index whose names start with `prefix`, by the rest of their names."""
    own = {name.removeprefix(prefix): e for name, e in read_entries(path).items() if name.startswith(prefix)}
    return join_weights(own, f"{what} in {path}", hint=f"take it in {READABLE}")


def weights_file(path: Path, what: str) -> Path:
    """The file or index of the weights: `path` itself, or the one of its folder. Raises FluxIRError if it has none."""
    weights = first_file(path, WEIGHTS) if path.is_dir() else path
    if weights is None:
        raise unreadable(path, f"no weights ({', '.join(WEIGHTS[:2])})", what=what)
    return weights


def unreadable(path: Path, problem: str, *, what: str) -> FluxIRError:
    """What is wrong with a folder or a file, as one line."""
    again = "fetch the whole folder again" if path.is_dir() else "take another file"
    return FluxIRError(f"{what} in {path} cannot be read: {problem}", hint=again)


def _state(weights: Path, prefix: str, *, what: str) -> dict[str, Stored]:
    """Every weight of the file or index. One is read at a time: together, decoded, they might not fit into memory."""
    if ".bin" not in weights.suffixes:
        entries = weight_entries(weights, prefix, what=what)
        return {name: Stored(entry.shape, partial(read_tensor, entry)) for name, entry in entries.items()}
    tensors = _unpickled(weights, what=what) if not is_index(weights) else _unpickled_parts(weights, what=what)
    return {name: Stored(tuple(tensor.shape), partial(_itself, tensor)) for name, tensor in tensors.items()}


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _unpickled_parts(index: Path, *, what: str) -> dict[str, Tensor]:
    named: dict[str, str] = read_json(index, required=("weight_map",))["weight_map"]
    parts = {file: _unpickled(index.parent / file, what=what) for file in sorted(set(named.values()))}
    return {name: parts[file][name] for name, file in named.items() if name in parts[file]}


def _unpickled(file: Path, *, what: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise unreadable(file, str(error), what=what) from error
    return state


def _check_type(field: Field[Any], value: Any) -> None:
    """Raises FluxIRError for a value of another type than the field's: JSON may have anything there."""
    allowed: Any = int | float if field.type is float else field.type
    if value is not MISSING and not isinstance(value, allowed):
        raise FluxIRError(f"{field.name} must be a number or word of type {field.type}: got {value!r}")


def _named_as_in_the_network(
    state: Mapping[str, Stored], aliases: Mapping[str, str], left_out: tuple[str, ...], path: Path, *, what: str
) -> dict[str, Stored]:
    """The tensors by the network's own names. Raises FluxIRError for two different ones that would have one name."""
    named: dict[str, Stored] = {}
    for name, stored in state.items():
        alias = next((alias for alias in aliases if name.startswith(alias)), "")
        own = aliases.get(alias, "") + name.removeprefix(alias)
        if own.startswith(left_out) or own.endswith(".position_ids"):  # positions count up: they are no weights
            continue
        if own in named and not torch.equal(named[own].read(), stored.read()):
            raise unreadable(path, f"it has two different tensors for {own}, one as {name}", what=what)
        named[own] = stored
    return named


def _check(network: nn.Module, state: Mapping[str, Stored], path: Path, *, what: str) -> None:
    """Raises FluxIRError unless the tensors are those of the network, with its shapes."""
    blank = network.state_dict()
    faults = {
        "missing": sorted(blank.keys() - state.keys()),
        "of another shape than config.json says": sorted(
            name for name in blank.keys() & state.keys() if blank[name].shape != state[name].shape
        ),
        "not of this model": sorted(state.keys() - blank.keys()),
    }
    if told := [f"{len(names)} weights are {fault} ({_listed(names)})" for fault, names in faults.items() if names]:
        raise unreadable(path, f"{type(network).__name__}: {'; '.join(told)}", what=what)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
