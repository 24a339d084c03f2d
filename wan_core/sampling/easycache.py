"""EasyCache: a step is left out while the run's own steps say that the model's answer would hardly change.

When the model is run, how far its answer moved for how far the latents had moved is measured: the rate. In the steps
after it, the rate times how far the latents move, relative to the size of the answer, is how far the answer has
presumably moved. Steps are left out while these changes add up to less than the threshold: that is the error budget.
So nothing has to be known of the model beforehand: no polynomial, no table.

All is measured on whole latents and on the guided answer, in front of windows, prompts and processes, so that the
decision is one for all of them; and of several videos the one that changes most decides, so that the budget holds for
each. A step that is left out costs next to nothing, and four latents are kept.

Source: Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching", arXiv
2507.02860. Two things differ. The rate is always measured between two computed steps, also where others between them
were left out. And the velocity goes on as it moved between the last two computed steps, half as far, where the authors
let it move with the latents. WanTiny with 14 or 15 of 30 steps skipped is 44.5 dB from its whole run that way, 39.4 dB
theirs, 40.6 dB with a velocity that stays; with 20 skipped 35.8, 30.8 and 30.8 dB. And no more than five steps are left
out in a row, which spreads what a generous threshold computes: with 22 skipped that is 28.0 dB, 26.6 dB without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .reuse import told
from .schedules import check_part

KEPT_LATENTS = 4
HALF = 0.5
LONGEST_ROW = 5  # steps left out one after the other
Velocity = Callable[[Tensor, Tensor, int], Tensor]  # (latents (b, 16, P+T, h, w), timestep (1,), step) -> as latents


@dataclass(frozen=True)
class EasyCache:
    """How eagerly to skip. Raises InputError for values that cannot work.

    threshold: how far the answer may have moved since it was computed, relative to its size; 0 skips nothing.
    start, end: the part of the run, 0 to 1, in which steps may be skipped. The first two and the last never are.
    """

    threshold: float = 0.05
    start: float = 0.2
    end: float = 1.0

    name = "EasyCache"

    def __post_init__(self):
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"threshold is {self.threshold}, but it has to be 0 or more. Enter a number such as 0.05.")
        check_part("start", self.start, "end", self.end)

    def report(self, skipped: Sequence[bool]) -> str:
        return told(self, f"{self.threshold:g}", skipped)


class Computed(NamedTuple):
    """A step in which the model was run."""

    latents: Tensor | None
    timestep: Tensor
    answer: Tensor


class Skipping:
    """The steps of one run: calls `velocity`, or answers in its place. It learns only from steps that succeeded.

    alike: for each step whether its answer is of the same kind as the one before (not where guidance begins or ends).
    agreed: makes of a tensor that of the process which leads, where several decide.
    """

    def __init__(
        self,
        cache: EasyCache,
        velocity: Velocity,
        alike: Sequence[bool],
        agreed: Callable[[Tensor], Tensor] = lambda change: change,
    ):
        self.cache, self.velocity, self.alike, self.agreed = cache, velocity, alike, agreed
        self.skipped: list[bool] = []
        self.rate: Tensor | None = None  # (b,)
        self.change: Tensor | float = 0.0  # (b,) of the answer since it was computed, relative to its size
        self.before: Tensor | None = None  # the latents of the step before
        self.last: Computed | None = None
        self.older: Computed | None = None  # the one before, without its latents

    def __call__(self, x: Tensor, timestep: Tensor, step: int) -> Tensor:
        skip = self.may_skip(step) and self.within_budget(x)
        answer = self.guess(timestep) if skip else self.compute(x, timestep, step)
        self.before = x
        self.skipped.append(skip)
        return answer

    def may_skip(self, step: int) -> bool:
        steps = len(self.alike)
        inside = self.cache.start <= step / steps < self.cache.end and step < steps - 1
        tired = len(self.skipped) >= LONGEST_ROW and all(self.skipped[-LONGEST_ROW:])
        return inside and self.alike[step] and self.rate is not None and not tired

    def within_budget(self, x: Tensor) -> bool:
        moved = self.rate * size(x - self.before) / size(self.last.answer)
        self.change = self.agreed(self.change + moved)
        return bool((self.change < self.cache.threshold).all())  # a change that is no number is too large

    def guess(self, timestep: Tensor) -> Tensor:
        if self.older is None:
            return self.last.answer
        ahead = (timestep - self.last.timestep) / (self.last.timestep - self.older.timestep)
        ahead = HALF * ahead.clamp(max=1)  # not farther than what was seen
        return torch.lerp(self.last.answer, self.older.answer, -ahead.to(self.last.answer))

    def compute(self, x: Tensor, timestep: Tensor, step: int) -> Tensor:
        answer = self.velocity(x, timestep, step)
        self.older = None
        if self.last is not None and self.alike[step]:
            self.rate = size(answer - self.last.answer) / size(x - self.last.latents)
            self.older = self.last._replace(latents=None)
        self.last, self.change = Computed(x, timestep, answer), 0.0
        return answer


def size(x: Tensor) -> Tensor:
    """The mean of each row, (b,), without signs."""
    return x.float().abs().flatten(1).mean(dim=1)
