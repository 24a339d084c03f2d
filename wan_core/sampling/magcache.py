"""MagCache: what the blocks do to the video hardly differs from the step before while its size hardly does.

From one step to the next the size of what the blocks add falls by a ratio that is nearly the same for all prompts and
seeds, so that one run tells it for all. A step that adds again what an earlier one added errs by as much as the sizes
differ; steps are left out until these errors add up to the threshold, which is the error budget, or too many follow
each other. So which steps are left out depends on the noise levels alone: it is known before the first, and the same
for both prompts, all windows and all processes.

Source: Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache", arXiv 2506.09045; the ratios are those
of the authors' repository MagCache (MagCache4Wan2.1), for the positive prompt. One thing differs. The authors' ratios
are of steps, and other numbers of steps take the nearest; here they make a curve over the noise levels, which holds for
any number of steps, shift, denoise and list of timesteps. In the authors' own runs it says the same.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..errors import InputError
from ..models.layout import DiTLayout
from .reuse import AUTO, Residuals, nearest, told
from .schedules import check_part, noise_levels


@dataclass(frozen=True)
class Curve:
    """How large what the blocks add is: its logarithm at falling noise levels, in straight lines between them."""

    levels: tuple[float, ...]
    logs: tuple[float, ...]

    def at(self, level: float) -> float:
        """The first and the last line go on beyond the ends."""
        right = min(max(bisect_left(self.levels, -level, key=lambda known: -known), 1), len(self.levels) - 1)
        (high, low), (begin, end) = self.levels[right - 1 : right + 1], self.logs[right - 1 : right + 1]
        return begin + (end - begin) * (high - level) / (high - low)

    def reaches(self, levels: Sequence[float]) -> bool:
        """Whether these levels lie between its own."""
        return levels[0] <= self.levels[0] and levels[-1] >= self.levels[-1]


def curve_of(levels: Sequence[float], ratios: Sequence[float]) -> Curve:
    """ratios: of the sizes from each level to the next."""
    return Curve(tuple(levels), (0.0, *accumulate(math.log(ratio) for ratio in ratios)))


def of_run(shift: float, ratios: Sequence[float]) -> Curve:
    """Of a whole run with this shift."""
    return curve_of(noise_levels(len(ratios) + 1, shift, 1.0)[:-1], ratios)


CURVES = {
    "T2V-1.3B": of_run(5.0, (
        1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957, 0.99511, 0.99535, 0.99552,
        0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415, 0.99419, 0.99396, 0.99388, 0.99349, 0.99309,
        0.9927, 0.99228, 0.99171, 0.99137, 0.99068, 0.99005, 0.98944, 0.98849, 0.98758, 0.98644, 0.98504, 0.9836,
        0.98202, 0.97977, 0.97717, 0.9741, 0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241, 0.86821,
        0.81838,
    )),
    "T2V-14B": of_run(5.0, (
        1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434, 0.99533, 0.99468, 0.99438,
        0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347, 0.99418, 0.99271, 0.99313, 0.99215, 0.99218,
        0.99216, 0.99163, 0.99138, 0.98982, 0.98996, 0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838, 0.98177,
        0.98037, 0.97678, 0.97546, 0.97184, 0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693, 0.8796,
        0.86111,
    )),
    "I2V-14B-480P": of_run(3.0, (
        0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383, 0.98857, 0.99065, 0.98845,
        0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721, 0.98571, 0.98543, 0.98157, 0.98411, 0.97952,
        0.98149, 0.9774, 0.97825, 0.97355, 0.97085, 0.97056, 0.96588, 0.96113, 0.9567, 0.94961, 0.93973, 0.93217,
        0.91878, 0.90955, 0.92617,
    )),
    "I2V-14B-720P": of_run(5.0, (
        0.99428, 0.98588, 0.98273, 0.99018, 0.98911, 0.98646, 0.99454, 0.9891, 0.99124, 0.99102, 0.99215, 0.99515,
        0.99576, 0.99068, 0.99097, 0.99166, 0.99041, 0.99201, 0.99101, 0.98599, 0.98845, 0.98848, 0.98862, 0.98718,
        0.98497, 0.98264, 0.98389, 0.97938, 0.97535, 0.97498, 0.973, 0.96827, 0.96261, 0.95335, 0.94649, 0.93397,
        0.91636, 0.89088, 0.8679,
    )),
}  # fmt: skip
MEASURED = "measured"


@dataclass(frozen=True)
class MagCache:
    """How eagerly to skip. Raises InputError for values that cannot work.

    threshold: the sum of errors at which a step is computed again; 0 skips nothing. most: steps skipped in a row.
    curve: one of `CURVES`; "measured": what the first run of the model shows, which skips nothing; or "auto" until a
    model is known (`chosen_for`). start, end: the part of the run, 0 to 1, in which steps may be skipped.
    device: where to keep what is reused, such as "cpu"; None: beside the tokens.
    """

    threshold: float = 0.12
    most: int = 4
    curve: str = AUTO
    start: float = 0.2
    end: float = 1.0
    device: str | None = None

    name = "MagCache"

    def __post_init__(self):
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"threshold is {self.threshold}, but it has to be 0 or more. Enter a number such as 0.12.")
        if self.most < 1:
            raise InputError(f"max_skip is {self.most}, but it has to be at least 1. Enter a number such as 4.")
        if self.curve not in (AUTO, MEASURED, *CURVES):
            names = ", ".join((AUTO, MEASURED, *CURVES))
            raise InputError(f"MagCache has no curve {self.curve!r}. Choose one of {names}.")
        check_part("start", self.start, "end", self.end)

    def chosen_for(self, layout: DiTLayout, width: int) -> MagCache:
        """With the curve of the published model that is nearest; width: of its usual videos, in pixels."""
        return replace(self, curve=nearest(layout, width)) if self.curve == AUTO else self

    def skipped(self, levels: Sequence[float], curve: Curve) -> list[bool]:
        """For each noise level whether its step is skipped."""
        logs, count = [curve.at(level) for level in levels], len(levels)
        skipped, error, last = [False] * count, 0.0, 0
        for i in range(1, count):
            error += abs(1 - math.exp(logs[i] - logs[last]))
            inside = self.start <= i / count < self.end
            skipped[i] = inside and error < self.threshold and i - last <= self.most
            if not skipped[i]:
                error, last = 0.0, i
        return skipped

    def report(self, skipped: Sequence[bool]) -> str:
        return told(self, self.curve, skipped)


class Measuring(Residuals):
    """Takes the size of what the blocks add in every step of one run, and skips none."""

    def __init__(self, steps: int):
        super().__init__([False] * steps)
        self.sizes: list[dict[Hashable, Tensor]] = [{} for _ in range(steps)]

    def compute(self, step: int, key: Hashable, advance: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        before = x.clone()
        result = advance(x)
        added = torch.sub(result, before, out=before)
        self.sizes[step][key] = torch.linalg.vector_norm(added, dim=-1, dtype=torch.float32).mean()
        return result

    def ratios(self) -> Tensor:
        """Of the sizes from each step to the next, (steps - 1,): the mean of all prompts and windows in both."""
        pairs = ([now[key] / before[key] for key in now if key in before] for before, now in pairwise(self.sizes))
        return torch.stack([torch.stack(ratios).mean() if ratios else torch.tensor(1.0) for ratios in pairs])
