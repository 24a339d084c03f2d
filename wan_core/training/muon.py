"""Muon: steps for matrices whose singular values are all about one, so that no direction is left behind.

Jordan et al., "Muon" (https://kellerjordan.github.io/posts/muon/), with the step size of Liu et al., "Muon is Scalable
for LLM Training", arXiv 2502.16982, under which AdamW's learning rates fit. What is no matrix is stepped by AdamW.

torch's own Muon takes matrices alone, one by one; here convolutions count as matrices (outputs, all inputs of one
output), and those of one shape are worked on together, which is what makes it cheap for small networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..compute import compute_dtype

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic iteration in the first source
EPS = 1e-8


class Muon(torch.optim.Optimizer):
    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int] | None, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(matrix_shape(parameter), []).append(parameter)
            for shape, parameters in shapes.items():
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                if shape is None:
                    self._step_others(parameters, group["lr"], *group["betas"])
                else:
                    self._step_matrices(parameters, shape, group["lr"], group["momentum"])

    def _step_matrices(self, parameters: Sequence[Tensor], shape: tuple[int, int], rate: float, momentum: float):
        gradients = torch.stack([parameter.grad.reshape(shape) for parameter in parameters])
        averages = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            averages.append(state["momentum"].lerp_(gradient, 1 - momentum))
        updates = orthogonal(gradients.lerp(torch.stack(averages), momentum)) * (0.2 * max(shape) ** 0.5)
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.sub_(update.view(parameter.shape), alpha=rate)

    def _step_others(self, parameters: Sequence[Tensor], rate: float, first: float, second: float):
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
            state["step"] += 1
            mean = state["mean"].lerp_(parameter.grad, 1 - first) / (1 - first ** state["step"])
            square = state["square"].lerp_(parameter.grad.square(), 1 - second) / (1 - second ** state["step"])
            parameter.addcdiv_(mean, square.sqrt_().add_(EPS), value=-rate)


def matrix_shape(parameter: Tensor) -> tuple[int, int] | None:
    """(outputs, inputs of one output); None for what is no matrix."""
    if parameter.ndim < 2:
        return None
    shape = len(parameter), parameter[0].numel()
    return None if min(shape) == 1 else shape


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """About U V^T of each matrix's singular value decomposition, (n, rows, columns): Newton and Schulz's iteration.

    bf16 is enough for it where the processor is quicker in bf16, as the first source found.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT, iterations).mT
    a, b, c = COEFFICIENTS
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(compute_dtype(matrices.device))
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.float()
