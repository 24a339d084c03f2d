"""Train the WanTiny image encoder: `python -m comfyui_wanflow.wan_core.tiny.train_image --out DIR`.

A vision transformer in the layout of Wan's CLIP, one head wide. From one frame it learns to tell, for the picture as a
whole, the shape's colour, the shape, the background and where the shape is; so its features say what image models look
for. The published tower's last block and what follows are stored, as there, but never run. Minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.image_encoder import ImageEncoder, ImageEncoderLayout
from ..training.muon import Muon
from . import world
from .train_vae import training_scene

LAYOUT = ImageEncoderLayout(dim=80, mlp_dim=160, heads=1, layers=2)
CHOICES = (list(world.COLORS), list(world.SHAPES), list(world.COLORS))  # colour, shape, background


def pictures(generator: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (count, 64, 64, 3) in 0..1, what they show (count, 3) as numbers in CHOICES, and where (count, 2)."""
    scenes = [training_scene(generator) for _ in range(count)]
    frames = [world.render(scene, 3)[generator.integers(3)] for scene in scenes]
    facts = [[names.index(word) for names, word in zip(CHOICES, words(scene), strict=True)] for scene in scenes]
    return torch.from_numpy(np.stack(frames)), torch.tensor(facts), torch.tensor([[s.x, s.y] for s in scenes]).float()


def words(scene: world.Scene) -> tuple[str, str, str]:
    return scene.color, scene.shape, scene.background


def new_encoder(seed: int) -> ImageEncoder:
    torch.manual_seed(seed)
    encoder = ImageEncoder(LAYOUT)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim >= 2 and "embedding" not in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    nn.init.normal_(encoder.visual.patch_embedding.weight, std=0.04)
    nn.init.normal_(encoder.visual.pos_embedding, std=0.5)
    return encoder


class Heads(nn.Module):
    """What the training asks of the features; not kept."""

    def __init__(self, dim: int):
        super().__init__()
        self.facts = nn.ModuleList(nn.Linear(dim, len(names)) for names in CHOICES)
        self.place = nn.Linear(dim, 2)

    def forward(self, features: Tensor, facts: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the share of facts told right. features (b, 257, dim): both ways of summing up have to do."""
        loss, right = 0.0, []
        for summary in (features[:, 0], features[:, 1:].mean(1)):
            answers = [head(summary) for head in self.facts]
            loss = loss + sum(F.cross_entropy(answer, fact) for answer, fact in zip(answers, facts.T, strict=True))
            loss = loss + 10 * F.mse_loss(self.place(summary), places)
            right += [(answer.argmax(-1) == fact).float().mean() for answer, fact in zip(answers, facts.T, strict=True)]
        return loss, torch.stack(right).mean()


def train(steps: int, seed: int = 0, batch: int = 32, rate: float = 2e-3) -> ImageEncoder:
    encoder, heads = new_encoder(seed), Heads(LAYOUT.dim)
    optimizer = Muon([*encoder.parameters(), *heads.parameters()])
    for step in range(steps):
        frames, facts, places = pictures(np.random.default_rng((seed, step)), batch)
        loss, right = heads(encoder(frames), facts, places)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49:
            print(f"step {step}  loss {loss.item():.4f}  facts right {right:.3f}", flush=True)
    return encoder


def complete(encoder: ImageEncoder) -> dict[str, Tensor]:
    """The weights under the published names, and a last block that nobody reads, as the published file has one."""
    weights = {name: weight.half().contiguous() for name, weight in encoder.state_dict().items()}
    last = "visual.transformer.0."
    unread = {f"visual.transformer.{LAYOUT.layers}.{name.removeprefix(last)}": weight.clone()
              for name, weight in weights.items() if name.startswith(last)}  # fmt: skip
    return weights | unread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"
    save_file(complete(train(arguments.steps)), arguments.out / name)


if __name__ == "__main__":
    main()
