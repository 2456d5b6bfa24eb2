"""One run of `train-sae`: autoencoders side by side, from their start or their last checkpoint to their folders.

`TrainingRun.work` is the story; `_train` is the loop, of which each round is a step of `sae.training.step`. Stopping
and going on changes no bit: a checkpoint holds the position in the data beside weights and moments.
"""

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ir.api.curve_loggers import CurveRow, Logger, open_logger
from flux_ir.api.progress import Note, Watch, phase
from flux_ir.api.training_data import TrainingData
from flux_ir.api.training_settings import TrainSAESettings
from flux_ir.distributed import Ranks, all_sum, wait_for_all
from flux_ir.errors import FluxIRError
from flux_ir.files import complete_file, read_json, versions, write_json
from flux_ir.sae.architectures.config import SAEConfig
from flux_ir.sae.architectures.make import make_sae
from flux_ir.sae.data.batches import TokenBatches
from flux_ir.sae.data.filters import SiteKey
from flux_ir.sae.data.whitening import Whitening
from flux_ir.sae.evaluation.metrics import evaluate, to_json
from flux_ir.sae.files.folder import CONFIG_FILE, log_frequency_of, save_sae
from flux_ir.sae.training.checkpoints import DIVERGED_HINT, TrainingCheckpoints
from flux_ir.sae.training.step import FinishedStep, Member, Trainer, TrainSettings, state_of, train

TRAINING = "training.json"
CURVES = "curves.jsonl"
CHECKPOINTS = ".training"
MOST_HELD_OUT = 1_000_000  # tokens an autoencoder is measured on at the end; `evaluate-sae` takes all
# A row of the curves every 100 steps, in short runs more often: as often as makes 200 rows.
LEAST_ROWS, MOST_STEPS = 200, 100
AGREE_STEPS = 10  # steps from one all-reduce of what processes want to the next: each makes the host wait
SHORT_BATCHES = 3  # in a row that are not full: the data have no full one

# A resumed run may have other values of these: some are compared by their content, the others change no weight.
BY_CONTENT = (
    *("captures", "whiten", "prompts", "site", "steps", "max_tokens", "epochs", "dtype"),
    *("lora", "lora_strength", "quantize"),
)
NO_WEIGHT = ("name", "output_dir", "device", "log", "checkpoint_minutes", "checkpoint_tokens", "shard_optimiser")


class Planned(NamedTuple):
    """What a run trains, and how."""

    folder: Path
    members: dict[str, SAEConfig]
    sites: list[SiteKey]
    training: TrainSettings
    device: torch.device
    id: str


class Trained(NamedTuple):
    """A finished autoencoder and its numbers, as training.json has them."""

    folder: Path
    d_sae: int
    measured_on: str
    """Which tokens its numbers are of: held-out tokens, or training tokens where nothing was held out."""
    overall: Mapping[str, Any]
    outliers: Mapping[str, Any]
    """How many of the tokens it was measured on are far longer than the others, and its numbers without them."""


class TrainingRow(NamedTuple):
    """How far a run is. Autoencoders on one kind of tokens are one run, side by side on the same batches."""

    run: str
    tokens: int
    """Seen so far, also before a stop."""
    total_tokens: int
    numbers: Mapping[str, CurveRow] = {}
    """The latest row of every autoencoder's curve, by its name: loss, fvu, l0, dead_share and more."""
    finished: tuple[Trained, ...] = ()
    """In the last row of a run: what it has trained."""
    stopped: bool = False
    """In the last row of a run that was asked to stop: a checkpoint is saved, and the same call goes on."""


class TrainingRun:
    """A run from its start, or its last checkpoint, to the folders of its autoencoders.

    It is checked against its folder when it is made, so that a run which must be refused is so before any begins.
    """

    def __init__(
        self,
        planned: Planned,
        settings: TrainSAESettings,
        data: TrainingData,
        ranks: Ranks,
        progress: Watch,
        stop: Callable[[], bool],
    ) -> None:
        self.planned, self.settings, self.data, self.ranks = planned, settings, data, ranks
        self.progress, self.stop = progress, stop
        self.checkpoints = TrainingCheckpoints(planned.folder / CHECKPOINTS / planned.id, ranks)
        self.described = self._describe()
        self.curves: dict[str, list[CurveRow]] = {name: [] for name in planned.members}
        self.saved, faults = self.checkpoints.last_good()
        for fault in faults:
            self._note(f"{fault.message}: going on from the one before")
        if self.saved is not None:
            self._check(self.saved.state["described"], self.saved.path)
        # Never that of another run, also not of the same command into the same folder: curves would be mixed.
        self.log_id = f"{planned.id}-{secrets.token_hex(4)}" if self.saved is None else self.saved.state["log_id"]
        self.finished = self.saved is None and self._all_trained()

    def work(self) -> Iterator[TrainingRow]:
        """Train to the end and write everything, or to where somebody asks to stop."""
        if self.finished:
            self._note("already trained: nothing to do")
            yield self._row(self.total_tokens, finished=self._results())
            return
        if self.saved is None:
            self._check_held_out()
        trainer = self._trainer()
        with self._batches() as batches:
            if self.saved is not None:
                trainer.load(self.saved)
                batches.restore(self.saved.state["data"])
                self.curves = self.saved.state["curves"]
                self._note(f"going on after {trainer.tokens_seen:,} tokens")
                self.saved = None
            yield self._row(trainer.tokens_seen)
            with phase(self.progress, "train"):
                yield from self._train(trainer, batches)
            if not trainer.finished:
                self._note(f"stopped after {trainer.tokens_seen:,} tokens, which are saved; the same command goes on")
                yield self._row(trainer.tokens_seen, stopped=True)
                return
        with phase(self.progress, "measure and write"):
            if self.ranks.is_first:
                for member in trainer.members:
                    self._write(member)
            wait_for_all(self.ranks)
            self.checkpoints.remove()
        yield self._row(trainer.tokens_seen, finished=self._results())

    @property
    def total_tokens(self) -> int:
        """Tokens that the run trains on."""
        return self.planned.training.total_steps * self.planned.training.batch_tokens

    def _row(
        self,
        tokens: int,
        numbers: Mapping[str, CurveRow] | None = None,
        *,
        finished: tuple[Trained, ...] = (),
        stopped: bool = False,
    ) -> TrainingRow:
        return TrainingRow(self.planned.id, tokens, self.total_tokens, numbers or {}, finished, stopped)

    def _check_held_out(self) -> None:
        """Raises FluxIRError for stored tokens that could not be measured on at the end: before the long part."""
        if not callable(self.data.source):
            with phase(self.progress, "check held-out data"):
                for site in self.planned.sites:
                    for _ in self.data.evaluation_batches(site, MOST_HELD_OUT):
                        pass

    def _batches(self) -> TokenBatches:
        return self.data.batches(
            self.planned.sites, self.settings, self.ranks, self.planned.device, tokens=self.total_tokens
        )

    def _trainer(self) -> Trainer:
        """The autoencoders at their start. Where a checkpoint will be loaded nothing is measured: it holds what was."""
        members = []
        for site in self.planned.sites:
            measured = None
            if self.saved is None:
                with phase(self.progress, "measure the data"):
                    measured = self.data.measure(site, normalise=self.settings.normalise)
            mean, scale, sample = (None,) * 3 if measured is None else measured[:3]
            whitening = None if measured is None else measured.whitening
            if measured is None and self.settings.whiten is not None:
                whitening = Whitening.empty(self.data.widths[site])
            for name, config in self.planned.members.items():
                if config.site == (None if site is None else str(site)):
                    sae = make_sae(config, sample=sample, mean=mean, scale=scale, device=self.planned.device)
                    members.append(Member(name, site, sae, self.planned.training, self.ranks, whitening=whitening))
        return Trainer(members, self.planned.training, self.ranks)

    def _train(self, trainer: Trainer, batches: TokenBatches) -> Iterator[TrainingRow]:
        """Step to the end, or to where somebody asks to stop, with curves and checkpoints."""
        training, logger = self.planned.training, self._logger(trainer.steps_done)
        every = max(1, min(MOST_STEPS, training.total_steps // LEAST_ROWS))
        timer = CheckpointTimer(self.settings, trainer.tokens_seen)
        for step in train(trainer, full_batches(batches, training.batch_tokens)):
            row_due = step.optimiser_step % every == 0 or trainer.finished
            rows = self._record(trainer, step, logger) if row_due else None
            checkpoint_due, stopping = self._agree(timer.due(step.tokens), self.stop(), step.optimiser_step)
            if checkpoint_due or stopping or trainer.finished:
                self._save(trainer, batches)
                timer.saved(step.tokens)
            if rows is not None:
                try:
                    yield self._row(step.tokens, rows)
                except GeneratorExit:  # the caller asks for no more rows; many processes would have to agree to save
                    if self.ranks.world_size == 1 and timer.tokens != step.tokens:
                        self._save(trainer, batches)
                    raise
            if stopping and not trainer.finished:
                break
        logger.close()

    def _agree(self, due: bool, stopping: bool, step: int) -> tuple[bool, bool]:  # noqa: FBT001
        """Whether all processes save, if the first is `due`, and stop, if any is `stopping`; asked each AGREE_STEPS."""
        if self.ranks.world_size == 1:
            return due, stopping
        if step % AGREE_STEPS:
            return False, False
        wishes = all_sum(torch.tensor([int(due and self.ranks.is_first), int(stopping)]), self.ranks).tolist()
        return wishes[0] > 0, wishes[1] > 0

    def _record(self, trainer: Trainer, step: FinishedStep, logger: Logger) -> dict[str, CurveRow]:
        """Add a row to every curve. Raises FluxIRError for a loss that is no number any more."""
        rows: dict[str, CurveRow] = {}
        schedules = {member.name: member.schedule for member in trainer.members}
        for name, numbers in step.read(self.ranks).items():
            if not math.isfinite(numbers["loss"]):
                raise FluxIRError(
                    f"the training diverged: the loss of {name} is {numbers['loss']} after {step.optimiser_step} "
                    "optimiser steps; checkpoints from before are kept",
                    hint=DIVERGED_HINT,
                )
            position = {"step": step.optimiser_step, "tokens": step.tokens}
            rate = {"learning_rate": schedules[name].rate(step.optimiser_step - 1)}
            rows[name] = position | _rounded(numbers | rate)
            self.curves[name].append(rows[name])
        if self.ranks.is_first:
            logger.log(rows)
        return rows

    def _save(self, trainer: Trainer, batches: TokenBatches) -> None:
        state = state_of(trainer, batches.state())
        state |= {"described": self.described, "curves": self.curves, "log_id": self.log_id}
        self.checkpoints.save(trainer.steps_done, state, trainer.tensors(), trainer.shard())

    def _write(self, member: Member) -> None:
        """The folder of one autoencoder; its cfg.json comes last, so a folder that has one is complete."""
        sae, folder = member.finish(), self.planned.folder / member.name
        tokens = self.data.evaluation_batches(member.site, MOST_HELD_OUT)
        limits = self.data.outlier_limits(member.site, MOST_HELD_OUT)
        evaluation = evaluate(sae, tokens, d_sae=sae.config.d_sae, device=self.planned.device, limits=limits)
        sae.log_frequency = log_frequency_of(evaluation.frequency)
        sae.mean_active, sae.max_active = evaluation.mean_active, evaluation.max_active
        sae.metadata = self.data.metadata() | {
            "tokens_seen": self.total_tokens,
            "fvu": to_json(evaluation)["overall"]["fvu"],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        with complete_file(folder / CURVES) as beside:
            beside.write_text("".join(f"{json.dumps(row)}\n" for row in self.curves[member.name]))
        about = {
            "described": self.described,
            "options": self.settings.to_json(),
            "config": sae.config.to_dict(),
            "measured_on": self._measured_on,
            "result": to_json(evaluation),
            "versions": versions("torch"),
        }
        write_json(folder / TRAINING, about)
        save_sae(sae, folder)

    @property
    def _measured_on(self) -> str:
        return "held-out tokens" if self.data.split.threshold else "training tokens"

    def _results(self) -> tuple[Trained, ...]:
        if not self.ranks.is_first:
            return ()
        trained = []
        for name, config in self.planned.members.items():
            result = read_json(self.planned.folder / name / TRAINING, required=("result",))["result"]
            folder = self.planned.folder / name
            trained.append(Trained(folder, config.d_sae, self._measured_on, result["overall"], result["outliers"]))
        return tuple(trained)

    def _all_trained(self) -> bool:
        """Whether the folders hold all autoencoders already. Raises FluxIRError for one that was trained otherwise."""
        trained = [name for name in self.planned.members if (self.planned.folder / name / CONFIG_FILE).is_file()]
        for name in trained:
            about = self.planned.folder / name / TRAINING
            if not about.is_file():
                raise FluxIRError(
                    f"{about.parent} holds another autoencoder already", hint="pass another --name or --output_dir"
                )
            self._check(read_json(about, required=("described",))["described"], about.parent)
        return len(trained) == len(self.planned.members)

    def _check(self, described: Mapping[str, Any], path: Path | None) -> None:
        """Raises FluxIRError unless what was trained at this path is what shall be trained now."""
        before, now = _flat(described), _flat(self.described)
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if not names:
            return
        differences = "; ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in names)
        hint = "pass the settings of the first time, or another --name"
        if "data.content" in names:
            hint = "the activations are others than the first time, whatever they are called: pass another --name"
        if names == ["tokens"]:
            hint = "the learning rate is drawn over the whole run, so it cannot be made longer: pass another --name"
        raise FluxIRError(f"{path} belongs to other settings: {differences}", hint=hint)

    def _describe(self) -> dict[str, Any]:
        """Everything the weights depend on, as JSON says it."""
        given = {
            name: value for name, value in self.settings.to_json().items() if name not in (*BY_CONTENT, *NO_WEIGHT)
        }
        return given | {
            "tokens": self.total_tokens,
            "dtype": str(self.planned.training.compute_dtype).removeprefix("torch."),
            "sites": [str(site) for site in self.planned.sites],
            "steps": self.data.steps,
            "data": self.data.described,
        }

    def _logger(self, first_step: int) -> Logger:
        kind = self.settings.log if self.ranks.is_first else "none"
        return open_logger(
            kind, self.planned.folder, run_id=self.log_id, first_step=first_step, settings=self.described
        )

    def _note(self, text: str) -> None:
        if self.ranks.is_first:
            self.progress(Note(f"{self.planned.id}: {text}"))


class CheckpointTimer:
    """When the next checkpoint is due: by time, and by tokens if asked."""

    def __init__(self, settings: TrainSAESettings, tokens: int) -> None:
        self.seconds, self.every_tokens = settings.checkpoint_minutes * 60, settings.checkpoint_tokens
        self.saved(tokens)

    def due(self, tokens: int) -> bool:
        """Whether to save now."""
        by_tokens = self.every_tokens is not None and tokens - self.tokens >= self.every_tokens
        return by_tokens or time.monotonic() - self.at >= self.seconds

    def saved(self, tokens: int) -> None:
        """A checkpoint was just saved."""
        self.at, self.tokens = time.monotonic(), tokens


def full_batches(batches: TokenBatches, batch_tokens: int) -> Iterator[Mapping[SiteKey, Tensor]]:
    """The batches that have all their tokens: the last of an epoch, if it is shorter, is left out.

    So every step is of one size, and all processes have equal shares of it. Raises FluxIRError if no batch is full.
    """
    short, before = 0, batches.tokens
    for batch in batches:
        full = batches.tokens - before == batch_tokens
        before = batches.tokens
        short = 0 if full else short + 1
        if short >= SHORT_BATCHES:
            raise FluxIRError(
                f"the data have no {batch_tokens} tokens that are trained on", hint="pass a smaller --batch_tokens"
            )
        if full:
            yield batch.values


def _rounded(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers for a file: eight digits, None for what is none."""
    return {name: float(f"{value:.8g}") if math.isfinite(value) else None for name, value in numbers.items()}


def _flat(described: Mapping[str, Any]) -> dict[str, Any]:
    """A description without nesting, so that its parts can be compared and named one by one."""
    flat: dict[str, Any] = {}
    for name, value in described.items():
        flat |= {f"{name}.{part}": each for part, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat
