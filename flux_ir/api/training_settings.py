"""The settings of a training, and which of them contradict each other.

They have a file of their own because nothing here imports torch, which takes seconds: contradictions are told at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from flux_ir.api.arguments import check_least, check_words
from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import HAS_K
from flux_ir.sites import site_names

# These may be given as one element.
LISTS = ("k", "prefixes", "expansion", "seed", "l1_coefficient", "target_l0", "steps", "lora_strength")
PATHS = ("captures", "whiten", "output_dir")


@dataclass(frozen=True, kw_only=True)
class TrainSAESettings:
    """The arguments of `train_sae`, which says what they mean. Raises FluxIRError for those that contradict others."""

    captures: Path | None = None
    site: tuple[str, ...] | None = None
    steps: tuple[int, ...] | None = None
    stream: Literal["img", "txt"] | None = None
    padding: bool = False
    outliers: float | None = None
    held_out: float = 0.1
    max_tokens: int | None = None
    epochs: int | None = None
    pool_gb: float = 1.0
    arch: Literal["topk", "batch_topk", "l1", "jumprelu", "gated", "matryoshka"] = "topk"
    k: tuple[int, ...] | None = None
    prefixes: tuple[int, ...] | None = None
    expansion: tuple[int, ...] = (8,)
    seed: tuple[int, ...] = (0,)
    l1_coefficient: tuple[float, ...] | None = None
    target_l0: tuple[float, ...] | None = None
    tied: bool = False
    decoder_init: Literal["random", "orthogonal"] = "random"
    encoder_init: Literal["transposed", "random", "orthogonal"] = "transposed"
    bias_init: Literal["mean", "geometric_median"] = "mean"
    normalise: bool = True
    whiten: Path | None = None
    k_aux: int | None = None
    dead_after: int | None = None
    resample: int | None = None
    batch_tokens: int = 2048
    lr: float | None = None
    k_start: int | None = None
    ema: float | None = None
    clip: float | None = 1.0
    dtype: Literal["bfloat16", "float32"] | None = None
    shard_optimiser: bool = False
    model: str | None = None
    prompts: Path | tuple[str, ...] | None = None
    repeats: int | None = None
    lora: tuple[Path, ...] | None = None
    lora_strength: tuple[float, ...] | None = None
    quantize: Literal["nf4", "int8", "fp8"] | None = None
    name: str | None = None
    output_dir: Path = Path("saes")
    checkpoint_minutes: float = 10.0
    checkpoint_tokens: int | None = None
    log: Literal["none", "tensorboard", "wandb"] = "none"
    device: str | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "TrainSAESettings":
        """Settings from arguments as people pass them: one number where there may be several, text for paths."""
        given = {field.name: arguments[field.name] for field in fields(cls)}
        for name in LISTS:
            if given[name] is not None:
                given[name] = (given[name],) if isinstance(given[name], int | float) else tuple(given[name])
        for name in PATHS:
            given[name] = None if given[name] is None else Path(given[name])
        given["site"] = None if given["site"] is None else site_names(given["site"])
        if isinstance(given["prompts"], str):
            given["prompts"] = Path(given["prompts"])
        if given["lora"] is not None:
            several = not isinstance(given["lora"], str | Path)
            given["lora"] = tuple(map(Path, given["lora"] if several else (given["lora"],)))
        return cls(**given)

    def __post_init__(self) -> None:
        check_words(TrainSAESettings, vars(self))
        check_least(vars(self))
        if self.ema is not None and self.ema >= 1:
            raise FluxIRError(f"--ema must be below 1: got {self.ema}", hint="pass one such as 0.999")
        self._check_data()
        self._check_architecture()
        for name in ("lr", "clip", "pool_gb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise FluxIRError(f"--{name} must be above 0: got {value}")

    def _check_data(self) -> None:
        """One source of data, and one length of the run."""
        live = self.model is not None or self.prompts is not None
        if self.captures is not None and live:
            raise FluxIRError(
                "--captures reads what is stored, --model with --prompts makes it on the way: got both",
                hint="leave one of them out",
            )
        if self.captures is None and (self.model is None or self.prompts is None):
            raise FluxIRError(
                "there must be data to train on: --captures, or --model with --prompts",
                hint="make captures with flux-ir collect, or pass --model flux-tiny --prompts prompts.txt",
            )
        if self.captures is not None and self.repeats is not None:
            raise FluxIRError("--repeats is for live data: got --captures", hint="leave it out, or raise --epochs")
        for name in ("lora", "lora_strength", "quantize"):
            if not live and getattr(self, name) is not None:
                raise FluxIRError(
                    f"--{name} is for live data, whose model is loaded here: got --captures",
                    hint="leave it out: captures are of the model that they were made with",
                )
        if live and self.epochs is not None:
            raise FluxIRError("live data come once: got --epochs", hint="pass --repeats or --max_tokens instead")
        if self.max_tokens is not None and self.epochs is not None:
            raise FluxIRError("--max_tokens and --epochs both say when to stop: got both", hint="leave one out")
        if live and self.site is None:
            raise FluxIRError("live data need a --site to record", hint="pass one such as --site single.6.img")

    def _check_architecture(self) -> None:
        """No option that the architecture has no use for: a sweep over it would train the same thing again."""
        if self.k is not None and self.arch not in HAS_K:
            hint = "pass --target_l0 instead" if self.arch == "jumprelu" else "pass --l1_coefficient instead"
            raise FluxIRError(f"{self.arch} is not given its k: got --k", hint=hint)
        if self.k_start is not None and self.arch not in HAS_K:
            raise FluxIRError(f"{self.arch} is not given its k: got --k_start", hint="leave it out")
        if self.k_start is not None and self.k is not None and self.k_start < max(self.k):
            raise FluxIRError(
                f"k comes down from --k_start, so it is at least --k {max(self.k)}: got {self.k_start}",
                hint="give a larger --k_start, or leave it out",
            )
        if self.whiten is not None and (self.arch == "topk" or self.tied):
            raise FluxIRError(
                "whitening gives every feature a length of its own, which the choice of the k largest and tied weights "
                f"cannot have: got --whiten and {'--tied' if self.tied else '--arch topk'}",
                hint="leave --tied out" if self.tied else "pass --arch batch_topk or matryoshka",
            )
        if self.whiten is not None and not self.normalise:
            raise FluxIRError("--whiten is a normalisation: got --normalise False", hint="leave one of them out")
        if self.l1_coefficient is not None and self.arch not in ("l1", "gated"):
            raise FluxIRError(f"{self.arch} has no L1 penalty: got --l1_coefficient", hint="it is for l1 and gated")
        if self.prefixes is not None and self.arch != "matryoshka":
            raise FluxIRError(f"{self.arch} has no nested dictionaries: got --prefixes", hint="it is for matryoshka")
        if self.target_l0 is not None and self.arch != "jumprelu":
            raise FluxIRError(f"{self.arch} does not steer its L0: got --target_l0", hint="it is for jumprelu")

    def to_json(self) -> dict[str, Any]:
        """The settings by name, as plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["lora"] = None if self.lora is None else tuple(map(str, self.lora))
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
