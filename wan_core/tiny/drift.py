"""How far a long clip of the toy world strays from its own beginning: no caption is needed, only its pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from . import measure

SPAN = 16  # frames


@dataclass(frozen=True)
class Drift:
    """color, background: the farthest that they come from those of the first part, root mean square in 0..1.
    size: by how much of its first area the shape grows or shrinks at most; 1 where it vanishes.
    jump: the largest change from one frame to the next, root mean square over the picture in 0..1.
    """

    color: float
    background: float
    size: float
    jump: float


def drift(frames: np.ndarray, span: int = SPAN) -> Drift:
    """Of a clip (F, H, W, 3) in 0..1, part by part of `span` frames; what is left over at the end is one more.

    Raises ValueError for a clip of a single part: it has no beginning to stray from.
    """
    if len(frames) <= span:
        raise ValueError(f"The clip has {len(frames)} frames, but drift is seen over more than {span}.")
    first, *later = (looks(part) for part in parts(frames, span))
    apart = [[distance(one, other) for one, other in zip(first, part, strict=True)] for part in later]
    color, background, size = np.max(apart, axis=0)
    steps = np.sqrt(np.square(np.diff(frames, axis=0)).mean((1, 2, 3)))
    return Drift(float(color), float(background), float(size / first[2].item()), float(steps.max()))


def parts(frames: np.ndarray, span: int) -> Iterator[np.ndarray]:
    return (frames[start : start + span] for start in range(0, len(frames), span))


def looks(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The colours of shape and background, (3,), and how many pixels of a frame the shape takes, (1,)."""
    mask = measure.shape_mask(frames)
    background = np.median(frames[~mask], axis=0)
    color = np.median(frames[mask], axis=0) if mask.any() else background
    return color, background, np.array([max(1.0, mask.sum() / len(frames))])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one - other).mean()))
