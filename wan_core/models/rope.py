"""Rotary positions: each pair of a query's or a key's numbers turns with the frame, the row or the column.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=4)
def rope_table(frames: int, height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Rotations of a grid's tokens, (frames * height * width, 1, head_dim / 2) complex64.

    The first pairs of a head turn with the frame, the others with the row and the column (44 + 42 + 42 of 128).
    """
    space = head_dim // 6 * 2
    widths = (head_dim - 2 * space, space, space)
    with torch.inference_mode(False):  # the table outlives this call, and training must be able to use it
        angles = [
            torch.outer(torch.arange(n, dtype=torch.float64), 10000.0 ** -(torch.arange(0, d, 2).double() / d))
            for n, d in zip((frames, height, width), widths, strict=True)
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
