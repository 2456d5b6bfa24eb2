"""What an edit leaves to be measured: the code of a steering prompt, and how present a direction is at each site.

Both take one unsteered run. What comes out says the same in numbers, so it can be kept in a file and used anywhere.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flux_ir.errors import FluxIRError
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding, encode
from flux_ir.recording.recorder import MemorySink, Recorder, TextRecorder
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sampling.generate import noise_for, prepare, sample
from flux_ir.sampling.pictures import EncodedPictures
from flux_ir.sites import Site
from flux_ir.steering.apply import Steering
from flux_ir.steering.edits import Edit


def is_settled(edit: Edit) -> bool:
    """Whether an edit says everything in numbers."""
    return edit.prompt is None and edit.weights != "presence"


def stand_in(edit: Edit, steering: Steering) -> Edit:
    """The edit with numbers of no meaning for what is still to be measured, so that all else of it can be checked.

    `steering` is any of the run's: it reads autoencoders.
    """
    if edit.prompt is not None:
        sae = steering.sae_of(edit)
        edit = _of_vector(edit, sae, torch.ones(sae.config.d_in))
    return replace(edit, weights=1.0) if edit.weights == "presence" else edit


def settled(
    edit: Edit,
    steering: Steering,
    suite: Suite,
    text: TextEmbedding,
    *,
    seed: int,
    timesteps: Sequence[float],
    guidance: float,
    given: EncodedPictures = EncodedPictures(),  # noqa: B008 (it cannot be changed)
) -> Edit:
    """The edit in numbers. `steering` holds its stand-in alone; `text`, `seed` and `given` are those of the picture.

    A steering prompt is sampled from the same noise; its code is the mean over the tokens of its autoencoder's site, at
    each step, and over the prompt's own tokens in a text encoder.
    """
    run = _Run(suite, steering, seed, list(timesteps), guidance, given)
    if edit.prompt is not None:
        sae = steering.sae_of(edit)
        edit = _of_vector(edit, sae, run.code_of(edit.prompt, sae))
    if edit.weights == "presence":
        edit = replace(edit, weights=run.presence(text))
    return edit


def _of_vector(edit: Edit, sae: SparseAutoencoder, vector: Tensor) -> Edit:
    """The edit that adds a steering prompt's code, as one of a plain vector."""
    sites = edit.sites if edit.sites is not None else sae.config.site
    return replace(edit, sae=None, prompt=None, vector=vector, unit="raw", sites=sites)


class _Run:
    """One unsteered run of some prompt, listened to."""

    def __init__(
        self,
        suite: Suite,
        steering: Steering,
        seed: int,
        timesteps: list[float],
        guidance: float,
        given: EncodedPictures,
    ) -> None:
        self.suite, self.steering, self.seed, self.timesteps, self.guidance = suite, steering, seed, timesteps, guidance
        self.given = given

    @torch.no_grad()
    def record(self, text: TextEmbedding, sites: Sequence[Site]) -> MemorySink:
        """What these sites put out at every step."""
        grid, device = self.steering.grid, self.suite.placement.transformer
        noise = noise_for([self.seed], grid.height, grid.width, device, self.suite.dtype)
        inputs, first = self.given.put_into(prepare(noise, text, grid.height, grid.width)), self.given.first_step
        with self.suite.transformer() as model, Recorder(model, sites, first_step=first) as recorder:
            for _ in sample(model, inputs, self.timesteps, self.guidance, first_step=first):
                pass
        assert isinstance(recorder.sink, MemorySink)
        return recorder.sink

    @torch.no_grad()
    def code_of(self, prompt: str, sae: SparseAutoencoder) -> Tensor:
        """What the mean code of a prompt decodes to, b_dec not counted: [d], or [steps, d]."""
        site = Site.parse(str(sae.config.site))
        with self.suite.text_encoders() as encoders, TextRecorder(encoders, "t5.*,clip.*") as recorder:
            text = encode(encoders.t5, encoders.clip, [prompt])
        if site.per_prompt:
            encoder = encoders.t5 if site.kind == "t5" else encoders.clip
            used = min(encoder.length(prompt), encoder.max_tokens)
            assert isinstance(recorder.sink, MemorySink)
            tokens = recorder.sink.read(site)[0, :used].to(sae.W_dec.device)
            return sae.encode(tokens.float()).mean(dim=0) @ sae.W_dec
        sink = self.record(text, [site])
        steps = range(self.given.first_step, len(self.timesteps) - 1)
        by_step = [sink.read(site, step)[0].float().to(sae.W_dec.device) for step in steps]
        codes = [sae.encode(tokens).mean(dim=0) @ sae.W_dec for tokens in by_step]
        return torch.stack([torch.zeros_like(codes[0])] * self.given.first_step + codes)

    def presence(self, text: TextEmbedding) -> tuple[float, ...]:
        """The share of each site, by depth, in the mean cosine of the direction with the region's tokens."""
        (edit,) = self.steering.ready
        sink = self.record(text, list(edit.weights))
        cosines = []
        for site in sorted(edit.weights):
            inside = edit.inside(site, self.steering.txt_tokens, self.steering.tokens(site))
            means = []
            for step in sorted(edit.steps & set(range(self.given.first_step, len(self.timesteps) - 1))):
                tokens = sink.read(site, step)[0].float().to(self.steering.device)
                tokens = tokens if inside is None else tokens[inside]
                direction = edit.direction.rows(step).sum(dim=0, keepdim=True)
                means.append(cosine_similarity(tokens, direction).clamp_min(0).mean())
            cosines.append(float(torch.stack(means).mean()) if means else 0.0)
        if not sum(cosines) > 0:
            raise FluxIRError(
                "the direction points along no token of these sites, so its presence cannot weigh them",
                hint="give --weights as numbers, one per site",
            )
        return tuple(cosine / sum(cosines) for cosine in cosines)
