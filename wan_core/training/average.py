"""A running average of the parameters: smoother than the last step, and often better."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Average:
    """values(n) = decay * values(n-1) + (1 - decay) * parameters; the first steps, far from the end, count less."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """After the given number of steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter, 1 - decay)


@torch.no_grad()
def put(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Give the parameters these values, by their names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
