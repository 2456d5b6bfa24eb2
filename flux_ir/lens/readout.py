"""What each block would have predicted had it been the last: block output -> velocity -> latent.

The trained last layer applied at an earlier depth (the logit lens, nostalgebraist 2020), through the very functions the
sampler uses: read at the last single block, the `euler` reading is the sampler's next state, bit for bit, if the model
has the dtype that it sampled in. In another dtype the same reading is right to the rounding of the coarser one.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from flux_ir.errors import FluxIRError
from flux_ir.layout import Lens
from flux_ir.models.architecture import Transformer
from flux_ir.recording.reader import Capture
from flux_ir.sampling.denoise import clean_estimate, euler_step, per_sample
from flux_ir.shapes import Conditioning, ImgTokens, PackedLatent, Tokens, Velocity
from flux_ir.sites import Site


class Reading(NamedTuple):
    """One block read at one step, batch included. `euler`: the state it leads to; `x0`: the image it believes in.

    `fitted` is the image it believes in, read through a fitted lens; None where there is none.
    """

    step: int
    site: Site
    velocity: Velocity
    euler: PackedLatent
    x0: PackedLatent
    fitted_velocity: Velocity | None = None
    fitted: PackedLatent | None = None

    def latent(self, lens: Lens) -> PackedLatent:
        """The packed latent of one lens. That of a fitted one must have been read."""
        if lens in ("euler", "x0"):
            return self.euler if lens == "euler" else self.x0
        assert self.fitted is not None, "read_step was given no fitted lens"
        return self.fitted


@runtime_checkable
class VelocityReader(Protocol):
    """A fitted lens, as far as reading goes."""

    def velocity(self, model: Transformer, site: Site, step: int, img: ImgTokens, vec: Conditioning) -> Velocity:
        """The velocity that it reads from the image tokens of a block; `vec` is what the last layer is modulated by."""


def velocity_at(model: Transformer, block_output: Tokens, vec: Conditioning, *, txt_tokens: int = 0) -> Velocity:
    """The velocity [latent units per unit of flow time] the network would predict if it stopped at this block.

    A single-stream block carries text and image together: `txt_tokens` leading tokens are dropped (0 for the image half
    of a double-stream block).

    Raises FluxIRError if no image tokens are left.
    """
    img = block_output[:, txt_tokens:]
    if img.shape[1] == 0:
        raise FluxIRError(
            f"no image tokens left: the block output has {block_output.shape[1]} tokens and txt_tokens is {txt_tokens}",
            hint="pass the text length recorded with this step",
        )
    return model.read_out(img, vec)


def image_outputs(sites: Sequence[Site]) -> list[Site]:
    """The sites among these that a lens can read: image outputs of blocks, one per block, in depth order."""
    outputs = [
        site
        for site in sorted(set(sites))
        if site.part is None and site.stream in ("img", None) and not site.per_prompt
    ]
    return [site for site in outputs if site.whole == site or site.whole not in outputs]


def readable_sites(capture: Capture) -> list[Site]:
    """The captured sites a lens can read. Raises FluxIRError if there is none, or tokens of the picture are missing."""
    if capture.img_positions is not None:
        raise FluxIRError(
            f"a lens needs every image token, and {capture.path} keeps {len(capture.img_positions)} of them",
            hint="capture the picture again with all its tokens",
        )
    readable = image_outputs(capture.sites)
    if not readable:
        raise FluxIRError(
            f"a lens reads image outputs of blocks, and {capture.path} holds none: it has "
            f"{(*capture.sites, *capture.text_sites)[0]} and such",
            hint="capture again with sites such as double.*.img or single.*",
        )
    return readable


@torch.no_grad()
def read_step(
    model: Transformer,
    capture: Capture,
    step: int,
    sites: Sequence[Site] | None = None,
    *,
    fitted: VelocityReader | None = None,
) -> Iterator[Reading]:
    """Every readable block of one captured step, or these `sites`, in depth order, computed in the dtype of the model.

    One block's tensors are in memory at a time. Raises FluxIRError for a block whose reading is not finite.
    """
    device, dtype = model.img_in.weight.device, model.dtype
    context = capture.context(step)
    img, y = context.img.to(device, dtype), context.y.to(device, dtype)
    guidance = None if model.guidance_in is None else per_sample(context.guidance, img)
    vec = model.conditioning(per_sample(context.t_curr, img), y, guidance)
    for site in readable_sites(capture) if sites is None else sites:
        txt_tokens = context.txt_tokens if site.kind == "single" and site.stream is None else 0
        tokens = capture.read(site, step).to(device, dtype)
        velocity = velocity_at(model, tokens, vec, txt_tokens=txt_tokens)
        through = None if fitted is None else fitted.velocity(model, site, step, tokens[:, txt_tokens:], vec)
        if not velocity.isfinite().all() or (through is not None and not through.isfinite().all()):
            raise FluxIRError(
                f"{site} at step {step} of {capture.path} cannot be read: what it stands for is not finite",
                hint="the capture or the weights hold infinity or NaN: capture again with sound weights",
            )
        yield Reading(
            step,
            site,
            velocity,
            euler=euler_step(img, velocity, context.t_curr, context.t_prev),
            x0=clean_estimate(img, velocity, context.t_curr),
            fitted_velocity=through,
            fitted=None if through is None else clean_estimate(img, through, context.t_curr),
        )
