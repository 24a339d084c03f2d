"""The flow-matching objective: what a Wan model learns to predict.

A training sample is a straight line from data (sigma 0) to noise (sigma 1); the model predicts the velocity along
it, noise - data. Source: Lipman et al., "Flow Matching for Generative Modeling", arXiv 2210.02747; the shift of the
noise levels: Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206, equation 23.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..models.dit import DiT, Run, Slots


def shifted_sigmas(uniform: Tensor, shift: float) -> Tensor:
    """Uniform numbers in 0..1 to noise levels in 0..1, drawn towards 1 by `shift` > 1."""
    return shift * uniform / (1 + (shift - 1) * uniform)


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
