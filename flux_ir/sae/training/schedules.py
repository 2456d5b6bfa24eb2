"""Schedules of the learning rate, of k and of the sparsity penalty: functions of the optimiser step, counted from 0.

Every length is in optimiser steps, never in tokens or micro-batches: a batch cut into more pieces, or spread over more
processes, follows the same curves. They are drawn over the whole run, so a run cannot be made longer afterwards.
"""

from dataclasses import dataclass

from flux_ir.errors import FluxIRError

WARMUP_STEPS = 1_000
SPARSITY_WARMUP_STEPS = 5_000
ANNEAL_SHARE = 0.25  # of the run, in which k comes down to its value
DECAY_SHARE = 0.2  # of the run, at its end
REFERENCE_D_SAE = 2**14
REFERENCE_LEARNING_RATE = 2e-4


def default_learning_rate(d_sae: int) -> float:
    """The peak learning rate for so many features: 2e-4 / sqrt(F / 2^14) (Gao et al. 2024, section 4)."""
    return REFERENCE_LEARNING_RATE / (d_sae / REFERENCE_D_SAE) ** 0.5


def shortened(warmup_steps: int, total_steps: int) -> int:
    """The steps of a warm-up, but at most a tenth of the run."""
    return min(warmup_steps, total_steps // 10)


def rate_factor(step: int, total_steps: int, *, warmup_steps: int, decay_steps: int) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, plateau, linear decay over the last steps."""
    up = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    left = total_steps - step
    down = left / (decay_steps + 1) if left <= decay_steps else 1.0
    return min(up, down)


def annealed_k(step: int, k: int, *, start: int, anneal_steps: int) -> int:
    """The active features per token at a step: from `start` down (or up) to `k`, linearly, then `k`."""
    if step >= anneal_steps:
        return k
    return round(start + (k - start) * step / anneal_steps)


def warmed_up(step: int, warmup_steps: int) -> float:
    """The share, 0 to 1, of the sparsity penalty at a step: an immediate penalty would kill features."""
    return 1.0 if step >= warmup_steps else step / warmup_steps


@dataclass(frozen=True)
class Schedule:
    """All curves of one autoencoder's run. Lengths of None take the defaults above, shortened for short runs."""

    total_steps: int
    learning_rate: float
    """The peak."""
    k: int
    k_start: int | None = None
    """Active features per token at the start; None: `k` throughout."""
    warmup_steps: int | None = None
    sparsity_warmup_steps: int | None = None

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise FluxIRError(
                f"a run takes at least one optimiser step: got {self.total_steps}",
                hint="train on more tokens, or with smaller batches",
            )
        if self.learning_rate <= 0:
            raise FluxIRError(f"the learning rate must be above 0: got {self.learning_rate}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warmup = shortened(WARMUP_STEPS, self.total_steps) if self.warmup_steps is None else self.warmup_steps
        decay = int(self.total_steps * DECAY_SHARE)
        return self.learning_rate * rate_factor(step, self.total_steps, warmup_steps=warmup, decay_steps=decay)

    def k_at(self, step: int) -> int:
        """The active features per token at a step."""
        start = self.k if self.k_start is None else self.k_start
        return annealed_k(step, self.k, start=start, anneal_steps=int(self.total_steps * ANNEAL_SHARE))

    def sparsity_scale(self, step: int) -> float:
        """The share of the sparsity penalty at a step."""
        given = self.sparsity_warmup_steps
        steps = shortened(SPARSITY_WARMUP_STEPS, self.total_steps) if given is None else given
        return warmed_up(step, steps)
