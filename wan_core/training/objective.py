"""The loss of a batch. What the trunk is given comes from the same code as in sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapters.injection import Canvas, inject
from ..model import WanModel
from ..models.network import Network
from ..models.slots import Run, call
from .examples import Example
from .flow import flow_matching_loss, training_levels
from .settings import Settings


class Objective(nn.Module):
    """A network as the loss that it is trained for: one module, so that sharding and the like can wrap it."""

    def __init__(self, network: Network, model: WanModel, settings: Settings):
        super().__init__()
        self.network = network
        self.model = model
        self.levels = training_levels(settings)
        self.run = Run(model.compute_dtype, model.attention, around(settings))

    def forward(
        self, example: Example, generators: Sequence[torch.Generator], sigmas: Tensor | None = None
    ) -> Tensor:
        """The mean loss of a batch: weighted, at random levels, or as it is at given ones, `sigmas` or the example's.

        What is random about a row comes from its own generator, on the CPU: a seed means the same on every device.
        """
        weights = torch.ones(len(generators))
        sigmas = example.sigmas if sigmas is None else sigmas
        if sigmas is None:
            draws = [self.levels.draw(1, generator) for generator in generators]
            sigmas, weights = (torch.cat(column) for column in zip(*draws, strict=True))
        losses = self.losses(example, sigmas.to(self.model.device), generators)
        return (weights.to(losses.device) * losses).mean()

    def losses(self, example: Example, sigmas: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The loss of each row at its level; sigmas (b,) -> (b,)."""
        rows, _, *size = example.latents.shape
        canvas = Canvas(rows, *size, dtype=self.model.compute_dtype, device=self.model.device)
        injection = inject(example.conditions, self.network, canvas)
        latents = example.latents.to(self.model.device)
        if injection.prefix_frames is not None:  # VACE's references are noised, and learned, as the frames after them
            front = injection.prefix_frames.to(latents).expand(rows, -1, -1, -1, -1)
            latents = torch.cat([front, latents], dim=2)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        if example.noise is not None:
            noise[:, :, -canvas.frames :] = example.noise
        text, noise = example.text.to(latents.device), noise.to(latents.device)
        return flow_matching_loss(self.network.trunk, latents, text, sigmas, noise, injection, self.run)


def around(settings: Settings) -> Callable:
    """How blocks are called: as they are, or so that their inner results are computed again in the backward pass.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """

    def again(module: Callable, *arguments):
        return checkpoint(module, *arguments, use_reentrant=False)

    def again_from_main_memory(module: Callable, *arguments):
        with torch.autograd.graph.save_on_cpu():
            return again(module, *arguments)

    if not settings.gradient_checkpointing:
        return call
    return again_from_main_memory if settings.offload_activations else again
