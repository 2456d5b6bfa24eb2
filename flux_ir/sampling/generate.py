"""From noise and text to steps (`denoise`), and from the last step to pixels. Pictures of a batch are independent.

These take networks that are on their devices already; `flux_ir.api.models` has the public calls of the same names,
which take a loaded model.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flux_ir.errors import FluxIRError
from flux_ir.models.architecture import Transformer
from flux_ir.models.autoencoder import AutoEncoder
from flux_ir.models.compute_dtype import choose_dtype
from flux_ir.models.text import TextEmbedding
from flux_ir.sampling.denoise import Step, denoise
from flux_ir.sampling.latents import TOKEN_PX, get_noise, image_ids, pack, reference_ids, text_ids, unpack
from flux_ir.shapes import CondLatent, Context, Image, Latent, PackedLatent, Pixels, Pooled, PositionIds
from flux_ir.threads import in_order


class Inputs(NamedTuple):
    """What the transformer is called with at the first step, for a batch of prompts; later steps change `img` alone."""

    img: PackedLatent
    img_ids: PositionIds
    txt: Context
    txt_ids: PositionIds
    y: Pooled
    cond: CondLatent | None = None
    """The tokens of a reference picture, for models that take one: the same at every step."""
    cond_ids: PositionIds | None = None

    def with_reference(self, cond: CondLatent, height: int, width: int) -> "Inputs":
        """The same with the packed latent of a reference picture of this size [px], the same one for every prompt."""
        batch = self.img.shape[0]
        ids = reference_ids(batch, height, width).to(self.img.device)
        return self._replace(cond=cond.to(self.img).expand(batch, -1, -1), cond_ids=ids)

    def begun_with(self, picture: PackedLatent, t: float) -> "Inputs":
        """The same begun with a picture's packed latent: (1 - t) picture + t noise, for a schedule entered at time t.

        At t = 1 it is the noise, bit for bit.
        """
        if t == 1:
            return self
        return self._replace(img=t * self.img + (1 - t) * picture.to(self.img))


def check_size(height: int, width: int) -> None:
    """Raises FluxIRError unless both sides are whole numbers of tokens: nothing is rounded behind the user's back."""
    if height > 0 and width > 0 and height % TOKEN_PX == 0 and width % TOKEN_PX == 0:
        return
    nearest = [max(TOKEN_PX, round(side / TOKEN_PX) * TOKEN_PX) for side in (width, height)]
    raise FluxIRError(
        f"width and height must be positive multiples of {TOKEN_PX} px: got {width} x {height}",
        hint=f"try --width {nearest[0]} --height {nearest[1]}",
    )


def check_steps(steps: Iterable[int] | None, num_steps: int, first_step: int = 0) -> list[int]:
    """The steps to keep, in order, each once. Raises FluxIRError for one that the schedule does not have, or that is
    before the first one that is run.
    """
    chosen = sorted(set(range(first_step, num_steps) if steps is None else steps))
    if beyond := [step for step in chosen if not 0 <= step < num_steps]:
        raise FluxIRError(
            f"--steps counts from 0 to {num_steps - 1} with {num_steps} steps: got {', '.join(map(str, beyond))}",
            hint="choose other --steps or more --num_steps",
        )
    if before := [step for step in chosen if step < first_step]:
        raise FluxIRError(
            f"begun with a picture, the run has the steps from {first_step} to {num_steps - 1}: "
            f"got {', '.join(map(str, before))} in --steps",
            hint="choose later ones, or more --strength",
        )
    return chosen


def noise_for(seeds: list[int], height: int, width: int, device: torch.device | str, dtype: torch.dtype) -> Latent:
    """One latent of noise per seed: a picture's noise does not depend on the batch it is drawn in."""
    return torch.cat([get_noise(1, height, width, device, dtype, seed) for seed in seeds])


def prepare(noise: Latent, text: TextEmbedding, height: int, width: int) -> Inputs:
    """Noise and text as the transformer takes them: packed, with positions, on the noise's device and in its dtype."""
    batch, txt_tokens = text.txt.shape[:2]
    if batch != noise.shape[0]:
        raise FluxIRError(
            f"every prompt needs its own noise: got {batch} prompts and noise for {noise.shape[0]}",
            hint="draw noise with one seed per prompt",
        )
    return Inputs(
        img=pack(noise),
        img_ids=image_ids(batch, height, width).to(noise.device),
        txt=text.txt.to(noise.device, noise.dtype),
        txt_ids=text_ids(batch, txt_tokens).to(noise.device),
        y=text.y.to(noise.device, noise.dtype),
    )


def sample(
    model: Transformer, inputs: Inputs, timesteps: list[float], guidance: float, *, first_step: int = 0
) -> Iterator[Step]:
    """The steps from noise (or `first_step`) to picture. The last one's `after` is the finished packed latent."""
    img, img_ids, txt, txt_ids, y, cond, cond_ids = inputs
    args = img, img_ids, txt, txt_ids, y, timesteps, guidance
    return denoise(model, *args, cond=cond, cond_ids=cond_ids, first_step=first_step)


def decode(
    autoencoder: AutoEncoder, packed: PackedLatent, height: int, width: int, dtype: torch.dtype | None = None
) -> Pixels:
    """Packed latents as pictures, uint8 [batch, height, width, 3] on the CPU.

    `dtype` is what the convolutions compute in (None: what suits the device). Decoded from float32 latents; in bfloat16
    under autocast, as the published sampler does. A CPU decodes pictures side by side, a GPU the whole batch at once.
    """
    device = autoencoder.decoder.conv_in.weight.device
    dtype = dtype or choose_dtype("auto", [str(device)]).dtype
    latents = unpack(packed.float(), height, width).to(device)
    if device.type == "cpu":
        return side_by_side(partial(_decode_together, autoencoder, dtype), latents, height * width)
    return _decode_together(autoencoder, dtype, latents)


@torch.no_grad()
def _decode_together(autoencoder: AutoEncoder, dtype: torch.dtype, latents: Latent) -> Pixels:
    # Convolutions are fastest with channels last, and every layer leaves them so.
    latents = latents.contiguous(memory_format=torch.channels_last)
    with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
        return to_pixels(autoencoder.decode(latents))


def encode(autoencoder: AutoEncoder, pixels: Pixels) -> PackedLatent:
    """Pictures, uint8 [batch, height, width, 3], as packed latents: the twin of `decode`.

    The mean of each latent, so that a picture always gives the same one. In float32, as the published sampler does.
    """
    device = autoencoder.encoder.conv_in.weight.device
    pictures = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(device)
    if device.type == "cpu":
        side = partial(_encode_together, autoencoder)
        return pack(side_by_side(side, pictures, pixels.shape[1] * pixels.shape[2]))
    return pack(_encode_together(autoencoder, pictures))


@torch.no_grad()
def _encode_together(autoencoder: AutoEncoder, pictures: Image) -> Latent:
    return autoencoder.encode(pictures)


_MIDDLE = 16  # latent pixels along each side: 128 px
OTHER_FAMILY = 0.5
"""A larger `round_trip_error` is that of another family's autoencoder: half-way between the numbers measured there."""


@torch.no_grad()
def round_trip_error(autoencoder: AutoEncoder, packed: PackedLatent, height: int, width: int) -> float:
    """||encode(decode(z)) - z|| / ||z|| of the latents z of a finished picture, in float32, for the picture's middle.

    Small for the autoencoder that the transformer was trained with (0.25 with flux-tiny's, because the middle is cut
    out of its surroundings). The autoencoder of another family with the same tensors, whose own latents are r times as
    large, gives 1 - r: 0.76 for Stable Diffusion 3's.
    """
    latents = unpack(packed.float(), height, width)
    top, left = ((side - min(side, _MIDDLE)) // 2 for side in latents.shape[-2:])
    middle = latents[..., top : top + _MIDDLE, left : left + _MIDDLE]
    picture = autoencoder.decode(middle.to(autoencoder.decoder.conv_in.weight.device)).clamp(-1, 1)
    again = autoencoder.encode(picture.to(autoencoder.encoder.conv_in.weight.device)).to(middle.device)
    return float((again - middle).norm() / middle.norm())


def to_pixels(pictures: torch.Tensor) -> Pixels:
    """Pictures [batch, 3, h, w] in [-1, 1] as uint8 [batch, h, w, 3] on the CPU, clamped.

    Raises FluxIRError for values that are not finite: as bytes they would be black.
    """
    if not pictures.isfinite().all():
        raise FluxIRError(
            "the autoencoder put out values that are not finite: there is no picture",
            hint="check its weights for infinity and NaN, or try --dtype float32",
        )
    scaled = 127.5 * pictures.float().clamp(-1, 1) + 127.5
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


# ---- Pictures on a CPU: several at a time, each on its own share of the cores.
# Threads that share a small picture wait for each other at every layer, and all the more where other programs run;
# those that have one each never do. What a picture's share is depends on its size alone, so that a picture has the same
# bits by itself and among others.


PIXELS_PER_THREAD = 256 * 256  # with fewer, a second thread gains less than it waits


def threads_per_picture(pixels: int, threads: int) -> int:
    """How many of `threads` work on a picture of so many pixels."""
    return min(threads, max(1, pixels // PIXELS_PER_THREAD))


def side_by_side(work: Callable[[Tensor], Tensor], batch: Tensor, pixels: int) -> Tensor:
    """`work(batch)` on the CPU, row by row: `pixels` is the size of the picture that each row stands for.

    One row at a time is also faster than several together: what a layer hands to the next stays in the cache.
    """
    available = torch.get_num_threads()
    share = threads_per_picture(pixels, available)
    workers = available // share
    return torch.cat(list(in_order(work, batch.chunk(len(batch)), workers, torch_threads=share)))
