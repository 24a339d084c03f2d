"""Rotary positions: each pair of a query's or a key's numbers turns with the frame, the row or the column.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864. Slowed for long videos:
Zhao et al., "RIFLEx: A Free Lunch for Length Extrapolation in Video Diffusion Transformers", arXiv 2502.15894.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

RIFLEX_TURN = 0.9  # of a whole one, over the length of the video: the authors stay clear of the end of the period


def parts(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's numbers turn with the frame, the row and the column: 44 + 42 + 42 of 128."""
    space = head_dim // 6 * 2
    return head_dim - 2 * space, space, space


def frequencies(width: int) -> Tensor:
    """Of the pairs of so many numbers, radians a position, (width / 2,) fp64."""
    return 10000.0 ** -(torch.arange(0, width, 2).double() / width)


def slowed(speeds: Tensor, frames: int, riflex: int) -> Tensor:
    """The frequencies for so many frames: where the one numbered `riflex` (from 1; 0: none) would have turned round
    within them, so that frames look alike which are a period apart, it is slowed to `RIFLEX_TURN` of a turn."""
    if riflex and frames * speeds[riflex - 1] > 2 * math.pi:
        speeds[riflex - 1] = RIFLEX_TURN * 2 * math.pi / frames
    return speeds


@functools.lru_cache(maxsize=4)
def rope_table(frames: int, height: int, width: int, head_dim: int, device: torch.device, riflex: int = 0) -> Tensor:
    """Rotations of a grid's tokens, (frames * height * width, 1, head_dim / 2) complex64.

    The first pairs of a head turn with the frame, the others with the row and the column; riflex: see `slowed`.
    """
    with torch.inference_mode(False):  # the table outlives this call, and training must be able to use it
        speeds = [frequencies(part) for part in parts(head_dim)]
        speeds[0] = slowed(speeds[0], frames, riflex)
        angles = [
            torch.outer(torch.arange(count, dtype=torch.float64), speed)
            for count, speed in zip((frames, height, width), speeds, strict=True)
        ]
        grid = torch.cat(
            [
                angles[0][:, None, None].expand(-1, height, width, -1),
                angles[1][None, :, None].expand(frames, -1, width, -1),
                angles[2][None, None, :].expand(frames, height, -1, -1),
            ],
            dim=-1,
        ).reshape(frames * height * width, 1, head_dim // 2)
        return torch.polar(torch.ones_like(grid), grid).to(torch.complex64).to(device)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn the adjacent pairs of (b, n, heads, head_dim) by the table, in fp32. Writes over an fp32 `x`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(table)).flatten(-2).to(x.dtype)
