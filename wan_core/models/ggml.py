"""The block types of GGUF files, unpacked by torch on any device.

A row of a matrix is cut into blocks of 32 or 256 numbers. A block is a few bytes of scales and the numbers in 2 to 8
bits; in the K types, scales of 16 or 32 numbers are themselves scaled by the block's. All functions take blocks as
bytes (…, bytes) and give fp32 (…, numbers).
Source: the formats of ggml (github.com/ggml-org/ggml, `ggml-common.h` and the decoders of its `gguf` package).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# The sixteen values of the IQ4 types.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def fields(x: Tensor, width: int) -> Tensor:
    """The bit fields of each byte, lowest first: (…, n) -> (…, 8 / width, n)."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=x.device)
    return (x[..., None, :] >> shifts[:, None]) & (2**width - 1)


def bits(x: Tensor) -> Tensor:
    """The bits of bytes in their order: (…, n) -> (…, 8 n)."""
    return fields(x, 1).transpose(-1, -2).flatten(-2)


def half(x: Tensor) -> Tensor:
    """Two bytes as a float: (…, 2) -> (…, 1) fp32."""
    return x.contiguous().view(torch.float16).float()


def cut(x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return x.split(sizes, dim=-1)


def q4_0(x: Tensor) -> Tensor:
    scale, low = cut(x, 2, 16)
    return half(scale) * (fields(low, 4).flatten(-2).float() - 8)


def q4_1(x: Tensor) -> Tensor:
    scale, least, low = cut(x, 2, 2, 16)
    return half(scale) * fields(low, 4).flatten(-2).float() + half(least)


def q5_0(x: Tensor) -> Tensor:
    scale, high, low = cut(x, 2, 4, 16)
    return half(scale) * ((fields(low, 4).flatten(-2) | bits(high) << 4).float() - 16)


def q5_1(x: Tensor) -> Tensor:
    scale, least, high, low = cut(x, 2, 2, 4, 16)
    return half(scale) * (fields(low, 4).flatten(-2) | bits(high) << 4).float() + half(least)


def q8_0(x: Tensor) -> Tensor:
    scale, numbers = cut(x, 2, 32)
    return half(scale) * numbers.view(torch.int8).float()


def q2_k(x: Tensor) -> Tensor:
    scales, low, scale, least = cut(x, 16, 64, 2, 2)
    slope, offset = half(scale) * (scales & 15).float(), half(least) * (scales >> 4).float()  # (…, 16) each
    numbers = fields(low.unflatten(-1, (2, 32)), 2).flatten(-3).unflatten(-1, (16, 16))
    return (slope[..., None] * numbers.float() - offset[..., None]).flatten(-2)


def q3_k(x: Tensor) -> Tensor:
    high, low, scales, scale = cut(x, 32, 64, 12, 2)
    scales = fields(scales[..., :8], 4).flatten(-2) | fields(scales[..., 8:], 2).flatten(-2) << 4  # (…, 16) of 6 bits
    slope = half(scale) * (scales.float() - 32)
    numbers = fields(low.unflatten(-1, (2, 32)), 2).flatten(-3) | fields(high, 1).flatten(-2) << 2
    return (slope[..., None] * (numbers.unflatten(-1, (16, 16)).float() - 4)).flatten(-2)


def k_scales(x: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes hold eight scales and eight offsets of 6 bits: (…, 12) -> (…, 8) and (…, 8), fp32.

    The first four of each lie whole in the low bits of bytes 0 to 7, whose two high bits top the halves of bytes 8
    to 11, which are the other four.
    """
    scales, offsets, rest = cut(x, 4, 4, 4)
    scales = torch.cat([scales & 63, rest & 15 | scales >> 6 << 4], dim=-1)
    offsets = torch.cat([offsets & 63, rest >> 4 | offsets >> 6 << 4], dim=-1)
    return scales.float(), offsets.float()


def q4_k(x: Tensor) -> Tensor:
    scale, least, scales, low = cut(x, 2, 2, 12, 128)
    return k_numbers(scale, least, scales, fields(low.unflatten(-1, (4, 32)), 4).flatten(-3))


def q5_k(x: Tensor) -> Tensor:
    scale, least, scales, high, low = cut(x, 2, 2, 12, 32, 128)
    numbers = fields(low.unflatten(-1, (4, 32)), 4).flatten(-3) | fields(high, 1).flatten(-2) << 4
    return k_numbers(scale, least, scales, numbers)


def k_numbers(scale: Tensor, least: Tensor, scales: Tensor, numbers: Tensor) -> Tensor:
    scales, offsets = k_scales(scales)
    slope, offset = half(scale) * scales, half(least) * offsets
    return (slope[..., None] * numbers.unflatten(-1, (8, 32)).float() - offset[..., None]).flatten(-2)


def q6_k(x: Tensor) -> Tensor:
    low, high, scales, scale = cut(x, 128, 64, 16, 2)
    low = fields(low.unflatten(-1, (2, 64)), 4).flatten(-3)
    numbers = low | fields(high.unflatten(-1, (2, 32)), 2).flatten(-3) << 4
    slope = half(scale) * scales.view(torch.int8).float()
    return (slope[..., None] * (numbers.unflatten(-1, (16, 16)).float() - 32)).flatten(-2)


def iq4_values(numbers: Tensor) -> Tensor:
    return torch.tensor(IQ4, dtype=torch.float32, device=numbers.device)[numbers.int()]


def iq4_nl(x: Tensor) -> Tensor:
    scale, low = cut(x, 2, 16)
    return half(scale) * iq4_values(fields(low, 4).flatten(-2))


def iq4_xs(x: Tensor) -> Tensor:
    scale, high, low, numbers = cut(x, 2, 2, 4, 128)
    # scale i of eight: its low 4 bits in half i % 2 of byte i / 2, its high 2 bits in pair i % 4 of byte i / 4
    scales = fields(low, 4).transpose(-1, -2).flatten(-2) | fields(high, 2).transpose(-1, -2).flatten(-2) << 4
    slope = half(scale) * (scales.float() - 32)
    values = iq4_values(fields(numbers.unflatten(-1, (8, 16)), 4).flatten(-2))  # (…, 8, 32)
    return (slope[..., None] * values).flatten(-2)


@dataclass(frozen=True)
class BlockType:
    """How many bytes a block takes, how many numbers it holds, and what makes them."""

    bytes: int
    numbers: int
    unpack: Callable[[Tensor], Tensor]

    def __call__(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """parts["weight"] (…, row's bytes) -> (…, row's numbers) in `dtype`."""
        blocks = parts["weight"].unflatten(-1, (-1, self.bytes))
        return self.unpack(blocks).flatten(-2).to(dtype)


TYPES = {
    "Q4_0": BlockType(18, 32, q4_0),
    "Q4_1": BlockType(20, 32, q4_1),
    "Q5_0": BlockType(22, 32, q5_0),
    "Q5_1": BlockType(24, 32, q5_1),
    "Q8_0": BlockType(34, 32, q8_0),
    "Q2_K": BlockType(84, 256, q2_k),
    "Q3_K": BlockType(110, 256, q3_k),
    "Q4_K": BlockType(144, 256, q4_k),
    "Q5_K": BlockType(176, 256, q5_k),
    "Q6_K": BlockType(210, 256, q6_k),
    "IQ4_NL": BlockType(18, 32, iq4_nl),
    "IQ4_XS": BlockType(136, 256, iq4_xs),
}
