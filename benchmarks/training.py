"""One step of a LoRA's training in every library: ours, DiffSynth-Studio's, and diffusers with peft.

The same network, LoRA, picture, noise and level; blocks are computed again on the way back, and AdamW takes the step.
DiffSynth-Studio reads text and picture anew in every step, as its scripts do; diffusers has no script for Wan, and is
given what WanFlow has in its cache.
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
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.training.cache import Cache
from comfyui_wanflow.wan_core.training.examples import Example
from comfyui_wanflow.wan_core.training.objective import Objective
from comfyui_wanflow.wan_core.training.settings import Settings
from comfyui_wanflow.wan_core.training.team import Team
from comfyui_wanflow.wan_core.training.trainee import new_lora
from measure import Result, race
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LAYERS, SIDE, WORDS, RANK = 2, 256, 60, 32  # a picture of 256 x 256: 256 tokens
LEVEL = torch.tensor([0.732])
VOCABULARY = 1000  # of 256,384 words; and one of the text encoder's 24 layers
Read = Callable[[], tuple[Tensor, Tensor]]  # latents (1, 16, 1, h, w), text (1, words, 4096)
Factors = Mapping[str, nn.Parameter]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def noise_like(latents: Tensor) -> Tensor:
    return torch.randn(latents.shape, generator=generator())


def gradient_length(factors: Factors) -> Tensor:
    return torch.stack([p.grad.norm() for p in factors.values()]).norm()


def ours(trunk: DiT, read: Read) -> tuple[Callable[[], Tensor], Factors]:
    model = WanModel(
        module=Network(trunk), name="random", device=torch.device("cpu"), compute_dtype=torch.float32,
        layout=trunk.layout, residency=Residency(trunk),
    )  # fmt: skip
    trainee = new_lora(model, RANK)
    for name, parameter in trainee.parameters.items():
        if name.endswith(".up"):
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    optimizer = torch.optim.AdamW(trainee.parameters.values(), 1e-4)

    def step() -> Tensor:
        with trainee.model.attached() as network:
            loss = Objective(network, trainee.model, Settings())(Example(*read()), [generator()], LEVEL)
            loss.backward()
        length = Team().gather(trainee.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), torch.tensor(length)])

    return step, trainee.parameters


def theirs(forward: Callable[..., Tensor], factors: Factors, read: Read) -> Callable[[], Tensor]:
    """A step as their scripts take it, around `forward(noisy, timestep, text)`."""
    optimizer = torch.optim.AdamW(factors.values(), 1e-4)

    def step() -> Tensor:
        latents, text = read()
        text = F.pad(text, (0, 0, 0, 512 - text.shape[1]))
        noise = noise_like(latents)
        velocity = forward(LEVEL * noise + (1 - LEVEL) * latents, LEVEL * 1000, text)
        loss = F.mse_loss(velocity, noise - latents)
        loss.backward()
        length = gradient_length(factors)
        nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack([loss.detach(), length])

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
    from diffusers import WanTransformer3DModel

    layout = trunk.layout
    model = WanTransformer3DModel(num_attention_heads=layout.heads, ffn_dim=layout.ffn_dim, num_layers=LAYERS)
    contestants.copy_to_diffusers(trunk, model)
    layers = [to_diffusers(name.partition(".weight.")[0]) for name in own if name.endswith(".up")]
    factors = peft_factors(model, layers, own, to_diffusers)
    model.train()
    model.enable_gradient_checkpointing()
    return theirs(lambda x, t, text: model(x, t, text, return_dict=False)[0], factors, read)


def diffsynth_step(trunk: DiT, own: Factors, read: Read) -> Callable[[], Tensor]:
    library = contestants.import_diffsynth("diffsynth.models.wan_video_dit")
    layout = trunk.layout
    model = library.WanModel(
        dim=layout.dim, in_dim=16, ffn_dim=layout.ffn_dim, out_dim=16, text_dim=4096, freq_dim=256, eps=1e-6,
        patch_size=(1, 2, 2), num_heads=layout.heads, num_layers=LAYERS, has_image_input=False,
    )  # fmt: skip
    model.load_state_dict(trunk.state_dict())
    layers = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
    factors = peft_factors(model, layers, own, lambda name: name)
    for block in model.blocks:  # its pipelines call blocks so
        block.forward = again(block.forward)
    return theirs(lambda x, t, text: contestants.run_diffsynth(library, model, x, t, text), factors, read)


def again(call: Callable) -> Callable:
    return lambda *arguments: checkpoint(call, *arguments, use_reentrant=False)


def from_cache(folder: Path, latents: Tensor, text: Tensor) -> Read:
    cache = Cache(folder)
    cache["clip"], cache["text"] = {"latents": latents}, {"text": text}
    return lambda: (cache["clip"]["latents"], cache["text"]["text"])


def encoders() -> dict[str, Read]:
    """Picture and words to latents and text, by each library, with the published widths."""
    words = torch.randint(VOCABULARY, (1, WORDS), generator=generator())
    layout = UMT5Layout(vocabulary=VOCABULARY, dim=4096, attention_dim=4096, ffn_dim=10240, heads=64, layers=1)
    with torch.device("meta"):
        text_encoder = UMT5Encoder(layout)
    text_encoder.to_empty(device="cpu").requires_grad_(False)
    contestants.randomise(text_encoder, seed=2)
    picture, _ = contestants.vae(1, SIDE, SIDE)

    @torch.no_grad()
    def own() -> tuple[Tensor, Tensor]:
        return picture["wanflow"](), text_encoder(words, torch.ones_like(words), torch.float32)

    found = {"wanflow": own}
    if contestants.installed("diffsynth"):
        library = contestants.import_diffsynth("diffsynth.models.wan_video_text_encoder")
        with torch.device("meta"):
            their_encoder = library.WanTextEncoder(vocab=VOCABULARY, num_layers=1).eval()
        their_encoder.load_state_dict(text_encoder.state_dict(), assign=True)
        mask = F.pad(torch.ones_like(words), (0, 512 - WORDS))

        @torch.no_grad()
        def diffsynth() -> tuple[Tensor, Tensor]:
            text = their_encoder(F.pad(words, (0, 512 - WORDS)), mask)
            return picture["diffsynth"](), text[:, :WORDS]

        found["diffsynth"] = diffsynth
    return found


def training_table(rounds: int) -> list[Result]:
    """A step by itself, in a first epoch, and in later ones."""
    trunk = DiT(DiTLayout(dim=1536, ffn_dim=8960, layers=LAYERS, heads=12))
    contestants.randomise(trunk, seed=0)
    trunk.requires_grad_(False)
    makers = {"diffusers": diffusers_step, "diffsynth": diffsynth_step}
    makers = {name: make for name, make in makers.items() if contestants.installed(name)}
    with TemporaryDirectory() as folder:
        latents = torch.randn(1, 16, 1, SIDE // 8, SIDE // 8, generator=generator())
        text = torch.randn(1, WORDS, 4096, generator=generator())
        own, factors = ours(trunk, from_cache(Path(folder), latents, text))
        steps = {"wanflow": own} | {n: make(trunk, factors, lambda: (latents, text)) for n, make in makers.items()}
        results = race("a step, text and latents at hand", steps, rounds, gradients=True)
        reads = encoders()
        makers = {name: make for name, make in makers.items() if name in reads}
        first, factors = ours(trunk, reads["wanflow"])
        steps = {"wanflow": first, **{name: make(trunk, factors, reads[name]) for name, make in makers.items()}}
        results += race("a step from the picture (first epoch)", steps, rounds, gradients=True)
        later, factors = ours(trunk, from_cache(Path(folder), *reads["wanflow"]()))
        steps = {"wanflow": later, **{name: make(trunk, factors, reads[name]) for name, make in makers.items()}}
        return results + race("a step from the picture (later epochs)", steps, rounds, gradients=True)
