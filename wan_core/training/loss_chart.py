"""How a training goes, as a curve: thinned for the picture on the node, and drawn as a picture of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

POINTS = 300  # more than that no picture shows
SIZE, LEFT, RIGHT, TOP, BOTTOM = (768, 432), 72, 20, 48, 44
PAPER, INK, FAINT, GRID, CURVE = (28, 30, 36), (236, 236, 236), (84, 110, 140), (58, 62, 72), (92, 190, 255)

Point = tuple[int, float, float]  # a step, the mean loss around it, and the same smoothed


def curve(losses: Sequence[float], points: int = POINTS) -> list[Point]:
    """At most `points` of the losses of all steps, the last step among them."""
    smooth = smoothed(np.asarray(losses, float))
    ends = np.unique(np.linspace(0, len(losses), min(points, len(losses)) + 1).round().astype(int))
    pairs = zip(ends, ends[1:], strict=False)
    return [(int(end), float(np.mean(losses[start:end])), float(smooth[end - 1])) for start, end in pairs]


def smoothed(losses: np.ndarray) -> np.ndarray:
    """The mean of the last twentieth or so of the steps, falling off with their age. Single losses tell little: each
    is of another noise level."""
    decay = 1 - 1 / max(5, len(losses) / 20)
    result, mean, weight = np.empty_like(losses), 0.0, 0.0
    for step, loss in enumerate(losses):
        mean, weight = decay * mean + (1 - decay) * loss, decay * weight + 1 - decay
        result[step] = mean / weight
    return result


def loss_chart(losses: Sequence[float]) -> Tensor:
    """A picture (1, H, W, 3) in 0..1 of the losses of all steps."""
    paper = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(paper)
    points = curve(losses)
    if not points:
        draw.text((SIZE[0] / 2, SIZE[1] / 2), "no step was taken", FAINT, font(18), "mm")
        return as_image(paper)
    steps, lowest, highest = points[-1][0], *bounds(points)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (SIZE[0] - LEFT - RIGHT) * step / steps
        height = (min(max(loss, lowest), highest) - lowest) / (highest - lowest)
        return x, SIZE[1] - BOTTOM - (SIZE[1] - TOP - BOTTOM) * height

    for loss in np.linspace(lowest, highest, 5):
        draw.line((place(0, loss), place(steps, loss)), GRID)
        draw.text((LEFT - 10, place(0, loss)[1]), f"{loss:.3g}", FAINT, font(13), "rm")
    for step in (0, steps // 2, steps):
        draw.text((place(step, lowest)[0], SIZE[1] - BOTTOM + 10), f"{step}", FAINT, font(13), "ma")
    for column, color, width in ((1, FAINT, 1), (2, CURVE, 3)):
        line = [place(point[0], point[column]) for point in points]
        draw.line(line if len(line) > 1 else [place(0, points[0][column]), *line], color, width)
    draw.text((LEFT, 14), f"loss {points[-1][2]:.4g} after {steps} steps", INK, font(18))
    return as_image(paper)


def bounds(points: Sequence[Point]) -> tuple[float, float]:
    """The lowest and the highest loss to show: all of the smooth curve, and what of the other is not an outlier."""
    smooth, raw = (np.array([point[column] for point in points]) for column in (2, 1))
    low, high = min(smooth.min(), np.quantile(raw, 0.02)), max(smooth.max(), np.quantile(raw, 0.98))
    margin = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-6)
    return low - margin, high + margin


def as_image(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
