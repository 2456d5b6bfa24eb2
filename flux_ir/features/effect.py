"""What a feature does to the output: how far the velocity moves per unit of its activation.

The decoder is linear, so at token t the derivative by the activation of feature f is that by the token, along the
feature's direction: dv / dz_f = (dv / dx_t) W_dec[f]. With random signs u the mean of (u . dv / dz_f)^2 is the squared
length of that column of the Jacobian (Hutchinson, 1990), so a few gradients of u . v serve all features at once.

Choosing features by what the output does, and not by what they respond to, is what makes them good ones to steer with
(Arad et al., 2025).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from flux_ir.activations.blocks import SampledSource
from flux_ir.errors import FluxIRError
from flux_ir.features.folder import FeatureFolder
from flux_ir.features.scoring import half_of
from flux_ir.models.architecture import Transformer
from flux_ir.models.registry import model_names
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.intervention import Intervention
from flux_ir.sampling.denoise import per_sample
from flux_ir.sampling.generate import Inputs, noise_for, prepare, sample
from flux_ir.shapes import PackedLatent, Tokens
from flux_ir.sites import Site, Stream

SIGN_VECTORS = 8
"""Draws of u, a backward pass each. More of them change the numbers less than other generations do."""


def gradients(
    model: Transformer,
    site: Site,
    inputs: Inputs,
    t_curr: float,
    guidance: float,
    *,
    generator: torch.Generator,
    sign_vectors: int = SIGN_VECTORS,
) -> Iterator[Tokens]:
    """The gradients of u . v by what `site` puts out, [batch, tokens, d], one for each vector u of random signs.

    `inputs.img` is the state at `t_curr`, from which one forward is run. The pictures of a batch do not see each other,
    so each row is the gradient of its own picture's velocity v.
    """
    added: list[Tensor] = []

    def add_zeros(value: Tokens, step: int) -> Tokens:
        """The value itself, and a leaf beside it that the gradient can be taken by."""
        added.append(torch.zeros_like(value, requires_grad=True))
        return value + added[0]

    # out = in + update, so the gradients by both are equal; an update is read as out - in, which has no gradient here.
    site_with_gradient = replace(site, part=None) if site.part == "update" else site
    img = inputs.img
    with torch.enable_grad(), Intervention(model, {site_with_gradient: add_zeros}):
        velocity = model(
            img,
            inputs.img_ids,
            inputs.txt,
            inputs.txt_ids,
            per_sample(t_curr, img),
            inputs.y,
            per_sample(guidance, img),
        )
    for left in reversed(range(sign_vectors)):
        signs = torch.randint(0, 2, velocity.shape, generator=generator).to(velocity) * 2 - 1
        yield torch.autograd.grad(velocity, added[0], signs, retain_graph=left > 0)[0]


class EffectMeter:
    """Adds up the squares of u . dv / dz_f over tokens and sign vectors, for all features at once."""

    def __init__(self, decoder: Float[Tensor, "d_sae d"]) -> None:
        """`decoder`: the rows of W_dec."""
        self.decoder = decoder.detach().float()
        d_sae, d = self.decoder.shape
        self._second_moment = torch.zeros(d, d, dtype=torch.float64)
        self._rows = 0
        self._squares, self._active = np.zeros(d_sae), np.zeros(d_sae, np.int64)

    def add(self, gradient: Float[Tensor, "tokens d"], token: NDArray[np.int64], feature: NDArray[np.int64]) -> None:
        """Add one gradient of u . v. Feature `feature[i]` is active on token `token[i]`, a row of `gradient`."""
        gradient = gradient.float()
        # E[g g^T], [d, d], serves all features at once: E[(g . w)^2] = w^T E[g g^T] w for a row w of W_dec.
        self._second_moment += (gradient.T @ gradient).double().cpu()
        self._rows += len(gradient)
        at, of = (torch.from_numpy(numbers).to(gradient.device) for numbers in (token, feature))
        for some in torch.split(torch.arange(len(token), device=gradient.device), max(1, 2**24 // gradient.shape[1])):
            moved = (gradient[at[some]] * self.decoder[of[some]]).sum(dim=1).double().square().cpu().numpy()
            self._squares += np.bincount(feature[some.cpu().numpy()], moved, minlength=len(self._squares))
        self._active += np.bincount(feature, minlength=len(self._active))

    def everywhere(self) -> NDArray[np.float64]:
        """Root mean square over all tokens, active or not [latent units per unit of flow time and of activation]:
        the square root of w^T E[g g^T] w for every row w of W_dec.
        """
        moment = (self._second_moment / max(1, self._rows)).float().to(self.decoder.device)
        squares = torch.cat([((part @ moment) * part).sum(dim=1) for part in torch.split(self.decoder, 8192)])
        return np.sqrt(np.maximum(squares.double().cpu().numpy(), 0))

    def where_active(self) -> NDArray[np.float64]:
        """The same over the tokens that each feature is active on; NaN for a feature that is active on none."""
        with np.errstate(invalid="ignore"):
            return np.sqrt(self._squares / np.where(self._active, self._active, np.nan))


def why_not_run(folder: FeatureFolder, source: object, model: str | None) -> str | None:
    """Why the model cannot be run on these generations, for a note; None if it can. `model` is the one asked for."""
    name = model or folder.settings.model
    if folder.settings.site is None or not isinstance(source, SampledSource):
        return "these activations are of no model that can be run"
    if name is None or (model is None and name not in model_names()):
        return f"these activations are of {name or 'a model without a name'}, which this program does not have"
    try:
        source.sampling(0)
    except FluxIRError as error:
        return error.message
    return None


def generations_for(folder: FeatureFolder, count: int) -> list[int]:
    """Generations to measure on: evenly spaced over the images, of different prompts; fewer if there are fewer."""
    first_of: dict[str, int] = {}
    for row in folder.images:
        first_of.setdefault(row.prompt, row.index)
    chosen = np.unique(np.linspace(0, len(first_of) - 1, count).round().astype(int))
    return [list(first_of.values())[number] for number in chosen]


def add_generation(
    meters: Mapping[Stream, EffectMeter],
    model: Transformer,
    folder: FeatureFolder,
    source: SampledSource,
    image: int,
    text: TextEmbedding,
    generator: torch.Generator,
) -> None:
    """Add one generation to the meter of each stream: one forward at every step that was scored.

    A forward starts from the stored state of its step, or, where none was stored, from one that is sampled again.
    """
    assert folder.settings.site is not None
    site, sampling = Site.parse(folder.settings.site), source.sampling(image)
    device, dtype = model.img_in.weight.device, model.dtype
    noise = noise_for([sampling.seed], sampling.height, sampling.width, device, dtype)
    inputs = prepare(noise, text, sampling.height, sampling.width)
    for step in folder.steps:
        state = source.state(image, step)
        img = _sampled_to(model, inputs, sampling.timesteps, sampling.guidance, step) if state is None else state[None]
        at_step = inputs._replace(img=img.to(device, dtype))
        for stream, meter in meters.items():
            part = folder.part_of(image, stream)
            positions = part.positions[image - part.images.start]
            there, active = positions >= 0, part.token_features(image, step)
            # A gradient is given a row for each token that was scored: what was active on a token is on this row.
            token = (np.cumsum(there) - 1)[np.repeat(np.arange(part.tokens), np.diff(active.ptr))]
            rows = torch.from_numpy(positions[there].astype(np.int64)).to(device)
            of_stream = half_of(site, stream)
            assert of_stream is not None
            t_curr = sampling.timesteps[step]
            for gradient in gradients(model, of_stream, at_step, t_curr, sampling.guidance, generator=generator):
                meter.add(gradient[0, rows], token, active.feature)


def _sampled_to(
    model: Transformer, inputs: Inputs, timesteps: tuple[float, ...], guidance: float, step: int
) -> PackedLatent:
    """The state that a step begins with, from noise on."""
    return next(one.before for one in sample(model, inputs, list(timesteps), guidance) if one.number == step)
