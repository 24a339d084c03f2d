"""Sequence parallelism: each process has a part of the tokens, and for attention a part of the heads.

All layers but self-attention look at one token at a time. For self-attention the processes trade: each gives the others
its tokens of their heads, and gets all tokens of its own; afterwards they trade back. The text, the image and the time
are there in full in every process.

Source: Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence
Transformer Models", arXiv 2309.14509.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from ..models.attention import attention
from ..models.slots import Alone
from .talk import collected, talking


class Sequence(Alone):
    """The part of process `rank` of `size`, which speak through `group`. Without gradients.

    Parts are equally long: zeros follow the last token, and are dropped before anyone looks at them.
    """

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None):
        self.rank, self.size, self.group = rank, size, group

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        part = -(-x.shape[dim] // self.size)
        return padded(x, part * self.size, dim).narrow(dim, self.rank * part, part)

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        return torch.cat(collected(x, self.size, self.group), dim=1)[:, :tokens]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: int, backend: str) -> Tensor:
        q, k, v = (self.heads_for_tokens(x)[:, :tokens] for x in (q, k, v))
        answer = attention(q, k, v, backend=backend)  # (b, tokens, heads / size, head_dim)
        return self.tokens_for_heads(answer)

    def heads_for_tokens(self, x: Tensor) -> Tensor:
        """Part of the tokens, all heads (b, n, heads, d) -> all tokens, part of the heads (b, size n, …, d)."""
        mine = x.unflatten(2, (self.size, -1)).movedim(2, 0)  # (size, b, n, heads / size, d)
        return self.trade(mine).movedim(0, 1).flatten(1, 2)

    def tokens_for_heads(self, x: Tensor) -> Tensor:
        """All tokens, part of the heads (b, tokens, heads / size, d) -> part of the tokens, all heads (b, n, …, d)."""
        part = -(-x.shape[1] // self.size)
        mine = padded(x, part * self.size, 1).unflatten(1, (self.size, part)).movedim(1, 0)
        return self.trade(mine).movedim(0, 2).flatten(2, 3)  # (size, b, n, heads / size, d) -> (b, n, heads, d)

    def trade(self, mine: Tensor) -> Tensor:
        """(size, …): one row for each process -> one row from each."""
        mine = mine.contiguous()
        others = torch.empty_like(mine)
        with talking():
            dist.all_to_all_single(others, mine, group=self.group)
        return others


def padded(x: Tensor, length: int, dim: int) -> Tensor:
    """`x` followed by zeros up to this length."""
    missing = length - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)
