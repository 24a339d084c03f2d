"""What is trained: a LoRA on some of the trunk's layers, or the whole trunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ..errors import InputError, ModelError
from ..loading.lora_files import save_lora
from ..lora import Lora
from ..model import WanModel
from ..models.changes import LowRank
from ..models.dit import DiT
from ..models.layers import Linear
from ..models.network import Network
from ..models.packed import PackedLinear
from ..offload.residency import Residency
from ..saving import write_whole

LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")  # self- and cross-attention, and the feed-forward layers


@dataclass(frozen=True, eq=False)
class Trainee:
    """`model` runs with the `parameters` that are trained; `write(path, metadata)` saves what they have become."""

    model: WanModel
    parameters: Mapping[str, nn.Parameter]
    write: Callable[[Path, Mapping[str, str]], None]


def new_lora(model: WanModel, rank: int = 32, targets: Sequence[str] = LORA_TARGETS, seed: int = 0) -> Trainee:
    """A LoRA without effect yet, on all linear layers of the trunk whose names are or end in one of `targets`.

    Its alpha is its rank, so that it counts as it is. Begins as peft does: Hu et al., "LoRA", arXiv 2106.09685.
    """
    if rank < 1:
        raise InputError(f"lora_rank is {rank}, but a LoRA needs at least 1. 32 is usual.")
    layers = {name: module for name, module in model.trunk.named_modules() if isinstance(module, Linear)}
    for target in targets:
        if not any(fits(name, target) for name in layers):
            raise InputError(f"{model.name} has no linear layer called '{target}'. q, k, v, o, ffn.0, ffn.2 are usual.")
    generator = torch.Generator().manual_seed(seed)
    changes = {
        f"{name}.weight": new_change(layer, rank, generator).to(model.device)
        for name, layer in layers.items()
        if any(fits(name, target) for target in targets)
    }
    lora = Lora(name=f"LoRA for {model.name}", changes=changes)
    factors = {f"{name}.{role}": p for name, change in changes.items() for role, p in change.named_parameters()}
    details = {"base_model": model.name, "lora_rank": str(rank), "lora_alpha": str(rank)}
    return Trainee(model.with_lora(lora), factors, lambda path, facts: save_lora(lora, path, metadata=details | facts))


def fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def new_change(layer: Linear, rank: int, generator: torch.Generator) -> LowRank:
    bound = layer.in_features**-0.5
    with torch.inference_mode(False):
        down = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        return LowRank(torch.zeros(layer.out_features, rank), down).requires_grad_(True)


def whole_trunk(model: WanModel) -> Trainee:
    """A copy of the trunk, in fp32 so that small steps are not lost; it is saved in the types that it came in."""
    if any(isinstance(module, PackedLinear) for module in model.trunk.modules()):
        raise ModelError(
            f"The weights of {model.name} are packed into few bits, which cannot be trained. "
            "Take the model in bf16, or train a LoRA."
        )
    types = {name: tensor.dtype for name, tensor in model.trunk.state_dict().items()}
    with torch.inference_mode(False):
        trunk = deepcopy(model.trunk).to(model.device, torch.float32).requires_grad_(True)
    network = Network(trunk, model.module.vace, model.module.motion_controller)
    copy = replace(model, module=network, residency=Residency(trunk))
    return Trainee(copy, dict(trunk.named_parameters()), partial(write_trunk, trunk, types))


def write_trunk(trunk: DiT, types: Mapping[str, torch.dtype], path: Path, metadata: Mapping[str, str]) -> None:
    tensors = {name: tensor.to(types[name]).contiguous() for name, tensor in trunk.state_dict().items()}
    content = safetensors.torch.save(tensors, {"format": "pt", **metadata})
    write_whole({path: lambda file: file.write_bytes(content)})
