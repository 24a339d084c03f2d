"""How much memory a training takes on the compute device beside the frozen weights: told before it starts.

The numbers are those of `tests/test_training_memory.py`, which counts the living tensors of a step on the meta device.
Where a host makes so much room first, what no longer fits of the frozen weights travels to the device block by block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..room import tokens_room, widened_room
from .optimizers import OPTIMIZERS
from .settings import Settings
from .trainee import Trainee

KEPT = 15.5  # tensors as wide as the tokens that a block keeps for its way back, beside the feed-forward network's
KEPT_HIDDEN = 2  # hidden layers of that which it keeps
BACK_HIDDEN = 2  # and which the way back makes
GRADIENT, MASTER = 4, 4  # bytes a number: all that is trained is fp32


@dataclass(frozen=True)
class Memory:
    """Bytes. `activations` come and go in every step; `trained` stay: gradients, optimizer, average."""

    activations: int
    trained: int

    @property
    def room(self) -> int:
        return self.activations + self.trained

    def __str__(self) -> str:
        parts = f"{size(self.activations)} for activations, {size(self.trained)} for what is trained"
        return f"Beside the model's weights the training takes about {size(self.room)} of memory: {parts}."


def training_memory(trainee: Trainee, shapes: Sequence[tuple[int, ...]], settings: Settings) -> Memory:
    """For clips whose latents have these shapes, (16, T, h, w): the largest counts."""
    model = trainee.model
    layout, vace, dtype = model.layout, model.module.vace, model.compute_dtype
    latent = (settings.batch_size, *max(shapes, key=math.prod))
    token = tokens_room(layout, latent, dtype)
    hidden = token * layout.ffn_dim / layout.dim
    block = KEPT * token + KEPT_HIDDEN * hidden
    blocks = layout.layers + (vace.layout.layers if vace else 0)
    if not settings.gradient_checkpointing:
        kept = blocks * block
    elif settings.offload_activations:
        kept = block + 2 * token  # on their way
    else:
        kept = block + blocks * token
    numbers = sum(parameter.numel() for parameter in trainee.parameters.values())
    each = GRADIENT + OPTIMIZERS[settings.optimizer].state_bytes + (MASTER if settings.ema_decay else 0)
    activations = kept + BACK_HIDDEN * hidden + token + widened_room(model.module, dtype)
    return Memory(int(activations), numbers * each)


def size(amount: int) -> str:
    return f"{amount / 2**30:.1f} GB" if amount >= 2**30 else f"{amount / 2**20:.0f} MB"
