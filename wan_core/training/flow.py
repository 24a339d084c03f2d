"""The flow-matching objective: what a Wan model learns to predict.

A training sample is a straight line from data (sigma 0) to noise (sigma 1); the model predicts the velocity along
it, noise - data. Source: Lipman et al., "Flow Matching for Generative Modeling", arXiv 2210.02747; the shift of the
noise levels: Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206, equation 23.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..models.dit import DiT
from ..models.slots import Run, Slots
from ..sampling.schedules import shifted


@dataclass(frozen=True)
class LevelSettings:
    """Which noise levels are trained.

    timestep_sampling: "shifted" draws them evenly from a schedule that is shifted by `shift`, as in sampling, "uniform"
    evenly from all, "logit_normal" mostly from the middle (`logit_mean`, `logit_std`). timestep_weighting: how much
    the loss counts at each, "bell" as DiffSynth-Studio does, or "none". The boundaries: see `Levels.between`.
    """

    timestep_sampling: str = "shifted"
    timestep_weighting: str = "bell"
    shift: float = 5.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    min_timestep_boundary: float = 0.0
    max_timestep_boundary: float = 1.0


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


def shifted_levels(places: Tensor, settings: LevelSettings) -> Tensor:
    return shifted(places, settings.shift)


def uniform_levels(places: Tensor, settings: LevelSettings) -> Tensor:
    return places


def logit_normal_levels(places: Tensor, settings: LevelSettings) -> Tensor:
    """Normal before the sigmoid; a `logit_mean` of log(s) is a shift by s. arXiv 2403.03206, section 3.1."""
    middles = places - 0.5 / len(places)  # the normal distribution has no quantile at 1
    return torch.sigmoid(settings.logit_mean + settings.logit_std * torch.special.ndtri(middles))


def bell(sigmas: Tensor) -> Tensor:
    """DiffSynth-Studio's weights: the middle of the way counts most, its ends not at all; 1 on average."""
    weights = torch.exp(-2 * (sigmas - 0.5) ** 2) - math.exp(-0.5)
    return weights * (len(sigmas) / weights.sum())


# How levels are spread: from evenly spread places in 1..0 to sigmas.
SAMPLINGS: dict[str, Callable[[Tensor, LevelSettings], Tensor]] = {
    "shifted": shifted_levels,
    "uniform": uniform_levels,
    "logit_normal": logit_normal_levels,
}
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {"bell": bell, "none": torch.ones_like}


def training_levels(settings: LevelSettings, count: int = 1000) -> Levels:
    """The levels to train at and their weights, each as likely as any other.

    By default they are DiffSynth-Studio's, so that losses compare. It rounds the timesteps to bf16, which leaves 294
    different ones and is a flaw; these are whole.
    """
    sigmas = SAMPLINGS[settings.timestep_sampling](torch.linspace(1, 0, count + 1)[:-1], settings)
    levels = Levels(sigmas, WEIGHTINGS[settings.timestep_weighting](sigmas))
    return levels.between(settings.min_timestep_boundary, settings.max_timestep_boundary)


def line(x: Tensor, sigma: float, y: Tensor, lower: float) -> tuple[Tensor, Tensor]:
    """The ends, (data, noise), of the straight line that is at x at the level sigma and at y at a lower one.

    Learned, it takes a few-step model from x to y in one step. Luhman and Luhman, "Knowledge Distillation in Iterative
    Generative Models for Improved Sampling Speed", arXiv 2101.02388, piece by piece as in Yan et al., "PeRFlow:
    Piecewise Rectified Flow as Universal Plug-and-Play Accelerator", arXiv 2405.07510.
    """
    velocity = (x - y) / (sigma - lower)
    return x - sigma * velocity, x + (1 - sigma) * velocity


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
