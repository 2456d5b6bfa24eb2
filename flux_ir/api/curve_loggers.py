"""Training curves to TensorBoard or Weights & Biases. Both are optional packages, and nothing is sent unless asked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from flux_ir.errors import FluxIRError

CurveRow = Mapping[str, Any]
"""The numbers of one autoencoder at one step: a line of curves.jsonl."""
NOT_CURVES = ("step", "tokens")


@runtime_checkable
class Logger(Protocol):
    """Where rows of numbers go, by autoencoder."""

    def log(self, rows: Mapping[str, CurveRow]) -> None:
        """Hand over one row of each autoencoder."""

    def close(self) -> None:
        """Write what is buffered."""


class NoLogger:
    """Writes nothing: the default."""

    def log(self, rows: Mapping[str, CurveRow]) -> None: ...

    def close(self) -> None: ...


class TensorBoardLogger:
    """Event files in a folder, for `tensorboard --logdir`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self.writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, rows: Mapping[str, CurveRow]) -> None:
        for name, row in rows.items():
            for key, value in _curves(row).items():
                self.writer.add_scalar(f"{key}/{name}", value, row["step"])

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """A run of Weights & Biases, which goes on under the same id after a resume."""

    def __init__(self, folder: Path, run_id: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        folder.mkdir(parents=True, exist_ok=True)
        self.run: Any = wandb.init(project="flux-ir", id=run_id, resume="allow", dir=str(folder), config=dict(settings))

    def log(self, rows: Mapping[str, CurveRow]) -> None:
        step = next(iter(rows.values()))["step"]
        self.run.log({f"{key}/{name}": v for name, row in rows.items() for key, v in _curves(row).items()}, step=step)

    def close(self) -> None:
        self.run.finish()


def check_logger(kind: Literal["none", "tensorboard", "wandb"]) -> None:
    """Raises FluxIRError if the package is missing: before anything is read."""
    from importlib.util import find_spec

    if kind != "none" and find_spec(kind) is None:
        raise _missing(kind)


def open_logger(
    kind: Literal["none", "tensorboard", "wandb"],
    folder: Path,
    *,
    run_id: str,
    first_step: int,
    settings: Mapping[str, Any],
) -> Logger:
    """The logger of one run. `folder` is where its files go."""
    if kind == "tensorboard":
        return TensorBoardLogger(folder / "tensorboard" / run_id, first_step)
    return WandbLogger(folder, run_id, settings) if kind == "wandb" else NoLogger()


def _curves(row: CurveRow) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in NOT_CURVES and value is not None}


def _missing(package: str) -> FluxIRError:
    return FluxIRError(f"--log {package} needs the package {package}", hint=f"pip install 'flux-ir[{package}]'")
