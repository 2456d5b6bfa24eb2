"""The captured model run again, with something put in the place of what one site computed.

Each held-out generation runs from its own prompt, seed and settings, so that nothing differs but the replacement.
`sae.evaluation.splice` defines the numbers; here are the model, its prompts and its batches.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from flux_ir.activations.blocks import SampledSource, Sampling
from flux_ir.api.model_settings import ModelSettings
from flux_ir.api.progress import Note, Watch, follow, phase
from flux_ir.collecting.embeddings import EmbeddedPrompt, embed_prompts
from flux_ir.errors import FluxIRError
from flux_ir.models.suite import Suite
from flux_ir.models.text import TextEmbedding
from flux_ir.sae.data.held_out import EvaluationData
from flux_ir.sae.evaluation.metrics import rounded
from flux_ir.sae.evaluation.splice import (
    Replace,
    SpliceMeter,
    SpliceNumbers,
    recovered,
)
from flux_ir.sampling.generate import decode, noise_for, prepare
from flux_ir.sites import Site, check_sites

ANCHORS = ("zero", "mean")


class Splicer:
    """The model, loaded when the first autoencoder asks for it, and the prompts that were embedded for it.

    `steps` are those to splice at (None: those of the autoencoder), `batch_size` how many generations go through the
    model together; with `pictures` they run to the end and are decoded. `recorded` is the dtype of the captured run.
    """

    def __init__(
        self,
        model: ModelSettings,
        recorded: torch.dtype,
        *,
        steps: tuple[int, ...] | None,
        batch_size: int,
        pictures: bool,
        progress: Watch,
    ) -> None:
        if model.model is None:
            raise FluxIRError("the captures do not say which model they are of", hint="name it with --model")
        self.model, self.spec = model, model.spec
        self.steps, self.batch_size, self.pictures, self.progress = steps, batch_size, pictures, progress
        self.machine = model.settle_machine(recorded=recorded)
        self._embedded: dict[str, EmbeddedPrompt] = {}

    @cached_property
    def suite(self) -> Suite:
        """The model's parts."""
        suite = self.model.suite(self.machine, self.progress, autoencoder=self.pictures)
        for note in (f"{self.spec.name} computes in {self.machine.compute}", *self.machine.notes()):
            self.progress(Note(note))
        return suite

    def check(self, data: EvaluationData) -> Site:
        """The site of these tokens. Raises FluxIRError, before anything is loaded, if it cannot be spliced."""
        if data.site is None:
            raise FluxIRError("a plain array is of no model to splice into", hint="leave out --splice")
        check_sites([data.site], self.spec.flux.depth, self.spec.flux.depth_single_blocks)
        last = len(_sampled(data).sampling(0).timesteps) - 2
        if any(step > last for step in self.steps or ()):
            raise FluxIRError(
                f"a splice is at steps that were sampled, 0 to {last}: got {max(self.steps or ())}",
                hint="leave out --splice_steps for those that were captured",
            )
        return data.site

    def measure(self, data: EvaluationData, replacements: Mapping[str, Replace], prompts: int) -> dict[str, Any]:
        """What the splices come to in the held-out generations of so many prompts, as `metrics.json` has it.

        `replacements` are what is put in place, "zero" and "mean" among them, from which the others recover.
        """
        site = self.check(data)
        runs = held_out_runs(data, prompts)
        self._embed([run.prompt for run in runs])
        steps = self.steps or tuple(data.filters.steps_of(data.source.steps))
        with self.suite.transformer() as model:
            meter = SpliceMeter(model, site, replacements, steps=steps)
            batches = list(self._batches(runs))
            for batch in follow(self.progress, f"splice {site}", batches, total=len(batches)):
                self._add(meter, batch)
        return as_json(meter.result(), runs=len(runs), steps=steps, dtype=self.machine.compute.name)

    def _add(self, meter: SpliceMeter, runs: list[Sampling]) -> None:
        first = runs[0]
        device, dtype = self.machine.placement.transformer, self.machine.compute.dtype
        noise = noise_for([run.seed for run in runs], first.height, first.width, device, dtype)
        parts = zip(*(self._embedded[run.prompt].text for run in runs), strict=True)
        inputs = prepare(noise, TextEmbedding(*map(torch.cat, parts)), first.height, first.width)
        latents = meter.add(inputs, list(first.timesteps), first.guidance)
        if self.pictures:
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
            for start in range(0, len(together), self.batch_size):
                yield together[start : start + self.batch_size]

    def _embed(self, prompts: list[str]) -> None:
        missing = [prompt for prompt in prompts if prompt not in self._embedded]
        if missing:
            with phase(self.progress, "text"), self.suite.text_encoders() as encoders:
                self._embedded |= zip(missing, embed_prompts(encoders, missing), strict=True)


def held_out_runs(data: EvaluationData, most: int) -> list[Sampling]:
    """The first held-out generations, one per prompt. Raises FluxIRError where files do not say how they were made."""
    source, runs = _sampled(data), dict[str, Sampling]()
    for number, generation in enumerate(source.generations):
        if len(runs) == most:
            break
        if generation.prompt not in runs and data.split.has(data.side, generation.id, generation.prompt):
            runs[generation.prompt] = source.sampling(number)
    return list(runs.values())


def recorded_dtype(data: EvaluationData) -> torch.dtype:
    """What the captured model computed in. Raises FluxIRError where files do not say how they were made."""
    return _sampled(data).sampling(0).dtype


def _sampled(data: EvaluationData) -> SampledSource:
    if not isinstance(data.source, SampledSource):
        where = data.source.generations[0].path or "a plain array"
        raise FluxIRError(
            f"a splice runs the captured generations again, from their prompt and seed: got {where}",
            hint="use captures made with flux-ir capture or flux-ir collect, or leave out --splice",
        )
    return data.source


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
