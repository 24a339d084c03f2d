"""Let models act in the toy world: a video for each caption, or for each sample of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..adapters.injection import Condition
from ..loading.catalog import BY_NAME, TOY
from ..loading.load import add_module, load_image_encoder, load_model, load_text_encoder, load_vae
from ..model import WanModel, WanTextEncoder
from ..sampling.loop import Settings, sample
from ..size import latent_shape
from .tasks import FRAMES, SIDE, Encoders, Sample, Task, shapes, stacked

SETTINGS = Settings(seed=0, steps=TOY.steps, cfg=TOY.cfg, shift=TOY.shift)  # T2V's
ROWS = 16  # videos at once

MODELS = {
    "T2V": "WanTiny-T2V",
    "I2V": "WanTiny-I2V",
    "FLF2V": "WanTiny-FLF2V",
    "InP": "WanTiny-Fun-InP",
    "Control": "WanTiny-Fun-Control",
    "Control-Reference": "WanTiny-Fun-V1.1-Control",
    "Control-Camera": "WanTiny-Fun-V1.1-Control-Camera",
    "VACE": "WanTiny-VACE",
    "Speed": "WanTiny-speedcontrol",
}

# In a folder that was trained into.
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT = "models_t5_umt5-xxl-enc-bf16.safetensors"
VAE = "Wan2.1_VAE.safetensors"
IMAGE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"
LEARNED_WITH = {"I2V": "InP", "Control": "Control-Reference"}  # one set of weights for two tasks
BESIDE_T2V = ("VACE", "Speed")  # whose file holds a module alone


@dataclass(frozen=True, kw_only=True)
class Studio:
    """A model with all that it needs to make videos.

    tiling: the VAE's, see `WanVAE.decode`; say: hears what a cache leaves out.
    """

    model: WanModel
    text_encoder: WanTextEncoder
    encoders: Encoders
    settings: Settings = SETTINGS
    tiling: Mapping[str, object] = field(default_factory=dict)
    say: Callable[[str], None] | None = None

    @classmethod
    def of(cls, task: str, folder: Path | None = None) -> Studio:
        """For a task, with the bundled weights, or with those that were trained into a folder."""
        model = load_model(MODELS[task]) if folder is None else trained(task, folder)
        text, vae, image = (MODELS[task] if folder is None else folder / file for file in (TEXT, VAE, IMAGE))
        looks = load_image_encoder(image) if model.layout.image_tokens else None
        settings = replace(SETTINGS, cfg=BY_NAME[MODELS[task]].preset.cfg)
        encoders = Encoders(load_vae(vae), looks)
        return cls(model=model, text_encoder=load_text_encoder(text), encoders=encoders, settings=settings)

    def videos(
        self,
        captions: Sequence[str],
        conditions: Sequence[Condition] = (),
        frames: int = FRAMES,
        changed: Tensor | None = None,
    ) -> np.ndarray:
        """One video per caption, (n, frames, 64, 64, 3) in 0..1; the conditions are for all of them.

        changed: raw latents (n, 16, T, 8, 8) of videos to begin with, for a denoise below 1.
        """
        positive, _, _ = self.text_encoder.encode(list(captions))
        negative, _, _ = self.text_encoder.encode([""])
        latents = torch.zeros(latent_shape(SIDE, SIDE, frames, len(captions))) if changed is None else changed
        made = sample(self.model, positive, negative, latents, self.settings, conditions, say=self.say)
        return to_frames(self.encoders.vae.decode(made, **self.tiling))

    def perform(self, task: Task, samples: Sequence[Sample]) -> list[np.ndarray]:
        """The model's video for each of a task's samples, as long as its clip, (F, 64, 64, 3) in 0..1.

        The same samples get the same noise from every model.
        """
        conditions = [task.conditions(given, self.encoders) for given in samples]
        kinds: dict[tuple, list[int]] = {}
        for number, (given, some) in enumerate(zip(samples, conditions, strict=True)):
            kinds.setdefault((len(given.clip), *map(shapes, some)), []).append(number)
        videos: dict[int, np.ndarray] = {}
        for (frames, *_), numbers in kinds.items():
            for chunk in (numbers[start : start + ROWS] for start in range(0, len(numbers), ROWS)):
                together = [stacked(column) for column in zip(*(conditions[n] for n in chunk), strict=True)]
                own_noise = replace(self, settings=replace(self.settings, seed=self.settings.seed + chunk[0]))
                made = own_noise.videos([samples[n].captions[0] for n in chunk], together, frames)
                videos.update(zip(chunk, made, strict=True))
        return [videos[number] for number in range(len(samples))]


def trained(task: str, folder: Path) -> WanModel:
    """The model of a task that was trained into this folder."""
    file = folder / LEARNED_WITH.get(task, task) / WEIGHTS
    return add_module(load_model(folder / "T2V" / WEIGHTS), file) if task in BESIDE_T2V else load_model(file)


def pixels(clip: np.ndarray) -> Tensor:
    """(F, H, W, 3) in 0..1 -> (1, 3, F, H, W) in -1..1."""
    return torch.from_numpy(clip).movedim(-1, 0)[None] * 2 - 1


def to_frames(pixels: Tensor) -> np.ndarray:
    """(b, 3, F, H, W) in -1..1 -> (b, F, H, W, 3) in 0..1."""
    return (pixels.float().movedim(1, -1) / 2 + 0.5).clamp(0, 1).numpy()
