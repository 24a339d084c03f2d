"""Measure WanTiny: `python -m comfyui_wanflow.wan_core.tiny.evaluate`.

Makes a video for each of 64 held-out captions (combinations of colour, shape and background that training never
saw), reads the facts back from the pixels, and codes unseen clips with the VAE. `--picture FILE.png` also writes a
sheet of the videos to look at, one a row.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..loading.load import load_model, load_text_encoder, load_vae
from ..model import WanModel, WanTextEncoder, WanVAE
from ..sampling.loop import Settings, sample
from ..size import latent_shape
from . import measure, world
from .tasks import FACTS

SETTINGS = Settings(seed=0, steps=20, cfg=6.0, shift=3.0)


def held_out_facts(count: int) -> list[tuple[str, str, str, str]]:
    """`count` combinations never trained, always the same ones."""
    unseen = [f for f in world.all_facts() if world.is_held_out(f)]
    order = np.random.default_rng(1).permutation(len(unseen))
    return [unseen[i] for i in order[:count]]


def make_videos(
    model: WanModel,
    text_encoder: WanTextEncoder,
    vae: WanVAE,
    facts: list,
    settings: Settings = SETTINGS,
    frames: int = 17,
) -> np.ndarray:
    """One video per caption, (n, frames, 64, 64, 3) in 0..1."""
    captions = [world.Scene(*f).caption for f in facts]
    positive, _, _ = text_encoder.encode(captions)
    negative, _, _ = text_encoder.encode([""])
    latents = sample(model, positive, negative, torch.zeros(latent_shape(64, 64, frames, len(facts))), settings)
    return to_frames(vae.decode(latents))


def to_frames(pixels: Tensor) -> np.ndarray:
    """(b, 3, F, H, W) in -1..1 -> (b, F, H, W, 3) in 0..1."""
    return (pixels.float().movedim(1, -1) / 2 + 0.5).clamp(0, 1).numpy()


def scores(videos: np.ndarray, facts: list) -> dict[str, float]:
    """The share of videos that show each fact right."""
    readings = [measure.read(video) for video in videos]
    return {
        name: float(np.mean([getattr(r, name) == f[i] for r, f in zip(readings, facts, strict=True)]))
        for i, name in enumerate(FACTS)
    }


def reconstruction_psnr(vae: WanVAE, count: int, frames: int) -> float:
    """dB over unseen scenes, coded and decoded: of the mean squared error of all of them."""
    generator = np.random.default_rng(999)
    errors = []
    for f in held_out_facts(count):
        clip = world.render(world.random_scene(generator, f), frames)
        pixels = torch.from_numpy(clip).movedim(-1, 0)[None] * 2 - 1
        errors.append(np.square(to_frames(vae.decode(vae.encode(pixels)))[0] - clip).mean())
    return measure.decibel(np.mean(errors))


def sheet(videos: np.ndarray, columns: int = 6) -> np.ndarray:
    """(n, F, H, W, 3) -> one uint8 picture: a row a video, `columns` of its frames side by side."""
    chosen = np.linspace(0, videos.shape[1] - 1, columns).round().astype(int)
    rows = [np.concatenate(list(video[chosen]), axis=1) for video in videos]
    return (np.concatenate(rows) * 255).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--weights", type=Path, help="a folder with the three files, instead of the bundled ones")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    source = "WanTiny-T2V"
    sources = [source] * 3
    if arguments.weights:
        names = "diffusion_pytorch_model", "models_t5_umt5-xxl-enc-bf16", "Wan2.1_VAE"
        sources = [arguments.weights / f"{name}.safetensors" for name in names]
    model, text_encoder, vae = load_model(sources[0]), load_text_encoder(sources[1]), load_vae(sources[2])
    facts = held_out_facts(arguments.count)
    videos = make_videos(model, text_encoder, vae, facts)
    for name, share in scores(videos, facts).items():
        print(f"{name:12} right in {share:.1%} of {len(facts)} held-out captions")
    for frames in (9, 17):
        print(f"VAE, {frames} frames: {reconstruction_psnr(vae, 16, frames):.1f} dB")
    if arguments.picture:
        from PIL import Image

        Image.fromarray(sheet(videos[:16])).save(arguments.picture)


if __name__ == "__main__":
    main()
