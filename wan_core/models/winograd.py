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


class Recipe(NamedTuple):
    """outputs @ ((taps @ filter) * (inputs @ frames)), one row of `inputs` and `taps` a product."""

    inputs: list[list[float]]
    taps: list[list[float]]
    outputs: list[list[float]]


TWO_FRAMES = Recipe(
    inputs=[[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    taps=[[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    outputs=[[1, 1, 1, 0], [0, 1, -1, -1]],
)
FOUR_FRAMES = Recipe(
    inputs=[
        [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1],
    ],
    taps=[
        [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1],
    ],
    outputs=[[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
)  # fmt: skip


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the saved arithmetic outweighs the additions: on a CPU, from some dozens of channels on.

    It is left out of training: there the frames between would have to be kept.
    """
    even = x.shape[2] % 2 == 0 and weight.shape[2] == 3
    return even and x.device.type == "cpu" and x.shape[1] >= 64 and not torch.is_grad_enabled()


def convolve_frames(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    """F.conv3d for an even number of frames: (b, c, t + 2, h, w) and (d, c, 3, 3, 3) -> (b, d, t, h, w)."""
    batch, frames = x.shape[0], x.shape[2] - 2
    recipe = TWO_FRAMES if frames % 4 else FOUR_FRAMES
    step = len(recipe.outputs)
    # the frames that come first, second, ... in every tile of m + 2 frames; the tiles overlap by two
    places = [x[:, :, i : i + frames - step + 1 : step] for i in range(step + 2)]
    out = bias.expand(batch, frames, *x.shape[3:], -1).clone().movedim(-1, 1)
    for inputs, taps, *outputs in zip(recipe.inputs, recipe.taps, *recipe.outputs, strict=True):
        images = weighted_sum(places, inputs).transpose(1, 2).flatten(0, 1)  # (b t/m, c, h, w)
        product = F.conv2d(images, weighted_sum(weight.unbind(2), taps), padding=padding)
        product = product.unflatten(0, (batch, -1)).transpose(1, 2)
        for place, factor in enumerate(outputs):
            if factor:
                out[:, :, place::step].add_(product, alpha=factor)
    return out


def weighted_sum(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    (first, weight), *others = [(t, w) for t, w in zip(tensors, weights, strict=True) if w]
    total = first * weight
    for tensor, weight in others:
        total.add_(tensor, alpha=weight)
    return total
