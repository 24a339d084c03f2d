"""Train the WanTiny VAE on the toy world: `python -m comfyui_wanflow.wan_core.tiny.train_vae --out DIR`.

A variational autoencoder with the published layout at an eighth of the width. It first learns on small
crops of short clips (cheap, and it leaves the long grey plateau there), then on whole clips of 9 and 17
frames, so that the temporal layers see as many frames as they will meet. Runs in fp32, resumes from
`DIR/vae_training.pt`, and ends with `DIR/Wan2.1_VAE.safetensors`.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.vae import LATENT_MEAN, LATENT_STD, Memory, VideoVAE
from ..saving import write_whole
from ..training.muon import Muon
from . import world

WIDTH = 12
KL_WEIGHT = 1e-4


@dataclass(frozen=True)
class Stage:
    steps: int
    batch: int
    frames: int
    size: int  # pixels: a square crop of a 64 x 64 clip
    rate: float  # peak learning rate; each stage warms up to it and ends at a tenth of it


STAGES = (
    Stage(steps=1000, batch=8, frames=5, size=32, rate=2e-3),
    Stage(steps=1500, batch=4, frames=9, size=48, rate=1.5e-3),
    Stage(steps=350, batch=2, frames=17, size=64, rate=7e-4),
)


def random_clip(generator: np.random.Generator, frames: int) -> np.ndarray:
    """A clip to compress, (frames, 64, 64, 3) in 0..1. Half of them are scenes of the world; the rest have any
    shape, way and colours, two scenes, stripes, or a cut to grey, so that what later models feed the VAE
    (masks, half-known clips, moving cameras, taught concepts) is no surprise to it."""
    clip = world.render(training_scene(generator), frames)
    kind = generator.random()
    if kind < 0.5:
        return clip
    if kind < 0.76:  # any shape, any way or none, free colours: a per-clip affine map of the colour space
        scene = training_scene(generator)
        shape = (*world.SHAPES, *world.OTHER_SHAPES)[generator.integers(4)]
        speed, angle = generator.uniform(0, 0.45) * (generator.random() < 0.8), generator.uniform(0, 2 * np.pi)
        drift = speed * np.cos(angle), speed * np.sin(angle)
        clip = world.render(replace(scene, shape=shape, travel=0.0, drift=drift), frames)
        low, high = generator.random(3), generator.random(3)
        return (low + clip * (high - low)).astype(np.float32)
    other = world.render(training_scene(generator), frames)
    if kind < 0.86:  # two scenes side by side, as two shapes and an edge
        cut = generator.integers(8, 56)
        return np.concatenate([clip[:, :, :cut], other[:, :, cut:]], axis=2)
    if kind < 0.9:  # moving stripes
        ramp = np.arange(64) * generator.uniform(0.1, 0.6) + generator.uniform(-1, 1) * np.arange(frames)[:, None]
        stripes = (np.sin(ramp) > 0).astype(np.float32)[:, None, :, None]
        return np.where(abs(clip - clip[:, :1, :1]) > 0.05, clip, 0.8 * clip + 0.2 * stripes).astype(np.float32)
    grey = np.full_like(clip, 0.5)  # known frames, then grey; or a grey hole
    if generator.random() < 0.6:
        known = generator.integers(1, frames)
        return np.concatenate([clip[:known], grey[known:]])
    top, left = generator.integers(0, 40, 2)
    clip[:, top : top + 24, left : left + 24] = 0.5
    return clip


def training_scene(generator: np.random.Generator) -> world.Scene:
    facts = [f for f in world.all_facts() if not world.is_held_out(f)]
    return world.random_scene(generator, facts[generator.integers(len(facts))])


def random_batch(generator: np.random.Generator, stage: Stage) -> Tensor:
    """(batch, 3, frames, size, size) in -1..1."""
    clips = []
    for _ in range(stage.batch):
        top, left = generator.integers(0, 64 - stage.size + 1, 2)
        clips.append(random_clip(generator, stage.frames)[:, top : top + stage.size, left : left + stage.size])
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3) * 2 - 1


def new_vae(seed: int) -> VideoVAE:
    """A VAE that starts as a nearly linear map: residual branches at zero, the path around them keeping its
    variance, the temporal layers passing frames on. From torch's default initialisation the picture drowns
    on its way through the bottleneck, and training stays at 10 to 13 dB for a long time."""
    torch.manual_seed(seed)
    vae = VideoVAE(WIDTH)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Conv3d):
                continue
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith((".residual.6", ".proj")):
                nn.init.zeros_(module.weight)
            elif name.endswith("time_conv"):
                # the last tap sees the present frame; upsampling gives both of its frames the same
                identity = torch.eye(module.in_channels).repeat(module.out_channels // module.in_channels, 1)
                module.weight.mul_(0.1)[:, :, -1, 0, 0] += identity
        # Begin almost without noise (log variance -6): with a variance of one the decoder sees nothing.
        vae.conv1.bias[vae.latent_channels :] = -6.0
        vae.conv1.weight[vae.latent_channels :] *= 0.1
    return vae


def vae_loss(vae: VideoVAE, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss and the mean squared error of the reconstruction."""
    mean, log_variance = vae.conv1(vae.encoder(pixels, Memory()), Memory()).chunk(2, dim=1)
    log_variance = log_variance.clamp(-12, 6)
    latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
    difference = vae.decode_whole(latents) - pixels
    divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1)
    error = (edge_weights(pixels) * (difference.square() + 0.2 * difference.abs())).mean()
    return error + KL_WEIGHT * divergence.mean(), difference.square().mean()


def edge_weights(pixels: Tensor) -> Tensor:
    """(b, 1, F, H, W): edges count five times, as they are what tells a square from a circle."""
    across = (pixels.diff(dim=-1).abs().amax(1, keepdim=True) > 0.05).float()
    down = (pixels.diff(dim=-2).abs().amax(1, keepdim=True) > 0.05).float()
    edges = F.pad(across, (1, 0)) + F.pad(across, (0, 1)) + F.pad(down, (0, 0, 1, 0)) + F.pad(down, (0, 0, 0, 1))
    return 1 + 4 * (edges > 0)


def learning_rate(stage: Stage, step: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return stage.rate * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))


@torch.no_grad()
def calibrate(vae: VideoVAE, seed: int, clips: int = 64) -> None:
    """Give the raw latents the published mean and deviation per channel, folded into conv1 and conv2.

    The DiT and all other programs normalise with the published constants; without this step the tiny
    latents would not have unit variance after that.
    """
    stage = Stage(1, clips, 9, 64, 0.0)
    latents = vae.encode_whole(random_batch(np.random.default_rng(seed), stage))
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    scale = torch.tensor(LATENT_STD) / std
    shift = torch.tensor(LATENT_MEAN) - mean * scale
    channels = vae.latent_channels
    vae.conv1.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:channels] = vae.conv1.bias[:channels] * scale + shift
    vae.conv1.bias[channels:] += 2 * scale.log()  # the log variances follow their means' scale
    vae.conv2.bias -= (vae.conv2.weight[:, :, 0, 0, 0] / scale) @ shift
    vae.conv2.weight /= scale.view(1, -1, 1, 1, 1)


@torch.no_grad()
def held_out_psnr(vae: VideoVAE, count: int = 16, frames: int = 9) -> float:
    """Peak signal-to-noise ratio (dB) over unseen scenes, frames 0..1, clamped."""
    generator = np.random.default_rng(999)
    unseen = [f for f in world.all_facts() if world.is_held_out(f)]
    errors = []
    for index in generator.permutation(len(unseen))[:count]:
        clip = torch.from_numpy(world.render(world.random_scene(generator, unseen[index]), frames))
        pixels = clip.permute(3, 0, 1, 2)[None] * 2 - 1
        out = vae.decode_whole(vae.encode_whole(pixels)).clamp(-1, 1)
        errors.append(((out - pixels) / 2).square().mean().item())
    return -10 * math.log10(sum(errors) / len(errors))


def train(out: Path, seed: int = 0, stages: tuple[Stage, ...] = STAGES, checkpoint_seconds: float = 120) -> nn.Module:
    """Train from scratch or from the checkpoint in `out`; returns the calibrated VAE."""
    vae = new_vae(seed)
    optimizer = Muon(vae.parameters())
    checkpoint, start = out / "vae_training.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    schedule = [(stage, step) for stage in stages for step in range(stage.steps)]
    began = last_saved = time.time()
    average = 0.0
    for number in range(start, len(schedule)):
        stage, step = schedule[number]
        torch.manual_seed(seed * 1_000_003 + number)
        pixels = random_batch(np.random.default_rng((seed, number)), stage)
        loss, squared = vae_loss(vae, pixels)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = squared.item() if not average else 0.98 * average + 0.02 * squared.item()
        if number % 50 == 0:
            decibel = -10 * math.log10(average / 4)
            print(f"{time.time() - began:6.0f} s  step {number}  psnr {decibel:.2f} dB", flush=True)
        if time.time() - last_saved > checkpoint_seconds:
            last_saved = time.time()
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": number + 1}
            write_whole({checkpoint: functools.partial(torch.save, state)})
        if number % 500 == 499:
            short, long = held_out_psnr(vae), held_out_psnr(vae, 6, 17)
            print(f"held out: {short:.2f} dB at 9 frames, {long:.2f} at 17", flush=True)
    calibrate(vae, seed)
    return vae


def main() -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    vae = train(arguments.out, arguments.seed)
    print(f"final: {held_out_psnr(vae, 64):.2f} dB at 9 frames, {held_out_psnr(vae, 16, 17):.2f} at 17")
    weights = {k: v.half().contiguous() for k, v in vae.state_dict().items()}
    save_file(weights, arguments.out / "Wan2.1_VAE.safetensors")


if __name__ == "__main__":
    main()
