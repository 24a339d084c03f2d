"""What a call of the trunk is given beside latents, time and text: what is injected, and how it is to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .attention import attention


@dataclass(frozen=True, eq=False)
class Slots:
    """All that a condition can add to the trunk. T counts the canvas's latent frames, P the prefix's, R references.

    concat          name -> (b, c, P+T, h, w), beside the latents; which names, see `DiTLayout.concat`
    embed_add       (b, dim, P+T, h/2, w/2), added to the embedded patches
    prefix_tokens   (b, dim, R, h/2, w/2), whole embedded frames in front
    context_prefix  (b, n, dim) image tokens, any n
    time_add        (b, 6, dim), added to the blocks' modulation, not to the head's
    block_residuals objects with `start(x, step, around) -> add(i, x)`
    prefix_frames   (b, 16, P, h, w) clean latents of the frames in front; the sampler puts the noisy ones into x
    """

    concat: Mapping[str, Tensor] = field(default_factory=dict)
    embed_add: Tensor | None = None
    prefix_tokens: Tensor | None = None
    context_prefix: Tensor | None = None
    time_add: Tensor | None = None
    block_residuals: tuple = ()
    prefix_frames: Tensor | None = None

    def map_tensors(self, function: Callable[[Tensor], Tensor]):
        """The same slots with `function` applied to each tensor."""
        changed = {name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, concat={name: function(value) for name, value in self.concat.items()}, **changed)

    def rows(self, count: int):
        """For a batch of `count`: one row serves all, b rows are repeated as a whole (as in merged guidance)."""

        def fit(x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                return x.expand(count, *x.shape[1:])
            return x.repeat(count // x.shape[0], *[1] * (x.ndim - 1))

        residuals = tuple(residual.rows(count) for residual in self.block_residuals)
        return replace(self.map_tensors(fit), block_residuals=residuals)


def call(module: Callable, *args: Any) -> Any:
    return module(*args)


class Alone:
    """One process has all tokens. In its place, `parallel.Sequence` gives each of several processes a part."""

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """The part of this process of all tokens, which lie along `dim`."""
        return x

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """This process's part (b, n, c) -> all tokens (b, tokens, c)."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: int, backend: str) -> Tensor:
        """Attention of this process's part of q to all of k and v, each (b, n, heads, head_dim)."""
        return attention(q, k, v, backend=backend)


@dataclass(frozen=True)
class Run:
    """What differs from call to call, so that handles which share a trunk never write to it.

    `around(module, *args)` calls a module: checkpointing and offload take its place. `body(advance, x)` takes the
    tokens through all blocks by `advance(x)`, which writes over them: a cache may leave that out. `parallel` shares the
    tokens among processes. `kept`: what follows from the text and the image alone is worked out once and kept there,
    for further calls with the same ones; None: it is worked out in each call. `riflex`: which of the frequencies that
    turn with the frame is slowed for long videos, see rope.py.
    """

    compute_dtype: torch.dtype = torch.float32
    attention: str = "auto"
    around: Callable = call
    body: Callable = call
    parallel: Alone = field(default_factory=Alone)
    kept: dict | None = None
    riflex: int = 0
