"""What the ways of leaving steps out have in common: what the blocks added before is added again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..models.layout import DiTLayout

AUTO = "auto"
WIDE = 5120  # the trunk of the 14B models
HIGH_DEFINITION = 1280  # pixels: the width that 720P models are made for


class Cache(Protocol):
    name: str
    threshold: float


def nearest(layout: DiTLayout, width: int) -> str:
    """Of the models that caches were made for the one nearest to this layout; width: of its usual videos, in pixels.

    What tells the two 14B image models apart is only what they are used for.
    """
    if layout.dim < WIDE:
        return "T2V-1.3B"
    if not layout.image_tokens:
        return "T2V-14B"
    return "I2V-14B-720P" if width >= HIGH_DEFINITION else "I2V-14B-480P"


def told(cache: Cache, how: str, skipped: Sequence[bool]) -> str:
    """What a cache did in a run, in a sentence or two."""
    advice = "" if any(skipped) or not cache.threshold else " Raise the threshold to skip some."
    return f"{cache.name} ({how}): skipped {sum(skipped)} of {len(skipped)} steps.{advice}"


class Residuals:
    """What the blocks added to the tokens in the last computed step of one run, kept while a skipped step follows.

    Prompts, windows and the like are told apart by a `key`. Tokens are those of one process.
    """

    def __init__(self, skipped: Sequence[bool], device: torch.device | str | None = None):
        self.skipped = skipped
        self.device = device
        self.kept: dict[Hashable, Tensor] = {}

    def body(self, step: int, key: Hashable) -> Callable:
        """For `Run.body` in this step."""
        return functools.partial(self.reuse if self.skipped[step] else self.compute, step, key)

    def source(self, step: int) -> int:
        """The step whose residuals this one adds: itself where it is computed."""
        while self.skipped[step]:
            step -= 1
        return step

    def compute(self, step: int, key: Hashable, advance: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Tokens (b, n, dim) through all blocks, which write over them."""
        self.kept.pop(key, None)
        if not self.needed_after(step):
            return advance(x)
        before = x.clone()
        result = advance(x)
        self.kept[key] = torch.sub(result, before, out=before).to(self.device or x.device)
        return result

    def reuse(self, step: int, key: Hashable, advance: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return x + self.kept[key].to(x.device)  # which stays till the next computed step: this one may be repeated

    def needed_after(self, step: int) -> bool:
        return any(self.skipped[step + 1 : step + 2])
