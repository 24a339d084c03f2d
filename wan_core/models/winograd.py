"""Convolutions of three taps in time with fewer multiplications.

Winograd's minimal filtering makes m outputs of a 3-tap filter from m + 2 products instead of 3 m. Here a "number" is
a whole frame and a product is a 2-D convolution, so the trick costs a few additions of frames and saves a third
(two frames at once) or half (four frames) of the arithmetic.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import compute


class Recipe(NamedTuple):
    """outputs @ ((taps @ filter) * (inputs @ frames)), one row of `inputs` and `taps` a product."""

    inputs: list[list[float]]
    taps: list[list[float]]
    outputs: list[list[float]]


TWO_FRAMES = Recipe(
    inputs=[[0, 1, 1, 0], [0, -1, 1, 0], [1, 0, -1, 0], [0, 1, 0, -1]],
    taps=[[1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [1, 0, 0], [0, 0, 1]],
    outputs=[[1, 1, 1, 0], [1, -1, 0, -1]],
)
FOUR_FRAMES = Recipe(
    inputs=[
        [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0], [4, 0, -5, 0, 1, 0], [0, 4, 0, -5, 0, 1],
    ],
    taps=[
        [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6], [1 / 4, 0, 0], [0, 0, 1],
    ],
    outputs=[[1, 1, 1, 1, 1, 0], [1, -1, 2, -2, 0, 0], [1, 1, 4, 4, 0, 0], [1, -1, 8, -8, 0, 1]],
)  # fmt: skip


def pays(x: Tensor) -> bool:
    """Whether the saved arithmetic outweighs the additions: on a CPU in fp32, from some dozens of channels on.

    It is left out of training: there the frames between would have to be kept.
    """
    fits = x.shape[2] % 2 == 0 and x.shape[1] >= 64 and x.device.type == "cpu" and x.dtype == torch.float32
    return fits and not (compute.PLAIN or torch.is_grad_enabled())


def convolve_frames(frames: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3x3 convolution, padded in space: t + 2 frames (b, c, h, w), t even -> (b, d, t, h, w), channels last."""
    (batch, _, height, width), count = frames[0].shape, len(frames) - 2
    recipe = TWO_FRAMES if count % 4 else FOUR_FRAMES
    size = len(recipe.outputs)
    out = bias.expand(batch, count, height, width, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    for inputs, taps, *outputs in zip(recipe.inputs, recipe.taps, *recipe.outputs, strict=True):
        kernel = weighted_sum(weight.unbind(2), taps)
        for start in range(0, count, size):  # tiles of frames that overlap by two
            product = F.conv2d(weighted_sum(frames[start : start + size + 2], inputs), kernel, padding=1)
            for place, factor in enumerate(outputs, start):
                if factor:
                    out[:, :, place].add_(product, alpha=factor)
    return out


def weighted_sum(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    (first, weight), *others = [(t, w) for t, w in zip(tensors, weights, strict=True) if w]
    total = first * weight
    for tensor, weight in others:
        total.add_(tensor, alpha=weight)
    return total
