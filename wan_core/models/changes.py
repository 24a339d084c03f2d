"""What a LoRA does to one parameter of a network: every known kind, each a module that makes the changed parameter.

A change is called with the numbers of the parameter, in the type that is computed with, and answers with new ones;
strength 1 is the change as trained. Its factors are ordinary parameters, so that they move between devices and can be
trained. Shapes: a parameter of more than two sides counts as (rows, all the rest).

Sources: Hu et al., "LoRA", arXiv 2106.09685; Hyeon-Woo et al., "FedPara", arXiv 2108.06098 (LoHa); Yeh et al.,
"Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", arXiv 2309.14859 (LoKr and the
cores of convolutions); Liu et al., "DoRA", arXiv 2402.09353.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Change(nn.Module):
    """Base of all changes. `shape` is (rows, columns) of the parameters that it fits."""

    shape: tuple[int, int]

    def forward(self, weight: Tensor, strength: float) -> Tensor:
        raise NotImplementedError

    def hold(self, **factors: Tensor | None) -> None:
        """Register the factors as frozen parameters."""
        for name, factor in factors.items():
            value = None if factor is None else nn.Parameter(factor.detach(), requires_grad=False)
            self.register_parameter(name, value)


class LowRank(Change):
    """up @ down * scale; up (rows, rank, …), down (rank, columns, …)."""

    def __init__(self, up: Tensor, down: Tensor, scale: float = 1.0):
        super().__init__()
        self.hold(up=up, down=down)
        self.scale = scale
        self.shape = pair_shape(up, down)

    def forward(self, weight: Tensor, strength: float, x: Tensor | None = None) -> Tensor:
        """The changed weight (rows, …). With `x` (…, columns) the first argument is a linear layer's answer to x,
        (…, rows), and so is the result: the same numbers, for less work where x has few rows."""
        up, down = self.up.flatten(1).to(weight.dtype), self.down.flatten(1).to(weight.dtype)
        if x is None:
            return torch.addmm(weight.flatten(1), up, down, alpha=self.scale * strength).view(weight.shape)
        inner = F.linear(x, down).flatten(0, -2)
        return torch.addmm(weight.flatten(0, -2), inner, up.t(), alpha=self.scale * strength).view(weight.shape)


class Difference(Change):
    """The whole difference, times scale."""

    def __init__(self, value: Tensor, scale: float = 1.0):
        super().__init__()
        self.hold(value=value)
        self.scale = scale
        self.shape = flat(value.shape)

    def forward(self, weight: Tensor, strength: float) -> Tensor:
        return torch.add(weight, self.value.to(weight.dtype).view(weight.shape), alpha=self.scale * strength)


class Replacement(Change):
    """Another value in the place of the parameter's own."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.hold(value=value)
        self.shape = flat(value.shape)

    def forward(self, weight: Tensor, strength: float) -> Tensor:
        return torch.lerp(weight, self.value.to(weight.dtype).view(weight.shape), strength)


class Hadamard(Change):
    """LoHa: the elementwise product of two low-rank matrices; each a @ b, or with a core in between."""

    def __init__(self, w1_a, w1_b, w2_a, w2_b, t1=None, t2=None, scale: float = 1.0):
        super().__init__()
        self.hold(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, t1=t1, t2=t2)
        self.scale = scale
        self.shape = pair_shape(w1_a, w1_b, t1)
        if pair_shape(w2_a, w2_b, t2) != self.shape:
            raise ValueError("the two matrices have different shapes")

    def forward(self, weight: Tensor, strength: float) -> Tensor:
        first, second = pair(self.w1_a, self.w1_b, self.t1, weight), pair(self.w2_a, self.w2_b, self.t2, weight)
        return torch.addcmul(weight.flatten(1), first, second, value=self.scale * strength).view(weight.shape)


class Kronecker(Change):
    """LoKr: the Kronecker product of two matrices, each given whole or as a @ b."""

    def __init__(self, w1=None, w1_a=None, w1_b=None, w2=None, w2_a=None, w2_b=None, t2=None, scale: float = 1.0):
        super().__init__()
        self.hold(w1=w1, w1_a=w1_a, w1_b=w1_b, w2=w2, w2_a=w2_a, w2_b=w2_b, t2=t2)
        self.scale = scale
        first = pair_shape(w1_a, w1_b) if w1 is None else flat(w1.shape)
        second = pair_shape(w2_a, w2_b, t2) if w2 is None else flat(w2.shape)
        self.shape = (first[0] * second[0], first[1] * second[1])

    def forward(self, weight: Tensor, strength: float) -> Tensor:
        first = pair(self.w1_a, self.w1_b, None, weight) if self.w1 is None else self.w1.flatten(1).to(weight.dtype)
        second = pair(self.w2_a, self.w2_b, self.t2, weight) if self.w2 is None else self.w2.flatten(1).to(weight.dtype)
        return torch.add(weight, torch.kron(first, second).view(weight.shape), alpha=self.scale * strength)


class Decomposed(Change):
    """DoRA: another change decides the direction of each row (or column), `magnitude` its length.

    magnitude: (rows,) or (rows, 1, …), else (1, columns, …).
    """

    def __init__(self, change: Change, magnitude: Tensor):
        super().__init__()
        self.change = change
        self.hold(magnitude=magnitude)
        self.shape = change.shape
        if magnitude.shape[0] != self.shape[0] and magnitude.shape[0] != 1:
            raise ValueError("the magnitude has neither a number a row nor one a column")

    def forward(self, weight: Tensor, strength: float) -> Tensor:
        turned = self.change(weight, 1.0).float()
        side = 0 if self.magnitude.shape[0] == weight.shape[0] else 1
        others = [i for i in range(weight.ndim) if i != side]
        length = torch.linalg.vector_norm(turned, dim=others, keepdim=True)
        turned = turned * (self.magnitude.float().view(length.shape) / length.clamp_min(torch.finfo(torch.float32).eps))
        return torch.lerp(weight.float(), turned, strength).to(weight.dtype)


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns), all sides after the first taken together."""
    return shape[0], math.prod(shape[1:])


def pair(a: Tensor, b: Tensor, core: Tensor | None, like: Tensor) -> Tensor:
    """a (rows, rank) @ b (rank, columns) -> (rows, columns) in the type of `like`.

    With a core (rank, rank, …): a (rank, rows), b (rank, channels), and the columns are channels times the core's rest.
    """
    a, b = a.to(like.dtype), b.to(like.dtype)
    if core is None:
        return a @ b.flatten(1)
    return torch.einsum("ij...,jc,ir->rc...", core.to(like.dtype), b, a).flatten(1).contiguous()


def pair_shape(a: Tensor, b: Tensor, core: Tensor | None = None) -> tuple[int, int]:
    """What `pair` makes. Raises ValueError where the factors do not fit together."""
    if (core is None and a.shape[1] != b.shape[0]) or (core is not None and core.shape[:2] != (a.shape[0], b.shape[0])):
        raise ValueError("the ranks of the factors differ")
    if core is None:
        return a.shape[0], flat(b.shape)[1]
    return a.shape[1], b.shape[1] * math.prod(core.shape[2:])
