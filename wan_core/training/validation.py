"""The loss on clips that are not trained on, for each range of noise levels: the same draws at every time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import torch

from .examples import Example
from .objective import Objective
from .order import generator_for

EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@torch.no_grad()
def validation_losses(objective: Objective, held_out: Sequence[Example]) -> dict[tuple[float, float], float]:
    """(lowest, highest level) -> the mean loss, not weighted, of all clips, each at a level of its own in between."""
    found = {}
    for low, high in pairwise(EDGES):
        losses = []
        for number, example in enumerate(held_out):
            generator = generator_for("validation", number, low)
            sigmas = low + (high - low) * torch.rand(1, generator=generator)
            losses.append(objective(example, [generator], sigmas).item())
        found[low, high] = fmean(losses)
    return found
