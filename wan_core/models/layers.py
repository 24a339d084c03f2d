"""The layers of every network here: torch's own, except that the input's type decides the arithmetic.

Weights may be stored in a narrower type than the one computed in (bf16 or fp8 files on a processor that is fast in
fp32 only): each call widens its own weights, uses them and drops the copy. With equal types nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import compute

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def widened(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """`parameter` in the type of `x`: itself where the types agree already."""
    return None if parameter is None else parameter.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias.

    In fp32 on a CPU, oneDNN's product takes 12 to 19 % less time than the one `F.linear` calls (measured on an AMD
    EPYC); torch offers it to its compiler only, without gradients.
    """
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    if ONEDNN and fits and not compute.PLAIN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """As torch's, but not on the meta device: a thousand layers draw for half a second there, for nothing."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, widened(self.weight, x), widened(self.bias, x))


def rows_at(table: Tensor, places: Tensor) -> Tensor:
    """The rows of a table at `places`. 8-bit floats are looked up as bytes: many a torch can only move them."""
    if table.dtype.itemsize == 1:
        return F.embedding(places, table.view(torch.uint8)).view(table.dtype)
    return F.embedding(places, table)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """As torch's, but not on the meta device: drawing there takes a second and a half, for nothing."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers of any shape -> their rows, in the type that the table is stored in."""
        return rows_at(self.weight, numbers)


class GELU(nn.Module):
    """The tanh form. Without autograd the result takes the place of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.gelu(x, approximate="tanh")
        return torch.ops.aten.gelu_(x, approximate="tanh")


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, widened(self.weight, x), widened(self.bias, x))


class Conv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, widened(self.weight, x), widened(self.bias, x))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, widened(self.weight, x), widened(self.bias, x), self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean is taken in fp32.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight = widened(self.weight, x)
        if x.device.type == "cuda" or compute.PLAIN:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        # Five times faster than torch's own on a CPU, which runs it as six separate passes.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x * torch.rsqrt(norm.square() / x.shape[-1] + self.eps).to(x.dtype) * weight
