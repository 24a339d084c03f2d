"""One step of a LoRA's training in every library: ours, DiffSynth-Studio's, and diffusers with peft.

The same network, LoRA, picture, noise and level; blocks are computed again on the way back, and AdamW takes the step.
DiffSynth-Studio reads text and picture anew in every step, as its scripts do; diffusers has no script for Wan, and is
given what WanFlow has in its cache. ComfyUI trains otherwise, and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import contestants
import torch
from comfyui_wanflow.wan_core.loading.lora_names import to_diffusers
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.training.cache import Cache
from comfyui_wanflow.wan_core.training.examples import Example
from comfyui_wanflow.wan_core.training.objective import Objective
from comfyui_wanflow.wan_core.training.settings import Settings
from comfyui_wanflow.wan_core.training.team import Team
from comfyui_wanflow.wan_core.training.trainee import new_lora
from floors import lora_step_operations, product_rate
from measure import OURS, Contestants, Workload, race
from setting import Setting
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WORDS, RANK = 60, 32
LEVEL = 0.732
VOCABULARY = 1000  # of 256,384 words; and one of the text encoder's 24 layers
Read = Callable[[], tuple[Tensor, Tensor]]  # latents (1, 16, t, h, w), text (1, words, 4096)
Factors = Mapping[str, nn.Parameter]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def noise_like(latents: Tensor) -> Tensor:
    return torch.randn(latents.shape, generator=generator()).to(latents)


def gradient_length(factors: Factors) -> Tensor:
    return torch.stack([p.grad.norm() for p in factors.values()]).norm()


def our_step(trunk: DiT, read: Read) -> tuple[Callable[[], Tensor], Factors]:
    weight = trunk.head.modulation
    model = WanModel(
        module=Network(trunk), name="random", device=weight.device, compute_dtype=weight.dtype, layout=trunk.layout,
        residency=Residency(trunk),
    )  # fmt: skip
    trainee = new_lora(model, RANK)
    for name, parameter in trainee.parameters.items():
        if name.endswith(".up"):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data.copy_(0.02 * noise)
    optimizer = torch.optim.AdamW(trainee.parameters.values(), 1e-4)

    def step() -> Tensor:
        with trainee.model.attached() as network:
            level = torch.tensor([LEVEL])
            loss = Objective(network, trainee.model, Settings())(Example(*read()), [generator()], level)
            loss.backward()
        length = Team().gather(trainee.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.tensor([loss.item(), float(length)])

    return step, trainee.parameters


def their_step(forward: Callable[..., Tensor], factors: Factors, read: Read) -> Callable[[], Tensor]:
    """A step as their scripts take it, around `forward(noisy, timestep, text)`."""
    optimizer = torch.optim.AdamW(factors.values(), 1e-4)

    def step() -> Tensor:
        latents, text = read()
        text = F.pad(text, (0, 0, 0, 512 - text.shape[1]))
        noise, level = noise_like(latents), torch.tensor([LEVEL], device=latents.device)
        velocity = forward(level * noise + (1 - level) * latents, level * 1000, text)
        loss = F.mse_loss(velocity, noise - latents)
        loss.backward()
        length = gradient_length(factors)
        nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return torch.tensor([loss.item(), length.item()])

    return step


def peft_factors(model: nn.Module, layers: list[str], own: Factors, rename: Callable[[str], str]) -> Factors:
    """Put peft's LoRA into `model`, with the numbers of ours."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers), model)
    state = dict(model.named_parameters())
    factors = {}
    for name, parameter in own.items():
        layer, _, role = name.rpartition(".weight.")
        factors[name] = state[f"{rename(layer)}.lora_{'B' if role == 'up' else 'A'}.default.weight"]
        factors[name].data.copy_(parameter)
    return factors


def diffusers_step(trunk: DiT, own: Factors, read: Read) -> Callable[[], Tensor]:
    model = contestants.diffusers_dit(trunk)
    layers = [to_diffusers(name.partition(".weight.")[0]) for name in own if name.endswith(".up")]
    factors = peft_factors(model, layers, own, to_diffusers)
    model.train()
    model.enable_gradient_checkpointing()
    return their_step(lambda *given: contestants.run_diffusers(model, *given), factors, read)


def diffsynth_step(trunk: DiT, own: Factors, read: Read) -> Callable[[], Tensor]:
    model = contestants.diffsynth_dit(trunk)
    factors = peft_factors(model, ["q", "k", "v", "o", "ffn.0", "ffn.2"], own, lambda name: name)
    for block in model.blocks:  # its pipelines call blocks so
        block.forward = again(block.forward)
    return their_step(lambda *given: contestants.run_diffsynth(model, *given), factors, read)


def again(call: Callable) -> Callable:
    return lambda *arguments: checkpoint(call, *arguments, use_reentrant=False)


STEPS = {"diffusers": diffusers_step, "diffsynth": diffsynth_step}


def steps(trunk: DiT, reads: Mapping[str, Read]) -> Contestants:
    """A step of each library that has a way to read, and is installed."""
    own, factors = our_step(trunk, reads[OURS])
    libraries = [library for library in STEPS if library in reads and contestants.installed(library)]
    return {OURS: own} | {library: STEPS[library](trunk, factors, reads[library]) for library in libraries}


def from_cache(folder: Path, latents: Tensor, text: Tensor) -> Read:
    cache = Cache(folder)
    cache["clip"], cache["text"] = {"latents": latents}, {"text": text}
    return lambda: (cache["clip"]["latents"], cache["text"]["text"])


def encoders(setting: Setting, size: tuple[int, int]) -> dict[str, Read]:
    """Picture and words to latents and text, by each library, with the published widths."""
    words = torch.randint(VOCABULARY, (1, WORDS), generator=generator())
    layout = UMT5Layout(vocabulary=VOCABULARY, dim=4096, attention_dim=4096, ffn_dim=10240, heads=64, layers=1)
    with torch.device("meta"):
        text_encoder = UMT5Encoder(layout)
    text_encoder.to_empty(device="cpu").requires_grad_(False)
    contestants.randomise(text_encoder, seed=2)
    coders = contestants.vaes(setting.vae_width)
    pixels = torch.rand(1, 3, 1, *size, generator=generator()) * 2 - 1

    @torch.no_grad()
    def own() -> tuple[Tensor, Tensor]:
        return coders[OURS].encode(pixels), text_encoder(words, torch.ones_like(words), torch.float32)

    found = {OURS: own}
    if contestants.installed("diffsynth"):
        library = contestants.import_diffsynth("diffsynth.models.wan_video_text_encoder")
        with torch.device("meta"):
            their_encoder = library.WanTextEncoder(vocab=VOCABULARY, num_layers=1).eval()
        their_encoder.load_state_dict(text_encoder.state_dict(), assign=True)
        mask = F.pad(torch.ones_like(words), (0, 512 - WORDS))

        @torch.no_grad()
        def diffsynth() -> tuple[Tensor, Tensor]:
            text = their_encoder(F.pad(words, (0, 512 - WORDS)), mask)
            return coders["diffsynth"].encode(pixels), text[:, :WORDS]

        found["diffsynth"] = diffsynth
    return found


def at_hand(trunk: DiT, grid: tuple[int, int, int]) -> dict[str, Read]:
    """Latents and text in fp32 where the network is."""
    device = trunk.head.modulation.device
    latents = torch.randn(1, 16, *grid, generator=generator()).to(device)
    text = torch.randn(1, WORDS, 4096, generator=generator()).to(device)
    return dict.fromkeys((OURS, *STEPS), lambda: (latents, text))


def c9(setting: Setting) -> list[Workload]:
    """On a picture: a step by itself, in a first epoch, and in later ones."""
    trunk = contestants.random_dit(setting.layout("1.3B", 2))
    grid = setting.grid(1, 256, 256)
    tokens = grid[0] * grid[1] * grid[2] // 4
    floor = lora_step_operations(trunk.layout, tokens) / product_rate(setting, torch.float32)
    name = f"LoRA, a step, 2 of 30 layers, {tokens} tokens, fp32"
    with TemporaryDirectory() as folder:
        reads = at_hand(trunk, grid)
        reads[OURS] = from_cache(Path(folder), *reads[OURS]())
        results = race(name, steps(trunk, reads), setting.rounds, gradients=True)
        found = [Workload(name, results, floor, target=1.0, aim=0.85)]
        reads = encoders(setting, setting.clip(1, 256, 256)[1:])
        for epoch in ("first epoch", "later epochs"):
            title = f"{name}, from the picture and its caption, {epoch}"
            results = race(title, steps(trunk, reads), setting.rounds, gradients=True)
            found.append(Workload(title, results, target=1.0))
            reads[OURS] = from_cache(Path(folder), *reads[OURS]())
    return found
