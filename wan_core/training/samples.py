"""Videos that show how far a training has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.injection import Condition
from ..model import WanModel, WanTextEncoder
from ..sampling.loop import OnStep, Settings, sample
from .examples import Example

STEPS = 20  # enough to judge by, with a scheduler of second order


@dataclass(frozen=True, eq=False)
class Sample:
    """The same video again and again, as the model learns: texts (1, L, width), conditions, shape of its latents."""

    positive: Tensor
    negative: Tensor
    conditions: Sequence[Condition]
    shape: tuple[int, ...]
    settings: Settings

    def latents(self, model: WanModel, on_step: OnStep | None = None) -> Tensor:
        """Raw, (1, 16, T, h, w)."""
        empty = torch.zeros(self.shape)
        return sample(model, self.positive, self.negative, empty, self.settings, self.conditions, on_step)


def sample_like(
    example: Example, model: WanModel, text_encoder: WanTextEncoder, prompt: str = "", seed: int = 0
) -> Sample:
    """A sample as long and wide as an example, with its conditions; with its caption where there is no prompt."""
    preset = model.preset
    negative, _, _ = text_encoder.encode([preset.negative_prompt])
    positive = text_encoder.encode([prompt])[0] if prompt.strip() else example.text
    settings = Settings(seed, min(preset.steps, STEPS), preset.cfg, shift=preset.shift, scheduler="unipc")
    return Sample(positive, negative, example.conditions, tuple(example.latents.shape), settings)

