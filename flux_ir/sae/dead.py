"""Which features are dead: those without a positive activation for a given number of tokens.

Counted in tokens of the whole job, not in optimiser steps and not per process, so that the same features count as dead
whatever the batch size and however many processes share the batch (the parameters of AuxK in Gao et al. 2024).
"""

import torch
from torch import Tensor


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

    def revive(self, features: Tensor) -> None:
        """Start again for the features of a mask or of these numbers: they were given new weights."""
        self.tokens_since_fired[features] = 0
