"""What all sparse autoencoders share: parameters, normalisation, raw space, surgery, folding.

Two spaces. Outside, everything is raw: `encode`, `decode`, `forward`, `surgery` take and give activations as the model
makes them. Inside, `features_of`, `sparse_features` and `loss` work on normalised tokens, which are about sqrt(d_in)
long: xn = norm_scale (x - norm_mean). What `encode` gives is in raw space too: the length a feature adds to the raw
reconstruction, the same before and after `folded`. Next: `topk`, the plainest architecture.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.config import HAS_K, SAEConfig
from flux_ir.sae.architectures.losses import FeatureRows, LossParts, Rows, TrainingState
from flux_ir.sae.kernels.choose import sparse_decode
from flux_ir.sae.kernels.products import PreActivations, Reconstruction

Activations = Float[Tensor, "*batch d_in"]
Features = Float[Tensor, "*batch d_sae"]


class SparseFeatures(NamedTuple):
    """Features of n tokens by index: `values` [n, k], never negative, at `indices` [n, k]; a value of 0 is padding."""

    values: Float[Tensor, "n k"]
    indices: Int[Tensor, "n k"]
    d_sae: int

    def dense(self) -> Tensor:
        """All features of each token: [n, d_sae]."""
        zeros = self.values.new_zeros(self.values.shape[0], self.d_sae)
        return zeros.scatter_add(1, self.indices, self.values)  # adding: padding may repeat an index


class SparseAutoencoder(nn.Module, ABC):
    """One autoencoder: x_hat = z W_dec + b_dec, z sparse. Parameters are float32, whatever the products are made in.

    Made by `architectures.make_sae` or `files.load_sae`; a bare one has zeros for weights.
    """

    in_feature_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers that are measured in activations, so that they shrink as tokens do."""
    norm_mean: Tensor
    norm_scale: Tensor

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.encoder = self.W_dec if config.tied else nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.register_buffer("norm_mean", torch.zeros(config.d_in))
        self.register_buffer("norm_scale", torch.ones(()))
        self.compute_dtype: torch.dtype | None = None
        """What the large products of training are rounded to; None: nothing is rounded."""
        self.encoder_bf16: Tensor | None = None
        """The bf16 copy of `encoder`, which the optimiser keeps fresh; None: it is rounded at each use."""
        self.decoder_bf16: Tensor | None = None
        """The bf16 copy of `W_dec`, likewise."""
        self.metadata: dict[str, Any] = {}
        """What is known of its training, as JSON can say it; kept with the file."""
        self.log_frequency: Tensor | None = None
        """log10 of the share of tokens each feature fires on [d_sae], kept with the file; None: not measured."""
        self.mean_active: Tensor | None = None
        """Mean activation of each feature over the tokens it fires on [d_sae], 0 if it never does, likewise kept."""
        self.max_active: Tensor | None = None
        """The largest activation of each feature, likewise. In the unit of `encode`, which is that of `surgery`."""

    def extra_repr(self) -> str:
        """What torch shows between the brackets of the class's name."""
        config = self.config
        return f"d_in={config.d_in}, d_sae={config.d_sae}" + (f", k={config.k}" if config.architecture in HAS_K else "")

    # Inside: normalised space

    @abstractmethod
    def features_of(self, xn: Rows) -> FeatureRows:
        """Features of normalised tokens, as they are after training."""

    @abstractmethod
    def loss(self, xn: Rows, state: TrainingState) -> LossParts:
        """One training step's loss on normalised tokens; gradients reach the parameters."""

    def sparse_features(self, xn: Rows) -> SparseFeatures:
        """`features_of` by index: as many columns as the token with the most features needs."""
        z = self.features_of(xn)
        most = int((z > 0).sum(dim=1).max()) if len(z) else 0
        values, indices = z.topk(max(1, most), dim=1)
        return SparseFeatures(values, indices, self.config.d_sae)

    def pre_activations(self, xn: Rows, bias: Float[Tensor, "d_sae"] | None) -> FeatureRows:
        """(xn - b_dec) W_enc [+ bias]."""
        dtype = self.compute_dtype or xn.dtype
        return PreActivations.apply(xn, self.encoder, bias, self.b_dec, self.encoder_bf16, dtype)

    def reconstruct(self, z: FeatureRows) -> Rows:
        """The normalised tokens that features stand for: z W_dec + b_dec."""
        dtype = self.compute_dtype or z.dtype
        return Reconstruction.apply(z, self.W_dec, self.decoder_bf16, dtype) + self.b_dec

    def keep_valid(self) -> None:
        """Put parameters back that a step of the optimiser moved out of range (thresholds). Most have no such."""

    def start_from(self, xn: Rows) -> None:
        """Set parameters that start at values of the data, once weights are drawn (thresholds). Most have no such."""

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale every row of W_dec to length 1. To be called after every step, so that no feature hides in its norm."""
        self.W_dec.copy_(nn.functional.normalize(self.W_dec, dim=1))

    # Outside: raw space

    @property
    def W_enc(self) -> Tensor:  # noqa: N802 (the field's name)
        """The encoder as the literature writes it, [d_in, d_sae]."""
        return self.encoder.T

    def set_normalisation(self, mean: Float[Tensor, "d_in"], scale: float | Tensor) -> None:
        """From now on tokens are normalised by scale (x - mean)."""
        if not (torch.isfinite(mean).all() and 0 < float(scale) < float("inf")):
            raise FluxIRError(
                f"tokens are normalised by a finite mean and a scale above 0: got scale {float(scale)}",
                hint="look for NaN in the activations, or for ones that are all equal",
            )
        smallest = torch.finfo(self.norm_scale.dtype).tiny
        if not smallest < float(scale) < 1 / smallest:
            raise FluxIRError(
                f"activations must be of a size that float32 holds in full: to normalise these, they would be "
                f"multiplied by {float(scale):.3g}",
                hint="multiply them by a constant that brings them near 1, and store them again",
            )
        self.norm_mean.copy_(mean)
        self.norm_scale.fill_(float(scale))

    def normalise(self, x: Activations) -> Activations:
        """Raw activations of any float dtype to normalised space, in the parameters' dtype."""
        if x.shape[-1] != self.config.d_in:
            raise FluxIRError(
                f"this autoencoder takes activations {self.config.d_in} wide: got {list(x.shape)}",
                hint=f"it was trained on {self.config.site or 'an array'} of {self.config.model or 'an unnamed model'}",
            )
        return (x.to(self.W_dec.dtype) - self.norm_mean) * self.norm_scale

    def encode(self, x: Activations) -> Features:
        """Features of raw activations, dense, never negative."""
        z = self.features_of(self.normalise(x).reshape(-1, self.config.d_in))
        return (z / self.norm_scale).reshape(*x.shape[:-1], self.config.d_sae)

    def encode_sparse(self, x: Activations) -> SparseFeatures:
        """`encode` by index, all tokens in one row: x of shape [..., d_in] gives values of shape [tokens, k]."""
        sparse = self.sparse_features(self.normalise(x).reshape(-1, self.config.d_in))
        return sparse._replace(values=sparse.values / self.norm_scale)

    def decode(self, features: Features) -> Activations:
        """The raw activations that features stand for."""
        return features.to(self.W_dec.dtype) @ self.W_dec + self._raw_b_dec()

    def forward(self, x: Activations) -> Activations:
        """The reconstruction of raw activations, in the parameters' dtype."""
        sparse = self.encode_sparse(x)
        return sparse_decode(sparse.values, sparse.indices, self.W_dec, self._raw_b_dec()).reshape(x.shape)

    def surgery(
        self,
        x: Activations,
        feature: int | Sequence[int] | None = None,
        strength: float | Sequence[float] | None = None,
        *,
        k: object = None,
    ) -> Activations:
        """Raw activations with `strength` added to the activation of one feature, or of several, on every token.

        That is decode(z + strength e_f) plus the error x - decode(z). The decoder is linear, so decode(z) cancels and
        what remains is x + strength W_dec[f], exactly: x is not encoded. Rows of W_dec have length 1 in what is trained
        here, so `strength` is the length of what is added, in the unit of x; other programs' rows have other lengths.
        At strength 0 the result is x itself.

        Several features take one strength, or one each. Raises FluxIRError for features there are not, and for `k`,
        which is what another program calls the feature.
        """
        if k is not None or feature is None or strength is None:
            raise FluxIRError(
                f"surgery takes a feature and a strength: got feature={feature}, strength={strength}, k={k}",
                hint=f"write surgery(x, feature={0 if k is None else k}, strength=1.0): k is how many are active",
            )
        numbers = [feature] if isinstance(feature, int) else list(feature)
        strengths = [strength] * len(numbers) if isinstance(strength, int | float) else list(strength)
        self._check_surgery(x, numbers, strengths)
        if not any(strengths):
            return x
        rows = self.W_dec.detach()[torch.tensor(numbers, device=self.W_dec.device)]
        change = torch.tensor(strengths, dtype=rows.dtype, device=rows.device) @ rows
        return (x.to(rows.dtype) + change).to(x.dtype)

    def _check_surgery(self, x: Tensor, numbers: list[int], strengths: list[float]) -> None:
        unknown = [number for number in numbers if not 0 <= number < self.config.d_sae]
        if unknown:
            raise FluxIRError(
                f"features are numbered 0 to {self.config.d_sae - 1}: got {unknown[0]}",
                hint="features of another autoencoder have other numbers",
            )
        if len(strengths) != len(numbers):
            raise FluxIRError(
                f"several features take one strength, or one each: got {len(numbers)} and {len(strengths)}",
                hint="give as many strengths as features",
            )
        if x.shape[-1] != self.config.d_in:
            self.normalise(x)  # says what is wrong

    @torch.no_grad()
    def folded(self) -> "SparseAutoencoder":
        """The same function with the normalisation in the weights: mean 0, scale 1. What files hold.

        z of raw space is z / scale, so everything in units of activations shrinks by it, and the set of active features
        stays. W_enc and W_dec stay as they are: unit rows stay unit rows.
        """
        self.keep_valid()
        same = copy.deepcopy(self)
        same.encoder_bf16 = same.decoder_bf16 = None
        for name in self.in_feature_units:
            getattr(same, name).div_(self.norm_scale)
        same.b_dec.copy_(self._raw_b_dec())
        same.norm_mean.zero_()
        same.norm_scale.fill_(1)
        return same

    def _raw_b_dec(self) -> Tensor:
        return self.norm_mean + self.b_dec / self.norm_scale
