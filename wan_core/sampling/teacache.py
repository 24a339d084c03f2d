"""TeaCache: in some steps what the blocks do to the video hardly differs from the step before, so it is not computed.

Between two steps the embedded timestep moves by a relative distance, from which a polynomial, fitted once a model,
guesses how far the blocks' answer moves. Steps are skipped until the guesses add up to a threshold. So which steps are
skipped depends on the timesteps (and the motion speed) alone: it is known before the first, and the same for both
prompts and for all windows.

Source: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv 2411.19108; the
numbers for Wan 2.1 are those of the authors' repository TeaCache (TeaCache4Wan2.1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ..errors import InputError
from ..models.dit import DiT
from ..models.layout import DiTLayout
from .reuse import AUTO, nearest, told
from .schedules import check_part


class Method(NamedTuple):
    """Which steps are always computed, and whose distance is measured."""

    first: int  # steps at the beginning
    last: int  # steps at the end
    projected: bool  # measure the modulation that the blocks get; else the time embedding before its projection


METHODS = {
    "warm-up": Method(5, 0, projected=True),  # the authors' own, with their option use_ret_steps
    "whole run": Method(1, 1, projected=False),  # the authors' own, without it
    "DiffSynth": Method(1, 1, projected=True),  # DiffSynth-Studio's: the first one's numbers, but no warm-up
}


class Coefficients(NamedTuple):
    """Of the polynomials, highest power first."""

    projected: tuple[float, ...]
    embedded: tuple[float, ...]


COEFFICIENTS = {
    "T2V-1.3B": Coefficients(
        (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
        (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
    ),
    "T2V-14B": Coefficients(
        (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    ),
    "I2V-14B-480P": Coefficients(
        (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
        (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),
    ),
    "I2V-14B-720P": Coefficients(
        (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
        (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    ),
}


@dataclass(frozen=True)
class TeaCache:
    """How eagerly to skip. Raises InputError for values that cannot work.

    threshold: the sum of guessed changes at which a step is computed again. method: one of `METHODS`.
    coefficients: one of `COEFFICIENTS`, or "auto" until a model is known (`chosen_for`).
    start, end: the part of the run, 0 to 1, in which steps may be skipped.
    device: where to keep what is reused, such as "cpu"; None: beside the tokens.
    """

    threshold: float
    method: str = "warm-up"
    coefficients: str = AUTO
    start: float = 0.0
    end: float = 1.0
    device: str | None = None

    name = "TeaCache"

    def __post_init__(self):
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise InputError(f"threshold is {self.threshold}, but it has to be above 0. Enter a number such as 0.1.")
        if self.method not in METHODS:
            raise InputError(f"TeaCache has no preset {self.method!r}. Choose one of {', '.join(METHODS)}.")
        if self.coefficients not in (AUTO, *COEFFICIENTS):
            names = ", ".join((AUTO, *COEFFICIENTS))
            raise InputError(f"TeaCache has no coefficients {self.coefficients!r}. Choose one of {names}.")
        check_part("start", self.start, "end", self.end)

    def chosen_for(self, layout: DiTLayout, width: int) -> TeaCache:
        """With the coefficients of the published model that is nearest; width: of its usual videos, in pixels."""
        return replace(self, coefficients=nearest(layout, width)) if self.coefficients == AUTO else self

    def plan(self, trunk: DiT, timesteps: Tensor, time_add: Tensor | None = None) -> list[bool]:
        """For each timestep (n,), 0..1000, whether its step is skipped.

        time_add: what conditions add to the modulation, (b or 1, 6, dim).
        """
        embedded, modulation = trunk.embed_time(timesteps)  # (n, dim), (n, 6, dim)
        if time_add is not None:
            modulation = modulation[:, None] + time_add  # (n, b, 6, dim)
        return self.skipped(modulation if METHODS[self.method].projected else embedded)

    def skipped(self, signals: Tensor) -> list[bool]:
        """For each step whether it is skipped; signals (n, …): whose distances count, one a step."""
        method, coefficients = METHODS[self.method], COEFFICIENTS[self.coefficients]
        polynomial = coefficients.projected if method.projected else coefficients.embedded
        count = len(signals)
        skipped, change = [False] * count, 0.0
        for i in range(max(1, method.first), count - method.last):
            if not self.start <= i / count < self.end:
                change = 0.0
                continue
            change += evaluate(polynomial, distance(signals[i - 1], signals[i]))
            skipped[i] = change < self.threshold
            if not skipped[i]:
                change = 0.0
        return skipped

    def report(self, skipped: Sequence[bool]) -> str:
        return told(self, f"{self.method}, {self.coefficients}", skipped)


def distance(before: Tensor, now: Tensor) -> float:
    """The mean change, relative to the mean size before."""
    return ((now - before).abs().mean() / before.abs().mean()).item()


def evaluate(polynomial: Sequence[float], x: float) -> float:
    """Horner's scheme, highest power first."""
    return functools.reduce(lambda value, coefficient: value * x + coefficient, polynomial, 0.0)
