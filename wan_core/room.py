"""How much memory a run needs beside the weights, so that a host can make room before it begins.

The numbers were counted on the meta device (`tests/test_room.py` counts again): the tensors alive at the worst moment,
without gradients. Estimates are a little above the count, never below.
"""

from __future__ import annotations

import torch

from .models.dit import PATCH, DiTLayout

DECODE_CHANNELS, ENCODE_CHANNELS = 50, 40  # full-size channels alive at once, in units of the network's width


def sampling_room(
    layout: DiTLayout, latent: tuple[int, ...], branches: int, dtype: torch.dtype, vace: bool = False
) -> int:
    """Bytes for one step on latents (b, 16, T, h, w); branches is 2 where both prompts run as one batch.

    A block holds eight tensors as wide as the tokens, and VACE two beside them. Before the first block the timestep's
    projection, 6 dim^2 weights, is widened to fp32.
    """
    blocks = (11 if vace else 9) * branches * tokens_room(layout, latent, dtype)
    return max(blocks, 7 * layout.dim**2 * torch.float32.itemsize)


def tokens_room(layout: DiTLayout, latent: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one tensor of the tokens of latents (b, 16, T, h, w)."""
    rows, _, frames, height, width = latent
    return rows * frames * height * width // (PATCH[1] * PATCH[2]) * layout.dim * dtype.itemsize


def decoding_room(width: int, picture: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes to decode a clip of any length, by a VAE of this width; picture: (height, width) in pixels, or a tile's."""
    return DECODE_CHANNELS * width * picture[0] * picture[1] * dtype.itemsize


def encoding_room(width: int, picture: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes to encode a clip of any length; arguments as for `decoding_room`."""
    return ENCODE_CHANNELS * width * picture[0] * picture[1] * dtype.itemsize
