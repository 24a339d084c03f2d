"""The same networks in every library: ours, diffusers and DiffSynth-Studio, with one set of random weights.

A workload is a dictionary from a library's name to a function without arguments that returns the result. Libraries
that are not installed are left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from comfyui_wanflow.wan_core.compute import compute_dtype
from comfyui_wanflow.wan_core.loading.keymaps import published_names
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.slots import Run
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from torch import Tensor, nn

Contestants = dict[str, Callable[[], Tensor]]
LIBRARIES = ("diffusers", "diffsynth")


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def import_diffsynth(module: str) -> types.ModuleType:
    """A module of DiffSynth without the imports of its packages, which want torchvision and other large things."""
    if "diffsynth" not in sys.modules:
        root = Path(importlib.util.find_spec("diffsynth").origin).parent
        for name in ("diffsynth", "diffsynth.core", "diffsynth.models"):
            bare = ModuleSpec(name, loader=None, is_package=True)
            bare.submodule_search_locations = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = importlib.util.module_from_spec(bare)
    return importlib.import_module(module)


def randomise(module: nn.Module, seed: int) -> None:
    """Random values everywhere, also where a network starts from ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("gamma", "norm_q.weight", "norm_k.weight", "norm3.weight")):
            parameter.data = 1 + 0.1 * noise
        elif name.endswith(("bias", "modulation")):
            parameter.data = 0.1 * noise
        else:
            parameter.data = noise / fan_in**0.5


def copy_to_diffusers(ours: nn.Module, theirs: nn.Module) -> nn.Module:
    state = ours.state_dict()
    theirs.load_state_dict({stored: state[name] for name, stored in published_names(theirs.state_dict()).items()})
    return theirs


def dit(layers: int, grid: tuple[int, int, int], text_tokens: int, dtype: torch.dtype) -> Contestants:
    """One forward of the 1.3B model's width; `grid` counts latent frames, rows and columns. dtype is the weights'."""
    layout = DiTLayout(dim=1536, ffn_dim=8960, layers=layers, heads=12)
    ours = DiT(layout)
    randomise(ours, seed=0)
    ours.to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, *grid, generator=generator), torch.randn(1, text_tokens, 4096, generator=generator)
    timestep = torch.tensor([732.0])  # a number that bf16 has: DiffSynth narrows it
    run = Run(compute_dtype=torch.float32 if dtype == torch.float32 else compute_dtype("cpu"))
    found: Contestants = {"wanflow": lambda: ours(x, timestep, text, run=run)}
    if installed("diffusers"):
        from diffusers import WanTransformer3DModel

        theirs = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=layers).to(dtype)
        copy_to_diffusers(ours, theirs)
        found["diffusers"] = lambda: theirs(x.to(dtype), timestep, text.to(dtype), return_dict=False)[0].float()
    if installed("diffsynth"):
        library = import_diffsynth("diffsynth.models.wan_video_dit")
        studio = library.WanModel(
            dim=1536, in_dim=16, ffn_dim=8960, out_dim=16, text_dim=4096, freq_dim=256, eps=1e-6, patch_size=(1, 2, 2),
            num_heads=12, num_layers=layers, has_image_input=False,
        )  # fmt: skip
        studio.to(dtype).load_state_dict(ours.state_dict())
        found["diffsynth"] = lambda: run_diffsynth(library, studio, *(t.to(dtype) for t in (x, timestep, text))).float()
    return found


def run_diffsynth(library: types.ModuleType, studio: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """DiffSynth's transformer. Since 2.0 only its pipelines call the parts; this is what they do for text to video."""
    time = studio.time_embedding(library.sinusoidal_embedding_1d(studio.freq_dim, timestep))
    modulation = studio.time_projection(time).unflatten(1, (6, studio.dim))
    context = studio.text_embedding(text)
    patches = studio.patchify(x)
    frames, height, width = grid = patches.shape[2:]
    angles = [
        studio.freqs[0][:frames].view(frames, 1, 1, -1).expand(*grid, -1),
        studio.freqs[1][:height].view(1, height, 1, -1).expand(*grid, -1),
        studio.freqs[2][:width].view(1, 1, width, -1).expand(*grid, -1),
    ]
    rotations = torch.cat(angles, dim=-1).reshape(frames * height * width, 1, -1)
    tokens = patches.flatten(2).transpose(1, 2).contiguous()
    for block in studio.blocks:
        tokens = block(tokens, context, modulation, rotations)
    return studio.unpatchify(studio.head(tokens, time), grid)


def vae(frames: int, height: int, width: int) -> tuple[Contestants, Contestants]:
    """Encoding and decoding a clip at the published width, in fp32."""
    ours = VideoVAE(96)
    randomise(ours, seed=0)
    # small pixels: nobody's result is clamped, so that all of it is compared
    ours.decoder.head[2].weight.data *= 0.05
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1
    latents = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    encode: Contestants = {"wanflow": lambda: ours.encode(pixels)}
    decode: Contestants = {"wanflow": lambda: ours.decode(latents)}
    if installed("diffusers"):
        from diffusers import AutoencoderKLWan

        theirs = copy_to_diffusers(ours, AutoencoderKLWan())
        encode["diffusers"] = lambda: theirs.encode(pixels).latent_dist.mean
        decode["diffusers"] = lambda: theirs.decode(latents).sample
    if installed("diffsynth"):
        studio = import_diffsynth("diffsynth.models.wan_video_vae").WanVideoVAE().model
        studio.load_state_dict(ours.state_dict())
        as_it_is = [torch.zeros(16), torch.ones(16)]  # no mean and deviation: raw latents
        encode["diffsynth"] = lambda: studio.encode(pixels, as_it_is)
        decode["diffsynth"] = lambda: studio.decode(latents, as_it_is)
    return encode, decode
