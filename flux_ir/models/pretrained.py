"""Models of transformers from local files: every weight from the files and no weight left over, and quietly.

transformers is imported when something is loaded, not before: its models take longer to import than PyTorch. Next:
`text` and `clip`.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.models.headers import TensorEntry, is_index, plain_weights, read_entries, read_tensor
from flux_ir.models.paths import first_file, weight_names
from flux_ir.models.registry import read_object

Model = TypeVar("Model", bound=nn.Module)

CONFIG_FILE = "config.json"
WEIGHTS = (*weight_names("model"), "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where a folder of transformers may have its weights, the first that is there counts."""
_NAMES_SHOWN = 3


def load_pretrained(
    kind: type[Model],
    path: Path,
    dtype: torch.dtype,
    *,
    what: str,
    left_out: tuple[str, ...] = (),
    prefix: str = "",
    config: Mapping[str, Any] | None = None,
) -> Model:
    """The model with every weight from `path`: transformers alone would draw missing ones at random.

    `path` is a folder, or a file of weights, where `prefix` stands before the names of the model's tensors; a file
    needs a `config`. `left_out` are the starts of names that belong to other halves of the network, such as T5's
    decoder. `what` is the model's name in errors.

    Raises FluxIRError for files that are broken, lack weights, or have some that the model has no place for, and for
    quantised ones.
    """
    weights = first_file(path, WEIGHTS) if path.is_dir() else path
    if weights is None:
        raise unreadable(path, f"no weights ({', '.join(WEIGHTS[:2])})", what=what)
    of_transformers: Any = kind
    if config is None:
        config = read_config(weights.parent, what=what)
    state = {
        name: tensor
        for name, tensor in _state(weights, prefix, what=what).items()
        if not name.startswith(left_out) and not name.endswith(".position_ids")
    }
    try:
        with _quietly():
            # Nested configurations, CLIP's with both its halves, are sorted out by the class.
            settings = of_transformers.config_class.from_dict(_of_kind(config, of_transformers))
            model, told = of_transformers.from_pretrained(
                None,
                config=settings,
                state_dict=state,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise unreadable(path, f"{kind.__name__}: {error}", what=what) from error
    faults = {
        "missing": sorted(told["missing_keys"]),
        "of another shape than config.json says": sorted(str(key[0]) for key in told["mismatched_keys"]),
        "not of this model": sorted(told["unexpected_keys"]),
    }
    if told := [f"{len(names)} weights are {fault} ({_listed(names)})" for fault, names in faults.items() if names]:
        raise unreadable(path, f"{kind.__name__}: {'; '.join(told)}", what=what)
    loaded: Model = model
    return loaded


def read_config(folder: Path, *, what: str) -> dict[str, Any]:
    """The configuration of the model in a folder. Raises FluxIRError if there is none, or if its weights are quantised.

    A quantised model of transformers needs the program that quantised it, and gives other numbers than the plain one.
    """
    config = read_object(folder / CONFIG_FILE)
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise FluxIRError(
            f"{what} in {folder} is quantised ({method}), and only plain weights can be read",
            hint="take the folder of the original model, in bfloat16, float16 or float32",
        )
    return config


def weight_entries(path: Path, prefix: str, *, what: str) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file or index whose names start with `prefix`, by the rest of their names."""
    own = {name.removeprefix(prefix): e for name, e in read_entries(path).items() if name.startswith(prefix)}
    hint = "take one in bfloat16, float16, float32 or float8"
    return plain_weights(own, f"{what} in {path}", hint=hint)


def load_tokenizer(folder: Path, *, what: str) -> Any:
    """The tokenizer of the folder, a transformers one. Raises FluxIRError if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise unreadable(folder, f"the tokenizer: {error}", what=what) from error


def unreadable(path: Path, problem: str, *, what: str) -> FluxIRError:
    """What is wrong with a folder or a file, as one line."""
    again = "fetch the whole folder again" if path.is_dir() else "take another file"
    return FluxIRError(f"{what} in {path} cannot be read: {problem}", hint=again)


def _state(weights: Path, prefix: str, *, what: str) -> dict[str, Tensor]:
    """Every tensor of the file or index, mapped from it where its format allows that."""
    if ".bin" not in weights.suffixes:
        entries = weight_entries(weights, prefix, what=what)
        return {name: read_tensor(entry) for name, entry in entries.items()}
    if not is_index(weights):
        return _unpickled(weights, what=what)
    named: dict[str, str] = read_object(weights, required=("weight_map",))["weight_map"]
    parts = {file: _unpickled(weights.parent / file, what=what) for file in sorted(set(named.values()))}
    return {name: parts[file][name] for name, file in named.items() if name in parts[file]}


def _unpickled(file: Path, *, what: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise unreadable(file, str(error), what=what) from error
    return state


def _of_kind(config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """The part of a configuration that is about this half of a network."""
    own = kind.config_class.base_config_key
    return json.loads(json.dumps(config[own] if own and own in config else dict(config)))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


@contextmanager
def _quietly() -> Iterator[None]:
    """Progress and complaints are the caller's: transformers' own bars and reports stay away, and come back after."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
