"""Reconstructions put back into the model that was captured, on held-out prompts with their own noise."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from flux_ir.activations.blocks import SampledSource, Sampling
from flux_ir.api.evaluation_files import EvaluateSAESettings
from flux_ir.api.progress import Note, Watch, follow, phase
from flux_ir.collecting.embeddings import EmbeddedPrompt, embed_prompts
from flux_ir.errors import FluxIRError
from flux_ir.models.checkpoints.locate import locate_model
from flux_ir.models.compute_dtype import choose_dtype
from flux_ir.models.placement import plan
from flux_ir.models.registry import get_spec
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.data.held_out import EvaluationData
from flux_ir.sae.evaluation.fit_baselines import BaselineFits
from flux_ir.sae.evaluation.metrics import rounded
from flux_ir.sae.evaluation.splice import (
    Replace,
    SpliceMeter,
    SpliceNumbers,
    mean_ablation,
    reconstruction,
    recovered,
    zero_ablation,
)
from flux_ir.sampling.generate import decode, noise_for, prepare
from flux_ir.sites import Site, check_sites

ANCHORS = ("zero", "mean")


class Splicer:
    """The model, loaded when the first autoencoder asks for it, and the prompts that were embedded for it."""

    def __init__(
        self, settings: EvaluateSAESettings, model: str | None, recorded: torch.dtype, progress: Watch
    ) -> None:
        name = settings.model or model
        if name is None:
            raise FluxIRError("the captures do not say which model they are of", hint="name it with --model")
        self.settings, self.progress = settings, progress
        self.spec = get_spec(name)
        self.placement = plan(torch.cuda.device_count(), device=settings.device)
        self.compute = choose_dtype(settings.dtype, self.placement.devices, recorded=recorded)
        self._embedded: dict[str, EmbeddedPrompt] = {}

    @cached_property
    def suite(self) -> Suite:
        """The model's parts."""
        settings = self.settings
        source = locate_model(
            self.spec,
            settings.checkpoint,
            settings.ae_checkpoint,
            autoencoder=settings.splice and settings.pictures,
            announce=lambda text: self.progress(Note(text)),
        )
        self.progress(Note(f"{self.spec.name} computes in {self.compute}"))
        if self.compute.warning is not None:
            self.progress(Note(f"note: {self.compute.warning}"))
        return Suite(self.spec, source, self.placement, self.compute.dtype)

    def check(self, subject: EvaluationData) -> Site:
        """The subject's site. Raises FluxIRError, before anything is loaded, if it cannot be spliced."""
        if subject.site is None:
            raise FluxIRError("a plain array is of no model to splice into", hint="leave out --splice")
        check_sites([subject.site], self.spec.flux.depth, self.spec.flux.depth_single_blocks)
        last = len(_sampled(subject).sampling(0).timesteps) - 2
        if any(step > last for step in self.settings.splice_steps or ()):
            raise FluxIRError(
                f"a splice is at steps that were sampled, 0 to {last}: got {max(self.settings.splice_steps or ())}",
                hint="leave out --splice_steps for those that were captured",
            )
        return subject.site

    def measure(self, sae: SparseAutoencoder, subject: EvaluationData, fits: BaselineFits, k: int) -> dict[str, Any]:
        """What the splices of one autoencoder and of its anchors come to, as `metrics.json` has it."""
        site = self.check(subject)
        runs = held_out_runs(subject, self.settings.prompts)
        self._embed([run.prompt for run in runs])
        steps = self.settings.splice_steps or tuple(subject.filters.steps_of(subject.source.steps))
        with self.suite.transformer() as model:
            meter = SpliceMeter(model, site, replacements(sae, fits, k), steps=steps)
            batches = list(self._batches(runs))
            for batch in follow(self.progress, f"splice {site}", batches, total=len(batches)):
                self._add(meter, batch)
        return as_json(meter.result(), runs=len(runs), steps=steps, dtype=self.compute.name)

    def _add(self, meter: SpliceMeter, runs: list[Sampling]) -> None:
        first = runs[0]
        device, dtype = self.placement.transformer, self.compute.dtype
        noise = noise_for([run.seed for run in runs], first.height, first.width, device, dtype)
        parts = zip(*(self._embedded[run.prompt].text for run in runs), strict=True)
        inputs = prepare(noise, TextEmbedding(*map(torch.cat, parts)), first.height, first.width)
        latents = meter.add(inputs, list(first.timesteps), first.guidance)
        if self.settings.pictures:
            with self.suite.autoencoder() as autoencoder:
                meter.add_pictures(
                    {
                        name: decode(autoencoder, latent, first.height, first.width, dtype)
                        for name, latent in latents.items()
                    }
                )

    def _batches(self, runs: list[Sampling]) -> Iterator[list[Sampling]]:
        for _, alike in groupby(runs, key=lambda run: run.shape):
            together = list(alike)
            for start in range(0, len(together), self.settings.splice_batch):
                yield together[start : start + self.settings.splice_batch]

    def _embed(self, prompts: list[str]) -> None:
        missing = [prompt for prompt in prompts if prompt not in self._embedded]
        if missing:
            with phase(self.progress, "text"), self.suite.text_encoders() as encoders:
                self._embedded |= zip(missing, embed_prompts(encoders, missing), strict=True)


def replacements(sae: SparseAutoencoder, fits: BaselineFits, k: int) -> dict[str, Replace]:
    """What is put in place: the reconstruction, the same with its error, PCA of the same rank, the mean, nothing."""
    return {
        "sae": reconstruction(sae, sae.config.d_sae),
        "sae_with_error": reconstruction(sae, sae.config.d_sae, keep_error=True),
        "pca": reconstruction(fits.pca(k), k),
        "mean": mean_ablation(fits.mean),
        "zero": zero_ablation,
    }


def held_out_runs(subject: EvaluationData, most: int) -> list[Sampling]:
    """The first held-out generations, one per prompt. Raises FluxIRError where files do not say how they were made."""
    source, runs = _sampled(subject), dict[str, Sampling]()
    for number, generation in enumerate(source.generations):
        if len(runs) == most:
            break
        if generation.prompt not in runs and subject.split.has(subject.side, generation.id, generation.prompt):
            runs[generation.prompt] = source.sampling(number)
    return list(runs.values())


def recorded_dtype(subject: EvaluationData) -> torch.dtype:
    """What the captured model computed in. Raises FluxIRError where files do not say how they were made."""
    return _sampled(subject).sampling(0).dtype


def _sampled(subject: EvaluationData) -> SampledSource:
    if not isinstance(subject.source, SampledSource):
        where = subject.source.generations[0].path or "a plain array"
        raise FluxIRError(
            f"a splice runs the captured generations again, from their prompt and seed: got {where}",
            hint="use captures made with flux-ir capture or flux-ir collect, or leave out --splice",
        )
    return subject.source


def as_json(results: Mapping[str, SpliceNumbers], *, runs: int, steps: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """The numbers of every replacement with what it recovered of each ablation, overall and per step."""
    rows: dict[str, Any] = {}
    for name, numbers in results.items():
        per_step = numbers.velocity_mse_per_step
        rows[name] = {
            "velocity_mse": rounded(numbers.velocity_mse),
            "velocity_mse_per_step": {str(step): rounded(value) for step, value in per_step.items()},
            "image_mse": None if numbers.image_mse is None else rounded(numbers.image_mse),
            "image_psnr_db": None if numbers.image_psnr_db is None else rounded(numbers.image_psnr_db),
        }
        for anchor in ANCHORS:
            ablated = results[anchor]
            rows[name][f"recovered_from_{anchor}"] = rounded(recovered(numbers.velocity_mse, ablated.velocity_mse))
            rows[name][f"recovered_from_{anchor}_per_step"] = {
                str(step): rounded(recovered(value, ablated.velocity_mse_per_step[step]))
                for step, value in per_step.items()
            }
    return {"generations": runs, "steps": list(steps), "dtype": dtype, "replacements": rows}
