"""Read the facts of a toy clip back from its pixels, by plain code: what a model showed, not what it was told.

All functions take frames as (frames, height, width, 3) float in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .world import ALL_COLORS, COLORS, DIRECTIONS, SHAPES, coverage

LEAST_PIXELS = 4  # of a shape, in a frame that shows it


@dataclass(frozen=True)
class Reading:
    """What a clip shows; None where it shows no shape at all."""

    color: str | None
    shape: str | None
    direction: str | None
    background: str


def nearest_color(pixels: np.ndarray, colors: Sequence[str] = tuple(COLORS)) -> np.ndarray:
    """The index of the color nearest to each pixel of (..., 3)."""
    palette = np.array([ALL_COLORS[name] for name in colors], np.float32) / 255
    return np.square(pixels[..., None, :] - palette).sum(-1).argmin(-1)


def most_common(indices: np.ndarray, colors: Sequence[str]) -> str:
    return colors[np.bincount(indices.ravel(), minlength=len(colors)).argmax()]


def shape_mask(frames: np.ndarray) -> np.ndarray:
    """Where the shape is, (frames, height, width) bool: nearer to the foreground's colour than to the border's.

    The foreground's colour is the median of what clearly differs from the median border pixel; without such
    pixels the mask is empty.
    """
    border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1).reshape(-1, 3)
    background = np.median(border, axis=0)
    different = np.abs(frames - background).max(-1) > 0.2
    if not different.any():
        return different
    foreground = np.median(frames[different], axis=0)
    return np.square(frames - foreground).sum(-1) < np.square(frames - background).sum(-1)


def centers(mask: np.ndarray) -> np.ndarray:
    """The mask's centre (x, y) in each frame as fractions of the picture, (frames, 2); NaN where it is empty."""
    frames, height, width = mask.shape
    area = mask.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        x = (mask.sum(1) * (np.arange(width) + 0.5)).sum(-1) / area / width
        y = (mask.sum(2) * (np.arange(height) + 0.5)).sum(-1) / area / height
    return np.stack([x, y], -1)


def displacement(frames: np.ndarray) -> np.ndarray:
    """How far the shape went from the first to the last frame, (x, y) as fractions of the picture: the slope
    of a straight line through its centres, times the clip's length. NaN with fewer than two frames of shape."""
    center = centers(shape_mask(frames))
    seen = ~np.isnan(center[:, 0])
    if seen.sum() < 2:
        return np.array([np.nan, np.nan])
    when = np.arange(len(center))[seen]
    return np.polyfit(when, center[seen], 1)[0] * (len(center) - 1)


def read_direction(frames: np.ndarray, least: float = 0.08) -> str | None:
    """The direction of motion; None when the shape stays (goes less than `least` of the picture) or is absent."""
    moved = displacement(frames)
    if np.isnan(moved).any() or np.abs(moved).max() < least:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.dot(moved, DIRECTIONS[name])))


def read_shape(frames: np.ndarray, shapes: Sequence[str] = SHAPES) -> str | None:
    """The one of these shapes that the mask overlaps most, if drawn at the mask's centre and as large: by the
    intersection over union, in the mean of all frames. None where there is no shape."""
    masks = [mask for mask in shape_mask(frames) if mask.sum() >= LEAST_PIXELS]
    if not masks:
        return None
    return max(shapes, key=lambda shape: sum(overlap(mask, drawn_alike(mask, shape)) for mask in masks))


def drawn_alike(mask: np.ndarray, shape: str) -> np.ndarray:
    """The shape with the centre and the area of a mask (height, width), as a mask."""
    area, offset_x, offset_y = proportions(shape)
    rows, columns = np.indices(mask.shape)
    radius = np.sqrt(mask.sum() / area)
    x, y = columns[mask].mean() - offset_x * radius, rows[mask].mean() - offset_y * radius
    return coverage(shape, columns - x, rows - y, radius, pixel=1.0) >= 0.5


@cache
def proportions(shape: str) -> tuple[float, float, float]:
    """Of a shape of radius 1: its area, and where the centre of that lies, (x, y)."""
    side = np.arange(-1.5, 1.5, 0.01) + 0.005
    cover = coverage(shape, side[None], side[:, None], 1.0, pixel=0.01)
    return cover.sum() * 0.01**2, np.average(side, weights=cover.sum(0)), np.average(side, weights=cover.sum(1))


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """The intersection over union of two masks; 1 where both are empty."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def read(frames: np.ndarray, colors: Sequence[str] = tuple(COLORS), shapes: Sequence[str] = SHAPES) -> Reading:
    """Everything at once; a colour and a shape are the nearest of these."""
    mask = shape_mask(frames)
    indices = nearest_color(frames, colors)
    background = most_common(indices[~mask] if (~mask).any() else indices, colors)
    if mask.sum() < LEAST_PIXELS * len(frames):
        return Reading(None, None, None, background)
    inner = mask & np.roll(mask, 1, 1) & np.roll(mask, -1, 1) & np.roll(mask, 1, 2) & np.roll(mask, -1, 2)
    color = most_common(indices[inner if inner.any() else mask], colors)  # edges are mixed colours
    return Reading(color, read_shape(frames, shapes), read_direction(frames), background)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two arrays in 0..1."""
    return decibel(np.mean(np.square(a - b)))


def decibel(squared_error: float) -> float:
    """The signal-to-noise ratio in dB that a mean squared error of values in 0..1 is."""
    return float(-10 * np.log10(squared_error + 1e-12))
