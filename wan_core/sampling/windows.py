"""Sliding windows: a long video is predicted piece by piece, and the pieces are blended where they overlap.

In every step the model sees one window of latent frames after the other, so that the work grows with the length of the
video and not with its square, and no window is longer than what the model was trained on. Positions begin anew in each
window. The windows and their ramps are those of DiffSynth-Studio's sliding window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.injection import Injection
from ..errors import InputError

# What the model says of one window: (latents (b, 16, P+n, h, w), its injection, its number) -> (b, 16, P+n, h, w)
Predict = Callable[[Tensor, Injection, int], Tensor]


@dataclass(frozen=True)
class Windows:
    """size: latent frames in a window; stride: from one window's first to the next's. Raises InputError."""

    size: int
    stride: int

    def __post_init__(self):
        if not 1 <= self.stride <= self.size:
            raise InputError(
                f"window_size is {self.size} and window_stride is {self.stride}, but the stride has to be between 1 "
                "and the size, or frames between two windows would be left out. Half of the size is a good stride."
            )

    def spans(self, frames: int) -> list[tuple[int, int]]:
        """(start, stop) of the windows over so many latent frames. The last may be shorter."""
        starts = range(0, max(1, frames - self.size + self.stride), self.stride)
        return [(start, min(start + self.size, frames)) for start in starts]

    def weights(self, start: int, stop: int, frames: int) -> Tensor:
        """How much a window counts at each of its frames (stop - start,): rising and falling in a straight line where
        it overlaps another, 1 between."""
        width = self.size - self.stride
        rise = torch.ones(stop - start)
        if width:
            rise = ((torch.arange(stop - start) + 0.5) / width).clamp(max=1)
        inside = torch.ones(stop - start)
        return torch.minimum(inside if start == 0 else rise, inside if stop == frames else rise.flip(0))


def spans_of(windows: Windows | None, frames: int) -> list[tuple[int, int]]:
    """(start, stop) of what the model sees at a time of so many latent frames: all of them without windows."""
    return windows.spans(frames) if windows else [(0, frames)]


class Sliding:
    """The windows of one run. injection: filled, for all `frames` latent frames of the canvas."""

    def __init__(self, windows: Windows | None, injection: Injection, frames: int):
        self.prefix, self.windows, self.frames = injection.prefix, windows, frames
        self.spans = spans_of(windows, frames)
        whole = len(self.spans) == 1
        self.injections = [injection] if whole else [injection.frames(*span) for span in self.spans]

    def __call__(self, predict: Predict, x: Tensor) -> Tensor:
        """(b, 16, P+T, h, w) -> the same of the model's answers. The prefix is in every window; its answers are
        averaged."""
        if len(self.spans) == 1:
            return predict(x, self.injections[0], 0)
        total, weight = torch.zeros_like(x), x.new_zeros(x.shape[2], 1, 1)
        front = torch.arange(self.prefix)
        for number, (start, stop) in enumerate(self.spans):
            places = torch.cat([front, self.prefix + torch.arange(start, stop)]).to(x.device)
            weights = torch.cat([torch.ones(self.prefix), self.windows.weights(start, stop, self.frames)])
            weights = weights.to(x).view(-1, 1, 1)
            answer = predict(x.index_select(2, places), self.injections[number], number)
            total.index_add_(2, places, answer * weights)
            weight.index_add_(0, places, weights)
        return total / weight
