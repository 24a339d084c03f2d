"""VACE's hints, added to the trunk's tokens while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.dit import Step
from ..models.vace import VACE


@dataclass(frozen=True, eq=False)
class VACEResiduals:
    """`context` (b, 96, P+T, h, w): kept frames, changed frames and the mask, as VACE reads them; P = `prefix`."""

    module: VACE
    context: Tensor
    strength: float
    trunk_layers: int
    prefix: int = 0

    def start(self, x: Tensor, step: Step, around: Callable) -> Callable[[int, Tensor], Tensor]:
        hints = self.hints(x, step, around)
        places = self.module.places(self.trunk_layers)

        def add(i: int, x: Tensor) -> Tensor:
            return torch.add(x, next(hints), alpha=self.strength) if i in places else x

        return add

    def hints(self, trunk: Tensor, step: Step, around: Callable):
        """One hint (b, n, dim) after the other, each worked out when it is asked for."""
        x = self.module.vace_patch_embedding(self.context.to(trunk.dtype)).flatten(1, 3)
        x = F.pad(x, (0, 0, trunk.shape[1] - x.shape[1], 0))  # zeros for the trunk's reference frames, in front
        first, *others = self.module.vace_blocks
        x, hint = around(first, x, step, trunk)
        del trunk
        yield hint
        for block in others:
            x, hint = around(block, x, step)
            yield hint

    def rows(self, count: int) -> VACEResiduals:
        b = self.context.shape[0]
        return replace(self, context=self.context.repeat(count // b, 1, 1, 1, 1) if b != count else self.context)

    def frames(self, start: int, stop: int) -> VACEResiduals:
        front, rest = self.context.tensor_split([self.prefix], dim=2)
        return replace(self, context=torch.cat([front, rest[:, :, start:stop]], dim=2))
