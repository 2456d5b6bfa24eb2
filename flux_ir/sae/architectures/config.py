"""What defines a sparse autoencoder before any data is seen: its architecture, sizes, penalties, start and seed.

A saved one has the same fields under `metadata.flux_ir.config` (`files`). Next: `sparse_autoencoder`.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from flux_ir.errors import FluxIRError

Architecture = Literal["topk", "batch_topk", "l1", "jumprelu", "gated", "matryoshka"]
DecoderInit = Literal["random", "orthogonal"]
EncoderInit = Literal["transposed", "random", "orthogonal"]
BiasInit = Literal["mean", "geometric_median"]

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
HAS_K: tuple[Architecture, ...] = ("topk", "batch_topk", "matryoshka")
"""The architectures that are given their number of active features."""

_CHOICES = {
    "architecture": ARCHITECTURES,
    "decoder_init": get_args(DecoderInit),
    "encoder_init": get_args(EncoderInit),
    "bias_init": get_args(BiasInit),
}
_PREFIX_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


@dataclass(frozen=True)
class SAEConfig:
    """Everything about a sparse autoencoder that is not learnt. Raises FluxIRError for values that cannot be.

    Lengths are in normalised space, where a token is about sqrt(d_in) long.
    """

    architecture: Architecture
    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of features."""
    k: int = 32
    """Active features per token (topk), or on average over a batch (batch_topk, matryoshka)."""
    k_aux: int | None = None
    """Dead features that explain the residual of each token; None: d_in / 2 (Gao et al. 2024, A.2); 0: none do."""
    aux_coefficient: float = 1 / 32
    """Weight of that auxiliary loss (Gao et al. 2024)."""
    l1_coefficient: float | None = None
    """lambda of l1 and gated, after warm-up; None: sqrt(d_in) / 5, which weighs as much at every width (the error grows
    as d_in, the penalty as sqrt(d_in)) and is the 5 of Conerly et al. 2024 at 625. On flux-tiny: about 40 active."""
    l0_coefficient: float | None = None
    """lambda of jumprelu, after warm-up; None: 1 with `target_l0`, else 0.001."""
    target_l0: float | None = None
    """jumprelu: mean active features per token to steer for; None: the penalty grows with L0 itself."""
    bandwidth: float = 0.001
    """jumprelu: width of the kernel that gives thresholds their gradient, in token lengths (Rajamanoharan et al. 2024b
    measure it where tokens have length 1); here times sqrt(d_in)."""
    threshold_decay: float = 0.999
    """batch_topk, matryoshka: decay per step, at most, of the running mean of the smallest kept activation."""
    prefixes: tuple[int, ...] = ()
    """matryoshka: sizes of the nested dictionaries, ascending, the last d_sae; (): 1/16, 1/8, 1/4, 1/2 and all."""
    tied: bool = False
    """Whether the encoder is the decoder transposed throughout, not only at the start."""
    decoder_init: DecoderInit = "random"
    """Directions of the decoder at the start: independent, or orthonormal within each d_in of them."""
    encoder_init: EncoderInit = "transposed"
    """The encoder at the start: the decoder transposed, or rows of its own."""
    bias_init: BiasInit = "mean"
    """b_dec at the start: of a sample of tokens. The geometric median is less moved by a few huge ones."""
    seed: int = 0
    whitened: bool = False
    """Whether it was trained on whitened tokens (`whitening`), so that each feature has a threshold of its own."""
    site: str | None = None
    """Where the activations come from; None for plain arrays."""
    model: str | None = None
    steps: tuple[int, ...] | None = None
    """The denoising steps it was trained on; None: unknown."""

    def __post_init__(self) -> None:
        _check_choices(asdict(self))
        self._check_sizes()
        self._check_penalties()
        if self.whitened and (self.architecture == "topk" or self.tied):
            raise FluxIRError(
                "whitening gives every feature a length of its own, which the choice of the k largest and tied weights "
                f"cannot have: got {self.architecture}{', tied' if self.tied else ''}",
                hint="train batch_topk or matryoshka, with weights that are not tied",
            )
        if self.tied and self.encoder_init != "transposed":
            raise FluxIRError(
                f"tied weights start as the decoder transposed: got encoder_init {self.encoder_init!r}",
                hint='leave encoder_init at "transposed", or do not tie',
            )

    def _check_sizes(self) -> None:
        for name in ("d_in", "d_sae", "k"):
            if getattr(self, name) < 1:
                raise FluxIRError(f"{name} must be at least 1: got {getattr(self, name)}", hint=f"give a larger {name}")
        if self.architecture in HAS_K and self.k > self.d_sae:
            raise FluxIRError(
                f"k cannot be above the number of features: got k {self.k} of {self.d_sae}",
                hint="lower k, or raise the expansion",
            )
        if self.k_aux is not None and self.k_aux < 0:
            raise FluxIRError(f"k_aux must be at least 0: got {self.k_aux}", hint="0 turns the auxiliary loss off")
        ascending = list(self.prefixes) == sorted(set(self.prefixes)) and min(self.prefixes, default=1) >= 1
        if self.prefixes and not (ascending and self.prefixes[-1] == self.d_sae):
            raise FluxIRError(
                f"prefixes must ascend from at least 1 to d_sae = {self.d_sae}: got {list(self.prefixes)}",
                hint="leave prefixes out for sixteenth, eighth, quarter, half and whole",
            )

    def _check_penalties(self) -> None:
        for name in ("aux_coefficient", "l1_coefficient", "l0_coefficient"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise FluxIRError(f"{name} must be a number of at least 0: got {value}", hint="0 turns it off")
        for name in ("bandwidth", "target_l0"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise FluxIRError(f"{name} must be above 0: got {value}", hint=f"give a positive {name}")
        if not 0 <= self.threshold_decay < 1:
            raise FluxIRError(
                f"threshold_decay must be in [0, 1): got {self.threshold_decay}", hint="0.999 averages 1,000 steps"
            )

    @property
    def aux_features(self) -> int:
        """How many dead features explain the residual of each token."""
        return min(self.d_in // 2 if self.k_aux is None else self.k_aux, self.d_sae)

    @property
    def nested_sizes(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries of a matryoshka, ascending."""
        shares = sorted({max(1, round(share * self.d_sae)) for share in _PREFIX_SHARES})
        return self.prefixes or tuple(shares)

    @property
    def l1_weight(self) -> float:
        """The lambda of the L1 penalty."""
        return math.sqrt(self.d_in) / 5 if self.l1_coefficient is None else self.l1_coefficient

    @property
    def l0_weight(self) -> float:
        """The lambda of the L0 penalty."""
        if self.l0_coefficient is not None:
            return self.l0_coefficient
        return 0.001 if self.target_l0 is None else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON can say it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "SAEConfig":
        """The config `to_dict` gave. Raises FluxIRError for missing and unknown fields."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(stored) - known)
        missing = [name for name in ("architecture", "d_in", "d_sae") if name not in stored]
        if unknown or missing:
            faults = [f"it lacks {', '.join(missing)}"] if missing else []
            faults += [f"it has {', '.join(unknown)}, which this version does not know"] if unknown else []
            raise FluxIRError(
                f"the config of a sparse autoencoder must have the fields of SAEConfig: {'; '.join(faults)}",
                hint="it may come from a newer version of flux-ir",
            )
        _check_choices(stored)
        values: dict[str, Any] = dict(stored)
        for name in ("prefixes", "steps"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])  # JSON has lists
        return cls(**values)


def _check_choices(values: Mapping[str, Any]) -> None:
    for name, choices in _CHOICES.items():
        if name in values and values[name] not in choices:
            nearest = difflib.get_close_matches(str(values[name]), choices, n=1, cutoff=0.0)[0]
            raise FluxIRError(
                f"{name} must be one of {', '.join(choices)}: got {values[name]!r}", hint=f"the nearest is {nearest}"
            )
