"""The least that a network's arithmetic takes: its operations, counted, at the rate at which this machine computes.

A multiplication and its addition are two operations. Counted is what the published networks do: whoever finds a way
with fewer (a clip's first frame without the taps that meet nothing, Winograd's products) may fall below the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from comfyui_wanflow.wan_core.models.layers import linear
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from measure import measure
from setting import Setting
from torch.nn import functional as F

TEXT_ROWS = 512
CUBE, SQUARE = 27, 9  # taps; of a single image's cubes only the last squares meet anything
TRIES = 3


def linear_operations(layout: DiTLayout, tokens: int) -> int:
    """Of the linear layers in one forward."""
    d, layers = layout.dim, layout.layers
    per_token = layers * (8 * d * d + 4 * d * d + 4 * d * layout.ffn_dim) + 2 * d * 4 * (layout.in_dim + layout.out_dim)
    per_row = layers * 4 * d * d + 2 * (layout.text_dim * d + d * d)
    return tokens * per_token + TEXT_ROWS * per_row


def attention_operations(layout: DiTLayout, tokens: int) -> int:
    return layout.layers * 4 * tokens * (tokens + TEXT_ROWS) * layout.dim


def dit_operations(layout: DiTLayout, tokens: int) -> int:
    return linear_operations(layout, tokens) + attention_operations(layout, tokens)


def lora_step_operations(layout: DiTLayout, tokens: int) -> float:
    """Forward, the forward again that checkpointing asks for, and the way back to the inputs of frozen layers."""
    return 3 * linear_operations(layout, tokens) + 4.5 * attention_operations(layout, tokens)


def convolution(inputs: int, outputs: int, taps: int, positions: int) -> int:
    return 2 * inputs * outputs * taps * positions


def residual_block(inputs: int, outputs: int, taps: int, positions: int) -> int:
    shortcut = convolution(inputs, outputs, 1, positions) if inputs != outputs else 0
    return convolution(inputs, outputs, taps, positions) + convolution(outputs, outputs, taps, positions) + shortcut


def middle(width: int, taps: int, frames: int, picture: int) -> int:
    attention = convolution(width, 4 * width, 1, frames * picture) + frames * 4 * picture**2 * width
    return 2 * residual_block(width, width, taps, frames * picture) + attention


def vae_operations(frames: int, height: int, width: int, dim: int = 96) -> tuple[int, int]:
    """Of encoding and of decoding a clip of 4n + 1 frames."""
    taps = SQUARE if frames == 1 else CUBE
    groups = (frames - 1) // 4
    times = frames, frames, 2 * groups + 1, groups + 1  # frames at the four levels, largest pictures first
    pictures = [height * width // 4**level for level in range(4)]
    widths = dim, dim, 2 * dim, 4 * dim, 4 * dim  # before the first level, and at each
    small, deep = times[3] * pictures[3], widths[4]
    encode = convolution(3, dim, taps, frames * pictures[0])
    decode = convolution(16, 16, 1, small) + convolution(16, deep, taps, small)
    for level in range(4):
        positions, inputs, outputs = times[level] * pictures[level], widths[level], widths[level + 1]
        upper = deep if level == 3 else widths[level + 2] // 2  # upsampling halves the channels
        alike = residual_block(outputs, outputs, taps, positions)
        encode += residual_block(inputs, outputs, taps, positions) + alike
        decode += residual_block(upper, outputs, taps, positions) + 2 * alike
    for level in range(3):
        smaller, outputs, below = pictures[level + 1], widths[level + 1], widths[level + 2]
        encode += convolution(outputs, outputs, 9, times[level] * smaller)
        decode += convolution(below, below // 2, 9, times[level] * pictures[level])
        if level:  # and in time, from which the first frame is left out
            encode += convolution(outputs, outputs, 3, (times[level + 1] - 1) * smaller)
            decode += convolution(below, 2 * below, 3, (times[level + 1] - 1) * smaller)
    encode += convolution(deep, 32, taps, small) + convolution(32, 32, 1, small)
    decode += convolution(dim, 3, taps, frames * pictures[0])
    both = middle(deep, taps, times[3], pictures[3])
    return encode + both, decode + both


def best_rate(operations: int, functions: Iterable[Callable], device: torch.device) -> float:
    """Operations a second, of all tries of all ways the fastest; a CPU's are seconds of one thread at work."""
    time = "seconds" if device.type == "cuda" else "cpu_seconds"
    with torch.inference_mode():
        samples = [measure(function, device) for function in functions for _ in range(TRIES + 1)]
    return operations / min(getattr(sample, time) for sample in samples)


def product_rate(setting: Setting, *dtypes: torch.dtype) -> float:
    """Of matrix products of the models' sizes, in the fastest of the types."""
    device = setting.device
    rows, inputs, outputs = (16384, 5120, 13824) if device.type == "cuda" else (2048, 1536, 8960)
    if setting.toy:
        rows, inputs, outputs = 64, 64, 64
    pairs = [[torch.ones(n, inputs, device=device, dtype=dtype) for n in (rows, outputs)] for dtype in dtypes]
    ways = [partial(way, x, weight, None) for x, weight in pairs for way in (F.linear, linear)]
    return best_rate(2 * rows * inputs * outputs, ways, device)


def convolution_rate(setting: Setting, dtype: torch.dtype) -> float:
    """Of 3 x 3 convolutions of the VAE's widths, which all have as many operations."""
    device = setting.device
    side = 512 if device.type == "cuda" else 128
    sizes = {8: 8} if setting.toy else {96: side, 192: side // 2, 384: side // 4}
    rates = []
    for width, size in sizes.items():
        for order in (torch.contiguous_format, torch.channels_last):
            x = torch.ones(4, width, size, size, device=device, dtype=dtype).to(memory_format=order)
            weight = torch.ones(width, width, 3, 3, device=device, dtype=dtype).to(memory_format=order)
            operations = convolution(width, width, 9, 4 * size**2)
            rates.append(best_rate(operations, [partial(F.conv2d, x, weight, padding=1)], device))
    return max(rates)
