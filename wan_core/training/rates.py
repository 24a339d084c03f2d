"""How the learning rate goes: it rises evenly over the warm-up, then follows a schedule to the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# The share of the rate after a share of the way from the warm-up's end to the training's.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda way: 1.0,
    "linear": lambda way: 1 - way,
    "cosine": lambda way: (1 + math.cos(math.pi * way)) / 2,
}


@dataclass(frozen=True)
class RateSettings:
    """The rate of each step. The schedule is gone through `lr_cycles` times after the warm-up."""

    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    warmup_steps: int = 0
    lr_cycles: int = 1

    def rate(self, step: int, total: int) -> float:
        """The learning rate in a step (from 0) of `total`.

        The first of n steps of warm-up has 1 / (n + 1) of the rate, the one after them all of it.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        way = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.learning_rate * SCHEDULES[self.lr_scheduler](way * self.lr_cycles % 1)
