"""Models of transformers from a local folder: every weight from the folder, and quietly. Next: `text` and `clip`.

transformers is imported when something is loaded, not before: its models take longer to import than PyTorch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from flux_ir.errors import FluxIRError

Model = TypeVar("Model", bound=nn.Module)


def load_pretrained(kind: type[Model], folder: Path, dtype: torch.dtype, *, what: str) -> Model:
    """The model with every weight from the folder: transformers alone would draw missing ones at random.

    What the folder has beyond it (T5's decoder, the other half of CLIP) is left. `what` is its name in errors.

    Raises FluxIRError for a folder that is broken or lacks weights.
    """
    of_transformers: Any = kind
    try:
        with _quietly():
            loaded = of_transformers.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unreadable(folder, f"{kind.__name__}: {error}", what=what) from error
    model: Model
    model, told = loaded
    if missing := sorted(told["missing_keys"]):
        problem = f"{len(missing)} weights of {kind.__name__} are missing, first {missing[0]}"
        raise unreadable(folder, problem, what=what)
    return model


def load_tokenizer(folder: Path, *, what: str) -> Any:
    """The tokenizer of the folder, a transformers one. Raises FluxIRError if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise unreadable(folder, f"the tokenizer: {error}", what=what) from error


def unreadable(folder: Path, problem: str, *, what: str) -> FluxIRError:
    """What is wrong with a folder, as one line."""
    return FluxIRError(f"{what} in {folder} cannot be read: {problem}", hint="fetch the whole folder again")


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
