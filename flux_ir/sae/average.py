"""An exponential moving average of an autoencoder's weights: less noise of the last batches in what is written."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of named parameters, in float32, beside the weights that train."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after a step, counted from 0; faster at first, so that the start is forgotten."""
        weight = max(1 - self.decay, 1 / (step + 1))
        weights: list[Tensor] = [p.data for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, weight)

    @torch.no_grad()
    def take_over(self) -> None:
        """Put the averages in the place of the weights. Rows of length one average to slightly less than that."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.averages[name])
