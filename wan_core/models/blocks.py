"""What the transformer is built of: patches to tokens, blocks of attention and feed-forward layers, tokens to patches.

The time step shifts, scales and gates what a block does; this adaptive modulation is DiT's (Peebles and Xie, arXiv
2212.09748). Without autograd, results take the place of inputs where those are nobody else's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import compute
from .attention import attention
from .layers import GELU, Conv3d, LayerNorm, Linear, RMSNorm, linear, widened
from .layout import PATCH
from .rope import rope

EPS = 1e-6
PRODUCT_TOKENS = 8192  # that go through a linear layer at a time, where results are written over inputs
ROPE_TOKENS = 2048  # that are held in fp32 at a time


class Step(NamedTuple):
    """What every block is given beside the tokens."""

    text: Tensor  # (b, n, dim)
    text_bias: Tensor | None  # (n,), log of how many equal rows each text row stands for
    image: Tensor | None  # (b, m, dim)
    modulation: Tensor  # (b, 6, dim) fp32
    rope: Tensor  # (tokens, 1, head_dim / 2) complex64
    backend: str  # of attention, as `trials.chosen` names it
    tokens: int  # of the whole video, of which a process may have a part
    attend: Callable[..., Tensor]  # from the video to the video
    split: Callable[[Tensor], Tensor]  # (b, tokens, dim) -> those of this process
    kept: dict | None = None  # see `Run`


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm (b, n, dim) without weights, then times 1 + scale, plus shift, each (b or 1, 1, dim)."""
    scale, shift = (1 + scale).to(x.dtype), shift.to(x.dtype)
    if scale.shape[0] == 1:  # one pass: the norm's own weights do it
        return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale)


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), where each of the tokens (b, n, dim) is worked on alone and keeps its shape.

    Where it may, it works on some of many tokens at a time, and writes the results over `x`.
    """
    if x.shape[1] <= PRODUCT_TOKENS or keeps_inputs():
        return function(x)
    for piece in x.split(PRODUCT_TOKENS, dim=1):
        piece.copy_(function(piece))
    return x


def once(kept: dict | None, key: object, make: Callable):
    """make(), or what it gave before where that was kept."""
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]


def plus(x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    """x + factor * y, which takes the place of `x` where it may."""
    return torch.add(x, y, alpha=factor, out=None if keeps_inputs() else x)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, which takes the place of `x` where it may."""
    return torch.addcmul(x, y, gate.to(x.dtype), out=None if keeps_inputs() else x)


def keeps_inputs() -> bool:
    """Whether nothing may be written over: autograd needs it, and the compiler saves memory by itself."""
    return compute.PLAIN or torch.is_grad_enabled() or torch.compiler.is_compiling()


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, EPS), RMSNorm(dim, EPS)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Tokens (b, n, dim) -> (b, n, dim)."""
        return self.o(self.look(x, step).flatten(-2))

    def look(self, x: Tensor, step: Step) -> Tensor:
        q = self.turned(self.q(x), self.norm_q, step.rope)
        k = self.turned(self.k(x), self.norm_k, step.rope)
        return step.attend(q, k, self.split(in_pieces(self.v, x)))

    def turned(self, x: Tensor, norm: nn.Module, table: Tensor) -> Tensor:
        """Queries or keys (b, n, dim), normed and turned -> (b, n, heads, head_dim); in pieces as in `in_pieces`."""
        if x.shape[1] <= ROPE_TOKENS or keeps_inputs():
            return rope(self.split(norm(x)), table)
        for piece, turns in zip(x.split(ROPE_TOKENS, dim=1), table.split(ROPE_TOKENS), strict=True):
            piece.copy_(rope(self.split(norm(piece)), turns).flatten(-2))
        return self.split(x)

    def split(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, heads, head_dim), after the norms, which run over all heads at once."""
        return x.unflatten(-1, (self.heads, -1))


class CrossAttention(SelfAttention):
    """Queries from the video, keys and values from the text."""

    def look(self, x: Tensor, step: Step) -> Tensor:
        return self.read(self.split(in_pieces(lambda x: self.norm_q(self.q(x)), x)), step)

    def read(self, q: Tensor, step: Step) -> Tensor:
        k, v = once(step.kept, self, lambda: self.pair(step.text))
        return attention(q, k, v, step.text_bias, step.backend)

    def pair(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Text (b, m, dim) -> keys and values (b, m, heads, head_dim)."""
        return self.split(self.norm_k(self.k(text))), self.split(self.v(text))


class ImageCrossAttention(CrossAttention):
    """Reads the image tokens too, with keys and values of their own."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.k_img, self.v_img = Linear(dim, dim), Linear(dim, dim)
        self.norm_k_img = RMSNorm(dim, EPS)

    def read(self, q: Tensor, step: Step) -> Tensor:
        image = attention(q, *once(step.kept, self.k_img, lambda: self.image_pair(step.image)), backend=step.backend)
        return plus(super().read(q, step), image)

    def image_pair(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (b, m, dim) -> keys and values (b, m, heads, head_dim)."""
        return self.split(self.norm_k_img(self.k_img(image))), self.split(self.v_img(image))


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, hidden: int):
        super().__init__(Linear(dim, hidden), GELU(), Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b, n, dim) -> (b, n, dim). The hidden layer is up to six times as wide: it is held in pieces."""
        return in_pieces(super().forward, x)


class Block(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, heads: int, image_tokens: bool = False):
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.cross_attn = (ImageCrossAttention if image_tokens else CrossAttention)(dim, heads)
        self.norm3 = LayerNorm(dim, EPS)
        self.ffn = FeedForward(dim, ffn_dim)
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Tokens (b, n, dim) -> (b, n, dim), in the place of `x` unless autograd keeps that."""
        # six of (b, 1, dim): shift, scale and gate of the self-attention, then of the feed-forward network
        rows = (self.modulation.float() + step.modulation).split(1, dim=1)
        x = gated_add(x, self.self_attn(modulated_norm(x, *rows[:2]), step), rows[2])
        x = plus(x, self.cross_attn(self.norm3(x), step))
        return gated_add(x, self.ffn(modulated_norm(x, *rows[3:5])), rows[5])


class PatchEmbedding(Conv3d):
    """(b, c, t, h, w) -> (b, t, h/2, w/2, dim). Patches do not overlap, so the convolution is one matrix product."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__(in_dim, dim, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        patches = x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
        return linear(patches, widened(self.weight, x).flatten(1), widened(self.bias, x))


class Head(nn.Module):
    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.head = Linear(dim, out_dim * math.prod(PATCH))
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time[:, None]).split(1, dim=1)
        return self.head(modulated_norm(x, shift, scale))
