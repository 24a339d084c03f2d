"""How much memory a run needs beside the weights: numbers in, bytes out, nothing touched.

The host makes so much room before a phase begins, and the planner (wan_core/planning) tells it beforehand. The numbers
are those of the tensors alive at the worst moment, without gradients: counted on the meta device by
`tests/test_room.py`, and compared with the memory that whole runs take by `benchmarks/memory.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from .models.blocks import PRODUCT_TOKENS
from .models.image_encoder import ImageEncoderLayout
from .models.layers import Linear
from .models.layout import LATENT_CHANNELS, PATCH, DiTLayout
from .models.text_encoder import UMT5Layout

# Full-size channels alive at once, in units of the network's width: in a clip, and in a single picture.
DECODE_CHANNELS, ENCODE_CHANNELS = (44, 3.4), (35, 3)
TINY_DECODE_CHANNELS, TINY_ENCODE_CHANNELS = (10.8, 10.4), (10.2, 8.2)  # of a tiny VAE, which makes four frames of one
VACE_CHANNELS = 96  # of its context: kept and changed latents, and the mask
FULL = torch.float32.itemsize
ROTATION = torch.complex64.itemsize  # of a pair of numbers of a head
LATENTS = 8  # as large as the canvas, in fp32: what is denoised, noise, the answers, the solver's memory


def sampling_room(
    layout: DiTLayout,
    latent: tuple[int, ...],
    branches: int,
    dtype: torch.dtype,
    vace: bool = False,
    widened: int = 0,
) -> int:
    """Bytes for one step on latents (b, 16, T, h, w), frames in front included.

    branches: 2 where both prompts run as one batch; widened: bytes of the largest matrix that is converted in its call.
    In a block the attention holds five tensors as wide as the tokens; the feed-forward network two, and a piece of its
    hidden and of its last layer. VACE holds two more, and its context. Before the first block the timestep's
    projection, 6 dim^2 weights, is widened to fp32.
    """
    rows, _, frames, height, width = latent
    grid = frames * height * width // (PATCH[1] * PATCH[2])
    rows, tokens = branches * rows, branches * tokens_room(layout, latent, dtype)
    piece = rows * min(grid, PRODUCT_TOKENS) * (layout.ffn_dim + layout.dim) * dtype.itemsize
    block = max(5 * tokens, 2 * tokens + piece + widened) + grid * layout.dim // layout.heads // 2 * ROTATION
    if vace:
        block += 2 * tokens + rows * VACE_CHANNELS * frames * height * width * dtype.itemsize
    return max(block, 6 * layout.dim**2 * FULL)


def latents_room(latent: tuple[int, ...]) -> int:
    """Bytes of what the sampler itself holds of latents (b, 16, T, h, w)."""
    rows, _, frames, height, width = latent
    return LATENTS * rows * LATENT_CHANNELS * frames * height * width * FULL


def tokens_room(layout: DiTLayout, latent: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one tensor of the tokens of latents (b, 16, T, h, w)."""
    rows, _, frames, height, width = latent
    return rows * frames * height * width // (PATCH[1] * PATCH[2]) * layout.dim * dtype.itemsize


def text_room(layout: UMT5Layout, tokens: int, dtype: torch.dtype) -> int:
    """Bytes to read a prompt of so many tokens.

    The position bias of all heads is alive all through a block, twice while it is made; then come the three hidden
    layers of the feed-forward network.
    """
    bias = layout.heads * tokens**2 * dtype.itemsize
    hidden = tokens * (3 * layout.dim + 3 * layout.ffn_dim) * dtype.itemsize
    return bias + max(bias, hidden)


def image_room(layout: ImageEncoderLayout, dtype: torch.dtype) -> int:
    """Bytes to look at one picture."""
    return layout.positions * (3 * layout.dim + 2 * layout.mlp_dim) * dtype.itemsize


def decoding_room(
    width: int, picture: tuple[int, int], dtype: torch.dtype, single: bool = False, tiny: bool = False
) -> int:
    """Bytes to decode a clip of any length, or a single picture, by a VAE of this width.

    picture: (height, width) in pixels, or a tile's.
    """
    channels = (TINY_DECODE_CHANNELS if tiny else DECODE_CHANNELS)[single]
    return int(channels * width * picture[0] * picture[1] * dtype.itemsize)


def encoding_room(
    width: int, picture: tuple[int, int], dtype: torch.dtype, single: bool = False, tiny: bool = False
) -> int:
    """Bytes to encode; arguments as for `decoding_room`."""
    channels = (TINY_ENCODE_CHANNELS if tiny else ENCODE_CHANNELS)[single]
    return int(channels * width * picture[0] * picture[1] * dtype.itemsize)


def widened_room(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the largest matrix of a block that is kept in fewer bits than are computed with: each call unpacks its
    own."""
    layers = (
        layer
        for blocks in module.modules()
        if isinstance(blocks, nn.ModuleList)
        for layer in blocks.modules()
        if isinstance(layer, Linear) and layer.weight.dtype.itemsize < dtype.itemsize
    )
    return max((layer.in_features * layer.out_features for layer in layers), default=0) * dtype.itemsize


def changed_room(layout: DiTLayout, dtype: torch.dtype) -> int:
    """Bytes of the largest matrix of a block with a LoRA worked in: the change, and the sum."""
    return 2 * layout.dim * layout.ffn_dim * dtype.itemsize
