"""Feed-forward neurons of the tokens of a part, for collections that did not keep them: one step, run once more."""

from dataclasses import replace

import torch
from torch import Tensor

from flux_ir.activations.blocks import NoisySource, SampledSource
from flux_ir.collecting.embeddings import embed_prompts
from flux_ir.errors import FluxIRError
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding
from flux_ir.recording.intervention import Intervention
from flux_ir.sampling.denoise import per_sample
from flux_ir.sampling.generate import noise_for, prepare
from flux_ir.shapes import Tokens
from flux_ir.sites import Site
from flux_ir.studies.part import Part

_BATCH = 16


def neurons_site(part: Part) -> Site | None:
    """The site of the neurons in the block of a part's site; None: it is no site of the transformer."""
    return None if part.site is None else replace(part.site, part="neurons")


def has_neurons(part: Part) -> bool:
    """Whether the collection kept them."""
    site = neurons_site(part)
    return site is not None and bool({site, site.whole} & set(part.source.sites))


def stored_neurons(part: Part) -> Tensor:
    """The neurons of every token as they were kept: [images * tokens, neurons]."""
    return replace(part, site=neurons_site(part)).values()


def run_neurons(part: Part, suite: Suite) -> Tensor:
    """The same from the model, which is run for one step from the noisy latents that the collection kept.

    Raises FluxIRError where it kept none, or not of all patches.
    """
    site, source = neurons_site(part), part.source
    if site is None or not isinstance(source, NoisySource) or not isinstance(source, SampledSource):
        raise FluxIRError(
            "neurons are computed from the noisy latents of a collection of flux-ir collect: these captures have none",
            hint="leave --run_model out",
        )
    first = source.sampling(0)
    with suite.text_encoders() as encoders:
        prompts = list(dict.fromkeys(part.labels.prompts))
        embedded = dict(zip(prompts, embed_prompts(encoders, prompts), strict=True))
    found: list[Tensor] = []

    def keep(value: Tokens, step: int) -> Tokens:
        found.append(value.to("cpu", torch.bfloat16))
        return value

    device, dtype, step = suite.placement.transformer, suite.dtype, part.step
    noise = noise_for([0], first.height, first.width, device, dtype)  # for its shape
    with suite.transformer() as model, Intervention(model, {site: keep}), torch.no_grad():
        for rows, read, kept in part.reads():
            latents = source.noisy(read, step)[torch.from_numpy(kept)]
            for places in torch.split(torch.arange(len(rows)), _BATCH):
                texts = zip(*(embedded[part.labels.prompts[rows[int(i)]]].text for i in places), strict=True)
                of_batch = noise.expand(len(places), -1, -1, -1)
                inputs = prepare(of_batch, TextEmbedding(*map(torch.cat, texts)), first.height, first.width)
                img = latents[places].to(device, dtype)
                if img.shape != inputs.img.shape:
                    raise FluxIRError(
                        f"neurons are computed from the latents of all {inputs.img.shape[1]} patches: the collection "
                        f"kept {img.shape[1]} of a picture",
                        hint="leave --run_model out, or collect without --tokens_per_image",
                    )
                time, guidance = per_sample(first.timesteps[step], img), per_sample(first.guidance, img)
                model(img, inputs.img_ids, inputs.txt, inputs.txt_ids, time, inputs.y, guidance)
    return torch.cat(found).flatten(0, 1)
