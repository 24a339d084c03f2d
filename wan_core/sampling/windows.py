"""Sliding windows: a long video is predicted piece by piece, and the pieces are blended where they overlap.

In every step the model sees one window of latent frames after the other, so that the work grows with the length of the
video and not with its square, and no window is longer than what the model was trained on. Positions begin anew in each
window. The first schedule and its ramps are those of DiffSynth-Studio's sliding window; the others have the names that
ComfyUI gave to the context windows of AnimateDiff-Evolved.
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

Spans = list[tuple[int, int]]  # first frame of each window, and the one after its last: behind the end, it goes round


def diffsynth(size: int, stride: int, frames: int, step: int) -> Spans:
    """At equal distances from the beginning; the last window may be shorter."""
    return [(start, min(start + size, frames)) for start in range(0, frames - size + stride, stride)]


def standard_static(size: int, stride: int, frames: int, step: int) -> Spans:
    """The same in every step; the last window is moved back to the end."""
    return [(start, start + size) for start in (*range(0, frames - size, stride), frames - size)]


def standard_uniform(size: int, stride: int, frames: int, step: int) -> Spans:
    """Moved on from step to step, so that no frame is always at a window's edge; both ends in windows of full size."""
    first = int(stride * halving(step)) - stride
    starts = (min(max(start, 0), frames - size) for start in range(first, frames - size + stride, stride))
    return [(start, start + size) for start in dict.fromkeys(starts)]


def looped_uniform(size: int, stride: int, frames: int, step: int) -> Spans:
    """Moved on from step to step, and round from the end to the beginning."""
    first = int(frames * halving(step))
    starts = ((first + start) % frames for start in range(0, frames, stride))
    return [(start, start + size) for start in starts]


SCHEDULES = {
    "DiffSynth": diffsynth,
    "standard_static": standard_static,
    "standard_uniform": standard_uniform,
    "looped_uniform": looped_uniform,
}
FUSE_METHODS = ("overlap-linear", "pyramid", "flat")


def halving(step: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: ever finer parts of 0..1, spread evenly (van der Corput's sequence)."""
    return int(f"{step:b}"[::-1], 2) / 2 ** step.bit_length()


@dataclass(frozen=True)
class Windows:
    """What the model sees of a video at a time. Raises InputError for values that cannot work.

    size: latent frames in a window; stride: from one window's first to the next's. schedule: one of `SCHEDULES`.
    fuse_method: how much a window counts at its frames: "overlap-linear" rises and falls in straight lines where it
    overlaps another, "pyramid" over all of its length, "flat" is the same everywhere.
    freenoise: whether the noise of the first window comes again in the others, see `shared`.
    """

    size: int
    stride: int
    schedule: str = "DiffSynth"
    fuse_method: str = "overlap-linear"
    freenoise: bool = False

    def __post_init__(self):
        if not 1 <= self.stride <= self.size:
            raise InputError(
                f"window_size is {self.size} and window_stride is {self.stride}, but the stride has to be between 1 "
                "and the size, or frames between two windows would be left out. Half of the size is a good stride."
            )
        for name, known in (("schedule", SCHEDULES), ("fuse_method", FUSE_METHODS)):
            if getattr(self, name) not in known:
                raise InputError(f"There is no {name} {getattr(self, name)!r}. Choose one of {', '.join(known)}.")

    def spans(self, frames: int, step: int = 0) -> Spans:
        """The windows over so many latent frames in a step."""
        return SCHEDULES[self.schedule](self.size, self.stride, frames, step) if frames > self.size else [(0, frames)]

    def weights(self, start: int, stop: int, frames: int) -> Tensor:
        """How much a window counts at each of its frames, (stop - start,)."""
        count = stop - start
        rise = torch.ones(count)
        if self.fuse_method == "pyramid":
            rise = torch.arange(1.0, count + 1)
        elif self.fuse_method == "overlap-linear" and self.stride < self.size:
            rise = ((torch.arange(count) + 0.5) / (self.size - self.stride)).clamp(max=1)
        if self.fuse_method == "pyramid" or self.schedule == "looped_uniform":
            return torch.minimum(rise, rise.flip(0))
        inside = torch.ones(count)
        return torch.minimum(inside if start == 0 else rise, inside if stop == frames else rise.flip(0))

    def shared(self, noise: Tensor, seed: int) -> Tensor:
        """Noise (b, c, T, h, w) with that of the frames behind the first window in place of their own: each stride of
        frames gets, in another order, what stands a window before it. So all windows begin alike, and fit together.

        Qiu et al., "FreeNoise: Tuning-Free Longer Video Diffusion via Noise Rescheduling", arXiv 2310.15169; the
        orders are those that ComfyUI draws for the seed.
        """
        if not self.freenoise:
            return noise
        noise, frames = noise.clone(), noise.shape[2]
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, frames - self.size, self.stride):
            place = start + self.size
            order = start + torch.randperm(min(self.stride, frames - place), generator=generator)
            noise[:, :, place : place + len(order)] = noise[:, :, order.to(noise.device)]
        return noise


def spans_of(windows: Windows | None, frames: int, step: int = 0) -> Spans:
    """What the model sees at a time of so many latent frames: all of them without windows."""
    return windows.spans(frames, step) if windows else [(0, frames)]


class Sliding:
    """The windows of one run. injection: filled, for all `frames` latent frames of the canvas."""

    def __init__(self, windows: Windows | None, injection: Injection, frames: int):
        self.windows, self.injection, self.frames = windows, injection, frames

    def __call__(self, predict: Predict, x: Tensor, step: int = 0) -> Tensor:
        """(b, 16, P+T, h, w) -> the same of the model's answers. The prefix is in every window; its answers are
        averaged."""
        spans = spans_of(self.windows, self.frames, step)
        if len(spans) == 1:
            return predict(x, self.injection, 0)
        total, weight, prefix = torch.zeros_like(x), x.new_zeros(x.shape[2], 1, 1), self.injection.prefix
        front = torch.arange(prefix, device=x.device)
        for number, (start, stop) in enumerate(spans):
            seen = torch.arange(start, stop, device=x.device) % self.frames
            places = torch.cat([front, prefix + seen])
            weights = torch.cat([torch.ones(prefix), self.windows.weights(start, stop, self.frames)])
            weights = weights.to(x).view(-1, 1, 1)
            answer = predict(x.index_select(2, places), self.injection.frames(seen), number)
            total.index_add_(2, places, answer * weights)
            weight.index_add_(0, places, weights)
        return total / weight
