"""Training: several autoencoders side by side on one resident batch, over one process or many, one step at a time.

`train` walks through batches and yields what each step measured, as tensors: nothing is read back from the device until
the caller asks (`FinishedStep.read`). Files, tables and clocks are the caller's. With many processes each gives its
share of every batch; an all-reduce averages the gradients, so that the weights are those of one process with the whole
batch. `Member.step` is the step itself, top to bottom.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from flux_ir.distributed import Ranks, all_sum, first_rank_value
from flux_ir.errors import FluxIRError
from flux_ir.sae.architectures.losses import LossParts, TrainingState
from flux_ir.sae.architectures.sparse_autoencoder import SparseAutoencoder
from flux_ir.sae.data.filters import SiteKey
from flux_ir.sae.data.whitening import Whitening
from flux_ir.sae.training.checkpoints import MomentShard, SavedRun
from flux_ir.sae.training.optimiser import RowAdam
from flux_ir.sae.training.schedules import Schedule, default_learning_rate


@dataclass(frozen=True)
class TrainSettings:
    """How every autoencoder of a run is trained. Lengths in optimiser steps or in tokens of all processes, as named."""

    total_steps: int
    batch_tokens: int
    dead_after_tokens: int
    """A feature that fired on none of so many tokens is dead."""
    learning_rate: float | None = None
    """At its peak; None: 2e-4 / sqrt(F / 2^14) of each autoencoder."""
    k_start: int | None = None
    """Active features per token at the start, from which k comes down; None: k throughout."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises; None: 1,000, at most a tenth of the run."""
    clip: float | None = 1.0
    """The largest norm of all gradients of an autoencoder; None: any."""
    ema_decay: float | None = None
    """Decay per step of the average of the weights that is written at the end; None: the last weights are."""
    resample_steps: int | None = None
    """Steps from one resampling of dead features to the next, in the first half of the run; None: never."""
    compute_dtype: torch.dtype = torch.float32
    """What the large products are rounded to; weights, gradients and moments are float32 in any case."""
    shard_optimiser: bool = False
    """Whether each process keeps the moments of its share of rows alone."""

    def schedule(self, sae: SparseAutoencoder) -> Schedule:
        """The curves of one autoencoder."""
        config = sae.config
        rate = default_learning_rate(config.d_sae) if self.learning_rate is None else self.learning_rate
        start = None if self.k_start is None else min(self.k_start, config.d_sae)
        return Schedule(self.total_steps, rate, config.k, k_start=start, warmup_steps=self.warmup_steps)


class TrainingNumbers(NamedTuple):
    """What one step measured on one autoencoder, on the device; of this process's share of the batch."""

    loss: Tensor
    reconstruction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    fvu: Tensor
    l0: Tensor
    dead_share: Tensor
    gradient_norm: Tensor


class FinishedStep(NamedTuple):
    """A finished step: how far the run is, and its numbers by autoencoder."""

    optimiser_step: int
    """Steps finished."""
    tokens: int
    """Tokens seen by all processes."""
    numbers: dict[str, TrainingNumbers]

    def read(self, ranks: Ranks) -> dict[str, dict[str, float]]:
        """The numbers as floats, averaged over processes, which must all ask. Waits for the device, once."""
        stacked = torch.stack([torch.stack([n.float() for n in numbers]) for numbers in self.numbers.values()])
        rows = AcrossRanks(ranks).mean(stacked).tolist()
        return {
            name: dict(zip(TrainingNumbers._fields, row, strict=True))
            for name, row in zip(self.numbers, rows, strict=True)
        }


class Trainer:
    """All autoencoders of a run, and how far it is."""

    def __init__(self, members: "Sequence[Member]", settings: TrainSettings, ranks: Ranks) -> None:
        if settings.batch_tokens % ranks.world_size:
            raise FluxIRError(
                f"a batch is cut into equal shares: got {settings.batch_tokens} tokens, {ranks.world_size} processes",
                hint=f"make --batch_tokens a multiple of {ranks.world_size}",
            )
        if len({member.name for member in members}) < len(members):
            raise FluxIRError("two autoencoders of one run have the same name", hint="give each of them once")
        self.members, self.settings, self.ranks = list(members), settings, ranks
        self.steps_done = 0
        self.whitenings: dict[SiteKey, Whitening] = {}
        for member in self.members:  # one for each site, whatever each of its autoencoders was given
            if member.whitening is not None:
                member.whitening = self.whitenings.setdefault(member.site, member.whitening)

    @property
    def tokens_seen(self) -> int:
        """Tokens that all processes have trained on."""
        return self.steps_done * self.settings.batch_tokens

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.settings.total_steps

    def step(self, batch: Mapping[SiteKey, Tensor]) -> FinishedStep:
        """One optimiser step of every autoencoder on this process's share of a batch of raw tokens [n, d], by site."""
        number, seen = self.steps_done, self.tokens_seen
        normalised: dict[SiteKey, Tensor] = {}
        numbers = {}
        for member in self.members:
            if member.site not in normalised:  # all members of a site have its statistics
                normalised[member.site] = member.normalise(self._checked(batch[member.site]))
            numbers[member.name] = member.step(normalised[member.site], number, seen)
        self.steps_done += 1
        return FinishedStep(self.steps_done, self.tokens_seen, numbers)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds once: weights and what belongs to them, and the whitening of each site."""
        state = {name: tensor for member in self.members for name, tensor in member.tensors().items()}
        for site, whitening in self.whitenings.items():
            state |= {f"whitening/{site or 'array'}/{name}": one for name, one in whitening.tensors().items()}
        return state

    def shard(self) -> MomentShard:
        """What this process adds to a checkpoint: its rows of the moments, if the first does not hold them as well."""
        tensors, rows = {}, {}
        for member in self.members:
            for key, moment in member.optimiser.state_dict().items():
                name = key.rpartition(".")[0]
                whole = len(member.parameters[name]) == len(moment)
                if not whole or self.ranks.is_first:
                    tensors[f"{member.name}/{key}"] = moment
                    rows[f"{member.name}/{key}"] = member.optimiser.rows(name)
        return MomentShard(tensors, rows)

    def load(self, saved: SavedRun) -> None:
        """Go on from a checkpoint, with any number of processes."""
        self.steps_done = int(saved.state["optimiser_step"])
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                if name not in saved.shared:
                    raise FluxIRError(f"{saved.path} lacks {name}", hint="delete it, or use another --output_dir")
                tensor.copy_(saved.shared[name])
        for member in self.members:
            member.load(saved, self.steps_done)

    def _checked(self, rows: Tensor) -> Tensor:
        share = self.settings.batch_tokens // self.ranks.world_size
        if len(rows) != share:
            raise FluxIRError(f"a batch must have {share} tokens for each process: got {len(rows)}")
        return rows.to(self.members[0].sae.W_dec.device, non_blocking=True)


def train(trainer: Trainer, batches: Iterable[Mapping[SiteKey, Tensor]]) -> Iterator[FinishedStep]:
    """Step through batches until the run is finished; the caller saves and reads between the steps.

    Raises FluxIRError if the batches end before.
    """
    source = iter(batches)
    while not trainer.finished:
        batch = next(source, None)
        if batch is None:
            raise FluxIRError(
                f"the data ended after {trainer.steps_done} of {trainer.settings.total_steps} optimiser steps",
                hint="train on fewer tokens, or read the data more often with --epochs",
            )
        yield trainer.step(batch)


def state_of(trainer: Trainer, data: Mapping[str, Any]) -> dict[str, Any]:
    """The counters of a checkpoint, beside the state of the data."""
    return {"optimiser_step": trainer.steps_done, "tokens": trainer.tokens_seen, "data": dict(data)}


# ---- One autoencoder of the run


class Member:
    """One autoencoder of the run with everything that belongs to its training."""

    def __init__(
        self,
        name: str,
        site: SiteKey,
        sae: SparseAutoencoder,
        settings: TrainSettings,
        ranks: Ranks,
        *,
        whitening: Whitening | None = None,
    ) -> None:
        """`site` is the key under which batches hold its tokens; with `whitening` the SAE is one of whitened tokens."""
        self.name, self.site, self.sae, self.settings, self.ranks = name, site, sae, settings, ranks
        self.whitening = None if whitening is None else whitening.to(sae.W_dec.device)
        self.schedule = settings.schedule(sae)
        self.parameters: dict[str, nn.Parameter] = dict(sae.named_parameters())  # tied weights once
        bf16_copies = self._make_bf16_copies()
        self.optimiser = RowAdam(
            self.parameters, unit_rows=["W_dec"], bf16_copies=bf16_copies, ranks=ranks, shard=settings.shard_optimiser
        )
        self.dead = DeadCounter(sae.config.d_sae, sae.W_dec.device)
        self.average = None if settings.ema_decay is None else WeightAverage(self.parameters, settings.ema_decay)

    def normalise(self, x: Tensor) -> Tensor:
        """Raw tokens as its training sees them."""
        return self.sae.normalise(x if self.whitening is None else self.whitening(x))

    def step(self, xn: Tensor, step: int, tokens_seen: int) -> TrainingNumbers:
        """One optimiser step on this process's normalised tokens; `step` counts from 0."""
        # Forward and loss: dead features are those of the steps before, so AuxK need not wait for this batch.
        dead = self.dead.dead(self.settings.dead_after_tokens)
        parts = self.sae.loss(xn, self._state(step, tokens_seen, dead))
        # Backward, and the all-reduce of gradients and of which features fired.
        parts.total.backward()  # type: ignore[no-untyped-call]
        fired = self._all_reduce(parts)
        # Clip, project the decoder's gradient, Adam, rows back to length one, bf16 copies: one pass over each matrix.
        norm = self.optimiser.step(self.schedule.rate(step), clip=self.settings.clip)
        self.sae.keep_valid()
        # What the step leaves behind: dead counts (tokens of all processes), resampled features, EMA of weights.
        self.dead.update(fired, self.settings.batch_tokens)
        self._resample(xn, step)
        if self.average is not None:
            self.average.update(step)
        return TrainingNumbers(
            loss=parts.total.detach(),
            reconstruction=parts.reconstruction.detach(),
            sparsity=parts.sparsity.detach(),
            auxiliary=parts.auxiliary.detach(),
            fvu=parts.fvu,
            l0=parts.l0,
            dead_share=dead.float().mean(),
            gradient_norm=norm,
        )

    @torch.no_grad()
    def finish(self) -> SparseAutoencoder:
        """The autoencoder of raw tokens to write: the averaged weights if there are any, decoder rows of length one."""
        if self.average is not None:
            self.average.take_over()
            self.sae.normalise_decoder()
        self.sae.compute_dtype = self.sae.encoder_bf16 = self.sae.decoder_bf16 = None
        return self.sae if self.whitening is None else self.whitening.fold(self.sae)

    def tensors(self) -> dict[str, Tensor]:
        """All that the processes have alike: weights, statistics and thresholds, averages, dead counters."""
        state: dict[str, Tensor] = {f"weights/{name}": p.detach() for name, p in self.parameters.items()}
        state |= {f"buffers/{name}": buffer for name, buffer in self.sae.named_buffers()}
        state["tokens_since_fired"] = self.dead.tokens_since_fired
        if self.average is not None:
            state |= {f"average/{name}": average for name, average in self.average.averages.items()}
        return {f"{self.name}/{name}": tensor for name, tensor in state.items()}

    def load(self, saved: SavedRun, steps_done: int) -> None:
        """Take up the optimiser's moments of a checkpoint, whose weights are in place."""
        self.optimiser.load(steps_done, lambda name, rows: saved.moment(f"{self.name}/{name}", rows))
        self._refresh_bf16_copies()

    def _state(self, step: int, tokens_seen: int, dead: Tensor) -> TrainingState:
        return TrainingState(
            optimiser_step=step,
            tokens_seen=tokens_seen,
            dead=dead if self.sae.config.aux_features else None,
            k=self.schedule.k_at(step),
            sparsity_scale=self.schedule.sparsity_scale(step),
            across=AcrossRanks(self.ranks),
        )

    def _all_reduce(self, parts: LossParts) -> Tensor:
        """All-reduce the gradients to their mean, in place. Returns on how many processes each feature fired."""
        if self.ranks.world_size == 1:
            return parts.fired
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                raise FluxIRError(f"{name} has no gradient: every parameter must take part in the loss")
            all_sum(parameter.grad, self.ranks).div_(self.ranks.world_size)
        return all_sum(parts.fired.to(torch.int32), self.ranks)

    def _resample(self, xn: Tensor, step: int) -> None:
        """Resample dead features if it is time, from the tokens of all processes."""
        every, half = self.settings.resample_steps, self.settings.total_steps // 2
        if every is None or (step + 1) % every or step + 1 > half:
            return
        dead, resampled = self.dead.dead(self.settings.dead_after_tokens), []
        xn = AcrossRanks(self.ranks).gather(xn)
        if self.ranks.is_first:
            # Seeded by the step, so that a checkpoint needs no random state.
            generator = torch.Generator().manual_seed(self.sae.config.seed * 1_000_003 + step)
            resampled = resample_dead_(self.sae, dead, xn, generator=generator).tolist()
        features = torch.tensor(first_rank_value(resampled, self.ranks), dtype=torch.int64, device=xn.device)
        for name, parameter in self.parameters.items():
            if self.ranks.world_size > 1:
                dist.broadcast(parameter.data, src=0)
            if name != "b_dec":  # the one parameter that has no row for each feature
                self.optimiser.forget(name, features)
        self.dead.restart(features)
        self._refresh_bf16_copies()

    def _make_bf16_copies(self) -> dict[str, Tensor]:
        """Rounded copies of the matrices, where products are rounded: rounding them anew would be a pass each step."""
        sae, dtype = self.sae, self.settings.compute_dtype
        if dtype == torch.float32:
            return {}
        sae.compute_dtype = dtype
        sae.decoder_bf16 = sae.W_dec.detach().to(dtype)
        sae.encoder_bf16 = sae.decoder_bf16 if sae.config.tied else sae.encoder.detach().to(dtype)
        bf16_copies = {"W_dec": sae.decoder_bf16, "encoder": sae.encoder_bf16}
        return {name: bf16_copy for name, bf16_copy in bf16_copies.items() if name in self.parameters}

    def _refresh_bf16_copies(self) -> None:
        for name, bf16_copy in self.optimiser.bf16_copies.items():
            bf16_copy.copy_(self.parameters[name].detach())


# ---- What a step keeps beside the weights


class DeadCounter:
    """Tokens since each feature last fired, int64 [F]; on the device, never read on the hot path."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    def update(self, fired: Tensor, tokens: int) -> None:
        """Count a batch of so many tokens (of all processes) in which the features `fired` [F] were above zero."""
        since = self.tokens_since_fired
        since.add_(tokens).masked_fill_(fired.bool(), 0)

    def dead(self, after_tokens: int) -> Tensor:
        """Whether each feature is dead, bool [F]."""
        return self.tokens_since_fired >= after_tokens

    def restart(self, features: Tensor) -> None:
        """Count from 0 again for these features, a mask or indices: they were given new weights."""
        self.tokens_since_fired[features] = 0


class WeightAverage:
    """The exponential moving average (EMA) of named parameters, in float32, beside the weights that train."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after a step, counted from 0.

        At first it is the plain mean of all steps so far, so that the weights at the start do not linger in it.
        """
        weight = max(1 - self.decay, 1 / (step + 1))
        weights: list[Tensor] = [p.data for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, under the names of the weights."""
        return self.averages

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from stored averages."""
        for name, average in self.averages.items():
            average.copy_(state_dict[name])

    @torch.no_grad()
    def take_over(self) -> None:
        """Put the averages in the place of the weights. Rows of length one average to slightly less than that."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.averages[name])


class AcrossRanks:
    """Small tensors over all processes, for losses whose terms are not linear in means over tokens."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def mean(self, value: Tensor) -> Tensor:
        """All-reduce: the mean of every process's `value`."""
        if self.ranks.world_size == 1:
            return value
        return all_sum(value.detach().clone(), self.ranks) / self.ranks.world_size

    def gather(self, value: Tensor) -> Tensor:
        """All-gather: every process's `value`, in order of rank. All are of one shape."""
        if self.ranks.world_size == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.ranks.world_size)]
        dist.all_gather(parts, value.detach().contiguous())
        return torch.cat(parts)


# ---- Resampling of dead features (Bricken et al. 2023): they start again where the error is largest
# AuxK makes it unnecessary for the TopK family; L1, JumpReLU and Gated have nothing else.
_ENCODER_SHARE = 0.2  # of the mean length of living encoder rows
_ROWS_AT_ONCE = 4096


@torch.no_grad()
def resample_dead_(
    sae: SparseAutoencoder,
    dead: Bool[Tensor, "d_sae"],
    xn: Float[Tensor, "n d_in"],
    *,
    generator: torch.Generator,
) -> Int[Tensor, "_resampled"]:
    """Give dead features new weights in place, and return which features these are, ascending.

    Each gets a token of `xn` (normalised; many more than there are dead features), drawn with a probability that grows
    as the square of its loss, none twice. Its row of W_dec becomes the direction from b_dec to that token, with length
    1; its encoder row the same with a fifth of the mean length of living rows; biases become 0 and other per-feature
    values the mean of the living ones.
    Where fewer tokens have an error than features are dead, only so many are resampled.

    `generator` is on the CPU. The optimiser's moments and bf16 copies of the weights are the caller's to reset.
    """
    if dead.all():
        raise FluxIRError(
            "resampling needs a living feature to take its scale from: all are dead",
            hint="lower the sparsity penalty or the learning rate",
        )
    squared_loss = _losses(sae, xn).square().cpu()
    features = dead.nonzero().flatten()[: int((squared_loss > 0).sum())]
    if len(features) == 0:
        return features
    chosen = torch.multinomial(squared_loss, len(features), replacement=False, generator=generator)
    directions = F.normalize(xn[chosen.to(xn.device)] - sae.b_dec, dim=1)
    alive = ~dead
    length = sae.encoder[alive].norm(dim=1).mean()
    sae.W_dec[features] = directions
    if not sae.config.tied:
        sae.encoder[features] = _ENCODER_SHARE * length * directions
    for name, parameter in sae.named_parameters():
        if parameter.shape == dead.shape and name != "b_dec":
            parameter[features] = 0 if name.startswith("b_") else parameter[alive].mean()
    return features


def _losses(sae: SparseAutoencoder, xn: Tensor) -> Tensor:
    """||xn - x_hat||^2 of each token, without holding the features of all at once."""
    errors = [rows - sae.reconstruct(sae.features_of(rows)) for rows in torch.split(xn, _ROWS_AT_ONCE)]
    return torch.cat([error.square().sum(dim=1) for error in errors])
