"""The same networks in every library: ours, diffusers, DiffSynth-Studio and ComfyUI, with one set of random weights.

Libraries that are not installed are left out; ComfyUI is found where COMFYUI_PATH says.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple

import torch
from comfyui_wanflow.wan_core.compute import compute_dtype
from comfyui_wanflow.wan_core.loading.keymaps import published_names
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.slots import Run
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from measure import CPU, OURS, Contestants
from torch import Tensor, nn

CHECKOUT = "COMFYUI_PATH"
DIFFSYNTH_PACKAGES = ("diffsynth", "diffsynth.core", "diffsynth.models")


def installed(library: str) -> bool:
    return CHECKOUT in os.environ if library == "comfyui" else importlib.util.find_spec(library) is not None


def version(library: str) -> str:
    if library != "comfyui":
        return importlib.metadata.version(library)
    return importlib.import_module("comfyui_version").__version__ if import_comfyui("comfy") else ""


def import_diffsynth(module: str) -> types.ModuleType:
    """A module of DiffSynth without the imports of its packages, which want torchvision and other large things."""
    if "diffsynth" not in sys.modules:
        root = Path(importlib.util.find_spec("diffsynth").origin).parent
        for name in DIFFSYNTH_PACKAGES:
            bare = ModuleSpec(name, loader=None, is_package=True)
            bare.submodule_search_locations = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = importlib.util.module_from_spec(bare)
    return importlib.import_module(module)


def import_comfyui(module: str) -> types.ModuleType:
    """A module of the checkout, with torch's own attention: on a CPU its default is slower."""
    if os.environ[CHECKOUT] not in sys.path:
        sys.path.append(os.environ[CHECKOUT])
        settings = importlib.import_module("comfy.cli_args").args
        settings.cpu, settings.use_pytorch_cross_attention = not torch.cuda.is_available(), True
    return importlib.import_module(module)


def without_numbers() -> AbstractContextManager:
    """Modules that are made here have empty parameters, and all else that they work out."""
    from accelerate import init_empty_weights

    return init_empty_weights()


def randomise(module: nn.Module, seed: int) -> None:
    """Random values everywhere, also where a network starts from ones and zeros."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        if name.endswith(("gamma", "norm_q.weight", "norm_k.weight", "norm3.weight")):
            parameter.data = (1 + 0.1 * noise).to(parameter.dtype)
        elif name.endswith(("bias", "modulation")):
            parameter.data = (0.1 * noise).to(parameter.dtype)
        else:
            parameter.data = (noise / fan_in**0.5).to(parameter.dtype)


def random_dit(layout: DiTLayout, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> DiT:
    with torch.device("meta"):
        network = DiT(layout)
    network = network.to(dtype).to_empty(device=device).requires_grad_(False)
    randomise(network, seed=0)
    return network


# ---------------------------------------------------------------- the transformer


class Peer(NamedTuple):
    """How another library makes the transformer with our very weights, and how it runs."""

    make: Callable[[DiT], nn.Module]
    run: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # latents, timesteps, text, all in fp32


def diffusers_dit(ours: DiT) -> nn.Module:
    from diffusers import WanTransformer3DModel

    layout = ours.layout
    with without_numbers():
        theirs = WanTransformer3DModel(
            num_attention_heads=layout.heads, attention_head_dim=layout.dim // layout.heads, ffn_dim=layout.ffn_dim,
            num_layers=layout.layers,
        )  # fmt: skip
    theirs.load_state_dict(in_diffusers_names(ours, theirs), assign=True)
    theirs.rope.to(ours.head.modulation.device)
    return theirs


def in_diffusers_names(ours: nn.Module, theirs: nn.Module) -> dict[str, Tensor]:
    state = ours.state_dict()
    return {stored: state[name] for name, stored in published_names(theirs.state_dict()).items()}


def run_diffusers(model: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    return model(x.to(model.dtype), timestep, text.to(model.dtype), return_dict=False)[0].float()


def diffsynth_dit(ours: DiT) -> nn.Module:
    layout = ours.layout
    with without_numbers():
        theirs = import_diffsynth("diffsynth.models.wan_video_dit").WanModel(**diffsynth_arguments(layout))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.freqs = [angles.to(ours.head.modulation.device) for angles in theirs.freqs]
    return theirs


def diffsynth_arguments(layout: DiTLayout) -> dict:
    return {
        "dim": layout.dim, "in_dim": 16, "ffn_dim": layout.ffn_dim, "out_dim": 16, "text_dim": 4096, "freq_dim": 256,
        "eps": 1e-6, "patch_size": (1, 2, 2), "num_heads": layout.heads, "num_layers": layout.layers,
        "has_image_input": False,
    }  # fmt: skip


def run_diffsynth(model: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """Since 2.0 only its pipelines call the parts; this is what they do for text to video."""
    library, dtype = import_diffsynth("diffsynth.models.wan_video_dit"), model.patch_embedding.bias.dtype
    dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    x, timestep, text = (tensor.to(dtype) for tensor in (x, timestep, text))
    time = model.time_embedding(library.sinusoidal_embedding_1d(model.freq_dim, timestep))
    modulation = model.time_projection(time).unflatten(1, (6, model.dim))
    context = model.text_embedding(text)
    patches = model.patchify(x)
    frames, height, width = grid = patches.shape[2:]
    angles = [
        model.freqs[0][:frames].view(frames, 1, 1, -1).expand(*grid, -1),
        model.freqs[1][:height].view(1, height, 1, -1).expand(*grid, -1),
        model.freqs[2][:width].view(1, 1, width, -1).expand(*grid, -1),
    ]
    rotations = torch.cat(angles, dim=-1).reshape(frames * height * width, 1, -1)
    tokens = patches.flatten(2).transpose(1, 2).contiguous()
    for block in model.blocks:
        tokens = block(tokens, context, modulation, rotations)
    return model.unpatchify(model.head(tokens, time), grid).float()


def comfyui_dit(ours: DiT) -> nn.Module:
    theirs = empty_comfyui_dit(ours.layout, ours.head.head.weight.dtype, ours.head.modulation.device)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.patch_embedding.float()  # as it keeps it
    return theirs


def empty_comfyui_dit(layout: DiTLayout, dtype: torch.dtype, device: torch.device, fast: bool = False) -> nn.Module:
    """With the layers that its loader picks for this type on this device. fast: products in fp8, where it has them."""
    operations = import_comfyui("comfy.ops").pick_operations(
        dtype, comfyui_compute_dtype(dtype, device), load_device=device, fp8_optimizations=fast
    )
    with without_numbers():
        return import_comfyui("comfy.ldm.wan.model").WanModel(
            in_dim=16, dim=layout.dim, ffn_dim=layout.ffn_dim, num_heads=layout.heads, num_layers=layout.layers,
            dtype=dtype, operations=operations,
        )  # fmt: skip


def comfyui_compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """On a CPU it widens what is stored in 16 bits."""
    return import_comfyui("comfy.model_management").unet_manual_cast(dtype, device) or dtype


def run_comfyui(model: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    dtype = comfyui_compute_dtype(model.dtype, x.device)
    return model(x.to(dtype), timestep, text.to(dtype)).float()


PEERS = {
    "diffusers": Peer(diffusers_dit, run_diffusers),
    "diffsynth": Peer(diffsynth_dit, run_diffsynth),
    "comfyui": Peer(comfyui_dit, run_comfyui),
}


def present() -> dict[str, Peer]:
    return {library: peer for library, peer in PEERS.items() if installed(library)}


class Inputs(NamedTuple):
    """What every transformer is given: latents (1, 16, t, h, w), a timestep, text without padding."""

    x: Tensor
    timestep: Tensor
    text: Tensor


def inputs(grid: tuple[int, int, int], device: torch.device = CPU, text_tokens: int = 512) -> Inputs:
    """The timestep is a number that bf16 has: DiffSynth narrows it."""
    generator = torch.Generator().manual_seed(1)
    tensors = (
        torch.randn(1, 16, *grid, generator=generator), torch.tensor([732.0]),
        torch.randn(1, text_tokens, 4096, generator=generator),
    )  # fmt: skip
    return Inputs(*(tensor.to(device) for tensor in tensors))


def dits(ours: DiT, given: Inputs) -> Contestants:
    """One forward by each library."""
    weight = ours.head.modulation
    run = Run(compute_dtype=torch.float32 if weight.dtype == torch.float32 else compute_dtype(weight.device))
    found: Contestants = {OURS: lambda: ours(*given, run=run)}
    for library, peer in present().items():
        theirs = peer.make(ours)
        found[library] = lambda peer=peer, theirs=theirs: peer.run(theirs, *given)
    return found


# ---------------------------------------------------------------- the VAE


class Coder(NamedTuple):
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def vaes(dim: int = 96, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> dict[str, Coder]:
    ours = VideoVAE(dim).requires_grad_(False)
    randomise(ours, seed=0)
    ours.decoder.head[2].weight.data *= 0.05  # small pixels: nobody's result is clamped, so that all of it is compared
    found = {OURS: Coder(ours.encode, ours.decode)}
    if installed("diffusers"):
        from diffusers import AutoencoderKLWan

        theirs = AutoencoderKLWan(base_dim=dim)
        theirs.load_state_dict(in_diffusers_names(ours, theirs))
        theirs.to(device, dtype)
        found["diffusers"] = Coder(lambda x: theirs.encode(x).latent_dist.mean, lambda z: theirs.decode(z).sample)
    if installed("diffsynth"):
        studio = import_diffsynth("diffsynth.models.wan_video_vae").VideoVAE_(dim, z_dim=16)
        studio.load_state_dict(ours.state_dict())
        studio.to(device, dtype)
        as_it_is = [torch.zeros(16, device=device), torch.ones(16, device=device)]  # no mean and deviation: raw latents
        found["diffsynth"] = Coder(lambda x: studio.encode(x, as_it_is), lambda z: studio.decode(z, as_it_is))
    if installed("comfyui"):
        comfyui = import_comfyui("comfy.ldm.wan.vae").WanVAE(dim=dim, z_dim=16, temperal_downsample=[False, True, True])
        comfyui.load_state_dict(ours.state_dict())
        comfyui.to(device, dtype)
        found["comfyui"] = Coder(comfyui.encode, comfyui.decode)
    ours.to(device, dtype)
    return found
