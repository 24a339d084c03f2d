"""The flow-matching objective: what a Wan model learns to predict.

A training sample is a straight line from data (sigma 0) to noise (sigma 1); the model predicts the velocity along
it, noise - data. Source: Lipman et al., "Flow Matching for Generative Modeling", arXiv 2210.02747; the shift of the
noise levels: Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206, equation 23.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..models.dit import DiT, Run, Slots
from ..sampling.schedules import shifted


@dataclass(frozen=True, eq=False)
class Levels:
    """The noise levels to train at, from pure noise down, and how much the loss counts at each; (count,) fp32 both."""

    sigmas: Tensor
    weights: Tensor

    def between(self, low: float, high: float) -> Levels:
        """Those from `low` to `high`, shares of the schedule: 0 is its noisiest level, 1 comes after its cleanest."""
        first, last = int(low * len(self.sigmas)), int(high * len(self.sigmas))
        if not 0 <= first < last <= len(self.sigmas):
            raise InputError(
                f"The timesteps from {low} to {high} of the schedule are none. "
                "Both numbers lie in 0..1, and the second is the larger one."
            )
        return Levels(self.sigmas[first:last], self.weights[first:last])

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` levels, each as likely as any other, and their weights; (count,) both."""
        chosen = torch.randint(len(self.sigmas), (count,), generator=generator)
        return self.sigmas[chosen], self.weights[chosen]


def training_levels(shift: float = 5.0, count: int = 1000) -> Levels:
    """The levels and weights of DiffSynth-Studio, so that losses compare: levels in the middle count most.

    It rounds the timesteps to bf16, which leaves 294 different ones and is a flaw; these are whole.
    """
    sigmas = shifted(torch.linspace(1, 0, count + 1)[:-1], shift)
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    bell = bell - bell.min()
    return Levels(sigmas, bell * (count / bell.sum()))


def flow_matching_loss(
    trunk: DiT,
    latents: Tensor,
    text: Tensor,
    sigmas: Tensor,
    noise: Tensor,
    injection: Slots | None = None,
    run: Run | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity, one number per sample.

    latents, noise (b, 16, T, h, w) normalised; text (b, L, text_dim); sigmas (b,) in 0..1 -> (b,).
    """
    level = sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = trunk(noisy, sigmas * 1000, text, injection, run)
    return F.mse_loss(velocity, noise - latents, reduction="none").mean((1, 2, 3, 4))
