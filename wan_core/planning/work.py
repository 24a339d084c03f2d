"""How much there is to compute: products and sums (each counts) in the matrix products and convolutions of a network.

The counts equal those of torch's own counter (`tests/test_planning.py` compares them on the meta device).
"""

from __future__ import annotations

from ..models.dit import TEXT_ROWS
from ..models.image_encoder import ImageEncoderLayout
from ..models.layout import LATENT_CHANNELS, DiTLayout
from ..models.text_encoder import UMT5Layout
from ..models.vace import VACELayout

# For each pixel of each frame, by a VAE of this width.
VAE_DECODE, VAE_ENCODE = (8_510_000, 96), (5_070_000, 96)
TINY_DECODE, TINY_ENCODE = (284_000, 64), (157_000, 64)
LOOK = 4  # a query meets a key and a value, a product and a sum each


def trunk_work(layout: DiTLayout, tokens: int, image_tokens: int = 0, vace: VACELayout | None = None) -> float:
    """One pass of one row of `tokens` tokens; image_tokens: that the model looks at beside 512 of text."""
    dim = layout.dim
    blocks = layout.layers * block_work(dim, layout.ffn_dim, tokens, image_tokens)
    if vace is not None:  # its blocks, and a product in front of the first and behind each
        blocks += vace.layers * block_work(dim, vace.ffn_dim, tokens) + (vace.layers + 1) * 2 * tokens * dim**2
        blocks += 2 * tokens * dim * 4 * vace.in_dim
    text = 2 * TEXT_ROWS * (layout.text_dim * dim + dim**2)
    return blocks + text + 2 * tokens * dim * 4 * (layout.in_dim + LATENT_CHANNELS)


def block_work(dim: int, ffn_dim: int, tokens: int, image_tokens: int = 0) -> float:
    context = TEXT_ROWS + image_tokens
    layers = 12 * tokens * dim**2 + 4 * context * dim**2 + 4 * tokens * dim * ffn_dim
    return layers + LOOK * tokens * dim * (tokens + context)


def text_work(layout: UMT5Layout, tokens: int = TEXT_ROWS) -> float:
    layer = 2 * tokens * (4 * layout.dim * layout.attention_dim + 3 * layout.dim * layout.ffn_dim)
    return layout.layers * (layer + LOOK * tokens**2 * layout.attention_dim)


def image_work(layout: ImageEncoderLayout) -> float:
    """For one picture."""
    n, dim = layout.positions, layout.dim
    layer = 2 * n * (4 * dim**2 + 2 * dim * layout.mlp_dim) + LOOK * n**2 * dim
    return layout.layers * layer + 2 * n * dim * 3 * layout.patch**2


def coding_work(width: int, frames: int, height: int, rows: int, published: tuple[int, int]) -> float:
    """Decoding or encoding (VAE_DECODE, ...) `frames` frames by a VAE of this width, without tiles."""
    per_pixel, published_width = published
    return per_pixel * (width / published_width) ** 2 * frames * height * rows
