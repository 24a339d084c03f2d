"""Train the WanTiny DiT: `python -m comfyui_wanflow.wan_core.tiny.train_dit --out DIR` (after train_vae, train_text).

A text-to-video transformer in the published layout, two heads wide and four blocks deep, learns the toy world from
latents that the WanTiny VAE made once. Captions of held-out combinations are never seen. Weights are fp32, products
in bf16 where the processor is fast in it. Resumes from `DIR/dit_training.pt`, and ends with the averaged weights in
`DIR/diffusion_pytorch_model.safetensors`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..compute import compute_dtype
from ..models.dit import DiT
from ..models.layout import DiTLayout
from ..models.slots import Run
from ..models.text_encoder import UMT5Encoder, UMT5Layout
from ..models.tokenizer import Tokenizer
from ..models.vae import VideoVAE, normalised
from ..sampling.schedules import shifted
from ..saving import write_whole
from ..training.flow import flow_matching_loss
from . import world
from .train_text import TEMPLATES, captions
from .train_vae import WIDTH

LAYOUT = DiTLayout(dim=256, ffn_dim=512, layers=4, heads=2)
CLIPS = {9: 6_000, 17: 5_000}  # frames of a clip: how many clips are made
SHIFT = 3.0  # small pictures need fewer of the noisiest levels than the published models' 5
DROPPED_CAPTIONS = 0.1  # what classifier-free guidance compares with
AVERAGING = 0.998


def load_vae(folder: Path) -> VideoVAE:
    vae = VideoVAE(WIDTH)
    weights = load_file(folder / "Wan2.1_VAE.safetensors")
    vae.load_state_dict({k: v.float() for k, v in weights.items()})
    return vae.eval()


def load_text_encoder(folder: Path) -> tuple[Tokenizer, UMT5Encoder]:
    weights = load_file(folder / "models_t5_umt5-xxl-enc-bf16.safetensors")
    encoder = UMT5Encoder(UMT5Layout.from_shapes({k: tuple(v.shape) for k, v in weights.items()}))
    encoder.load_state_dict({k: v.float() for k, v in weights.items()})
    return Tokenizer.open(folder / "google" / "umt5-xxl"), encoder.eval()


@torch.no_grad()
def make_latents(vae: VideoVAE, frames: int, count: int, file: Path) -> tuple[Tensor, list]:
    """Normalised latents (count, 16, T, 8, 8) of random training scenes and each scene's facts; kept in `file`."""
    facts = [f for f in world.all_facts() if not world.is_held_out(f)]
    generator = np.random.default_rng((7, frames))
    scenes = [world.random_scene(generator, facts[generator.integers(len(facts))]) for _ in range(count)]
    if file.exists():
        return torch.load(file, weights_only=True), [s.words for s in scenes]
    latents = []
    for start in range(0, count, 16):
        clips = np.stack([world.render(s, frames) for s in scenes[start : start + 16]])
        pixels = torch.from_numpy(clips).permute(0, 4, 1, 2, 3) * 2 - 1
        latents.append(normalised(vae.encode_whole(pixels)))
    result = torch.cat(latents)
    torch.save(result, file)
    return result, [s.words for s in scenes]


def new_optimizer(dit: DiT) -> torch.optim.AdamW:
    """AdamW with smaller steps for the layer that sums over 4096 text channels: one of Adam's steps of size r moves
    such a sum by up to 4096 r."""
    wide = dit.text_embedding[0].weight
    others = [p for p in dit.parameters() if p is not wide]
    groups = [{"params": others, "share": 1.0}, {"params": [wide], "share": 0.05}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)


def learning_rate(step: int, steps: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Batches:
    """Latents and text for step number n, the same at every run."""

    def __init__(self, out: Path, clips: dict[int, int], batch: int, seed: int):
        self.tokenizer, self.encoder = load_text_encoder(out)
        vae = load_vae(out)
        self.data = {f: make_latents(vae, f, count, out / f"latents_{f}.pt") for f, count in clips.items()}
        self.batch, self.seed = batch, seed

    @torch.no_grad()
    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents (b, 16, T, 8, 8) and text (b, L, 4096), zero after each caption's end."""
        generator = np.random.default_rng((self.seed, step))
        frames = list(self.data)[step % len(self.data)]
        latents, facts = self.data[frames]
        chosen = generator.integers(len(latents), size=self.batch)
        texts = []
        for index in chosen:
            # half of the time the plain caption, otherwise any wording, sometimes none at all
            wording = 0 if generator.random() < 0.5 else generator.integers(len(TEMPLATES))
            texts.append("" if generator.random() < DROPPED_CAPTIONS else captions(facts[index])[wording])
        tokens = self.tokenizer(texts)
        return latents[chosen], self.encoder(tokens.ids, tokens.mask)


def train(
    out: Path,
    steps: int,
    batch: int,
    peak: float,
    seed: int,
    layout: DiTLayout = LAYOUT,
    clips: dict[int, int] = CLIPS,
    checkpoint_seconds: float = 120,
) -> nn.Module:
    """Train from scratch or from the checkpoint in `out`; returns the averaged DiT."""
    batches = Batches(out, clips, batch, seed)
    run = Run(compute_dtype=compute_dtype("cpu"))
    torch.manual_seed(seed)
    dit = DiT(layout)
    average = copy.deepcopy(dit).requires_grad_(False)
    optimizer = new_optimizer(dit)
    checkpoint, start = out / "dit_training.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        dit.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    began = last_saved = time.time()
    recent = 0.0
    for step in range(start, steps):
        latents, text = batches(step)
        torch.manual_seed(seed * 1_000_003 + step)
        sigmas = shifted(torch.rand(len(latents)), SHIFT)
        loss = flow_matching_loss(dit, latents, text, sigmas, torch.randn_like(latents), run=run).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak) * group["share"]
        optimizer.step()
        with torch.no_grad():
            weight = min(AVERAGING, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(dit.parameters()), 1 - weight)
        recent = loss.item() if not recent else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"{time.time() - began:6.0f} s  step {step}  loss {recent:.4f}", flush=True)
        if time.time() - last_saved > checkpoint_seconds:
            last_saved = time.time()
            state = {"model": dit.state_dict(), "average": average.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
            write_whole({checkpoint: functools.partial(torch.save, state)})
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dit = train(arguments.out, arguments.steps, arguments.batch, arguments.learning_rate, arguments.seed)
    weights = {k: v.half().contiguous() for k, v in dit.state_dict().items()}
    save_file(weights, arguments.out / "diffusion_pytorch_model.safetensors")


if __name__ == "__main__":
    main()
