"""The UMT5 encoder that reads Wan's prompts.

A T5 v1.1 encoder (gated GELU, no biases, no attention scale, positions only as a bias on the attention scores) in which
every layer has its own table of position biases.

Module names are those of the published checkpoint (`models_t5_umt5-xxl-enc-bf16.pth`).
Sources: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
arXiv 1910.10683; Chung et al., "UniMax: Fairer and More Effective Language Sampling", arXiv 2304.09151 (UMT5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from .layers import Embedding, Linear, RMSNorm

MAX_DISTANCE = 128  # tokens further apart than this share one position bias


@dataclass(frozen=True)
class UMT5Layout:
    """The sizes of an encoder, all of them readable from its tensors; the defaults are UMT5-XXL's."""

    vocabulary: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> UMT5Layout:
        """Read the layout from a state dict's shapes (published names). Raises ModelError if it is not a UMT5."""
        try:
            vocabulary, dim = shapes["token_embedding.weight"]
            buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
            attention_dim = shapes["blocks.0.attn.q.weight"][0]
            ffn_dim = shapes["blocks.0.ffn.fc1.weight"][0]
        except KeyError as missing:
            raise ModelError(
                f"This is not a UMT5 text encoder: it has no tensor {missing}. "
                "Wan 2.1 needs the encoder of UMT5-XXL (models_t5_umt5-xxl-enc-bf16.pth)."
            ) from None
        layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        return cls(vocabulary, dim, attention_dim, ffn_dim, heads, layers, buckets)


def position_buckets(length: int, buckets: int, device: torch.device) -> Tensor:
    """(length, length) bucket numbers of the distance from every query (row) to every key (column).

    Half of the buckets look back, half ahead. In each half the first half counts single tokens, the rest grow
    logarithmically up to MAX_DISTANCE.
    """
    position = torch.arange(length, device=device)
    ahead = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    distance = ahead.abs()
    ratio = (distance.clamp(min=1).float() / exact).log() / math.log(MAX_DISTANCE / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (ahead > 0)


class PositionBias(nn.Module):
    """A learned number for every head and bucket, added to the attention scores."""

    def __init__(self, buckets: int, heads: int):
        super().__init__()
        self.embedding = Embedding(buckets, heads)

    def forward(self, buckets: Tensor, dtype: torch.dtype) -> Tensor:
        bias = self.embedding(buckets).to(dtype)  # (L, L) -> (L, L, heads)
        return bias.permute(2, 0, 1)[None]  # (1, heads, L, L)


class SelfAttention(nn.Module):
    def __init__(self, layout: UMT5Layout):
        super().__init__()
        self.heads = layout.heads
        self.q = Linear(layout.dim, layout.attention_dim, bias=False)
        self.k = Linear(layout.dim, layout.attention_dim, bias=False)
        self.v = Linear(layout.dim, layout.attention_dim, bias=False)
        self.o = Linear(layout.attention_dim, layout.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        # (b, L, dim) -> (b, heads, L, attention_dim / heads)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(x.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, layout: UMT5Layout):
        super().__init__()
        self.gate = nn.Sequential(Linear(layout.dim, layout.ffn_dim, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = Linear(layout.dim, layout.ffn_dim, bias=False)
        self.fc2 = Linear(layout.ffn_dim, layout.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class Block(nn.Module):
    def __init__(self, layout: UMT5Layout):
        super().__init__()
        self.norm1 = RMSNorm(layout.dim)
        self.attn = SelfAttention(layout)
        self.norm2 = RMSNorm(layout.dim)
        self.ffn = FeedForward(layout)
        self.pos_embedding = PositionBias(layout.buckets, layout.heads)

    def forward(self, x: Tensor, buckets: Tensor, padding: Tensor) -> Tensor:
        # The mask of the padded keys rides on the position bias: (1, heads, L, L) + (b, 1, 1, L)
        bias = self.pos_embedding(buckets, x.dtype) + padding
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nn.Module):
    """Token numbers in, one vector per token out."""

    def __init__(self, layout: UMT5Layout):
        super().__init__()
        self.layout = layout
        self.token_embedding = Embedding(layout.vocabulary, layout.dim)
        self.blocks = nn.ModuleList(Block(layout) for _ in range(layout.layers))
        self.norm = RMSNorm(layout.dim)

    def forward(self, tokens: Tensor, mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """tokens (b, L) and mask (b, L), 1 or True at real tokens -> (b, L, dim) in `dtype`, zero where masked.

        L may be any length: padding changes nothing at the real tokens, so callers need only pad to the longest.
        """
        x = self.token_embedding(tokens).to(dtype)
        buckets = position_buckets(tokens.shape[1], self.layout.buckets, tokens.device)
        real = mask.bool()
        padding = torch.zeros(real.shape, dtype=dtype, device=x.device)
        padding = padding.masked_fill(~real, torch.finfo(dtype).min)[:, None, None, :]
        for block in self.blocks:
            x = block(x, buckets, padding)
        return self.norm(x) * real[..., None]
