"""What is trained: a LoRA on some layers, whole parts of the model, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import InputError, ModelError
from ..loading.lora_files import save_lora
from ..lora import Lora, parameters
from ..model import PARTS, WanModel
from ..models.changes import Change, Decomposed, LowRank
from ..models.layers import Conv2d, Conv3d, Linear
from ..models.network import Network
from ..models.packed import PackedLinear
from ..offload.residency import Residency
from ..saving import write_whole
from .cache import digest, module_digest

LORA_TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")  # self- and cross-attention, and the feed-forward layers
# The parts that can be trained, by DiffSynth-Studio's names, and what they are in a Network.
TRAINABLE = {"dit": "trunk", "vace": "vace", "motion_controller": "motion_controller"}


KINDS = ("lora", "dora")
WITHOUT_GRADIENT = ("sage",)  # of the attention backends
LAYERS = (Linear, Conv2d, Conv3d)

Gather = Callable[[Tensor], Tensor]  # makes a tensor whole of which this process may hold a part


@dataclass(frozen=True, eq=False)
class Trainee:
    """`model` runs with the `parameters` that are trained.

    write(path, metadata, gather) saves what they have become, made whole by `gather`; with None for a path it only
    takes part in that. origin: the name of all numbers that the training begins with.
    """

    model: WanModel
    parameters: Mapping[str, nn.Parameter]
    write: Callable[..., None]
    origin: str


def check_part(model: WanModel, part: str) -> None:
    """Raises InputError for what is no part that can be trained, ModelError for one that this model has not."""
    if part not in TRAINABLE:
        raise InputError(
            f"'{part}' cannot be trained: the objective is the diffusion model's, and VAE and encoders only prepare "
            f"its data. Choose of {', '.join(TRAINABLE)}."
        )
    if getattr(model.module, TRAINABLE[part]) is None:
        raise ModelError(f"{model.name} has no {PARTS[part]} to train. Name its file among the models.")


def part_of(name: str) -> str:
    """The part that a parameter (by its published name) belongs to."""
    return "vace" if name.startswith("vace_") else "motion_controller" if name.startswith("motion_") else "dit"


# ---------------------------------------------------------------- LoRA


@torch.inference_mode(False)
def new_lora(
    model: WanModel,
    rank: int = 32,
    targets: Sequence[str] = LORA_TARGETS,
    seed: int = 0,
    parts: Sequence[str] = ("dit",),
    start: Lora | None = None,
    alpha: float | None = None,
    kind: str = "lora",
) -> Trainee:
    """A LoRA without effect yet, on all layers of the parts that a target names.

    targets: names, ends of names, or patterns for whole names (`blocks.1?.*_attn.q`); of linear layers and
    convolutions. alpha: the change counts alpha / rank; None: as it is. kind: "dora" learns the length of each row of
    a weight beside its direction (Liu et al., "DoRA", arXiv 2402.09353). The beginning is peft's (Hu et al., "LoRA",
    arXiv 2106.09685), or `start`, a LoRA of this kind and rank.
    """
    if rank < 1:
        raise InputError(f"lora_rank is {rank}, but a LoRA needs at least 1. 32 is usual.")
    if kind not in KINDS:
        raise InputError(f"There is no kind of LoRA called '{kind}'. Choose of {', '.join(KINDS)}.")
    for part in parts:
        check_part(model, part)
    layers = {
        name.removesuffix(".weight"): place.module
        for name, place in parameters(model.module).items()
        if isinstance(place.module, LAYERS) and place.name == "weight" and part_of(name) in parts
    }
    for target in targets:
        if not any(fits(name, target) for name in layers):
            raise InputError(f"{model.name} has no layer called '{target}'. q, k, v, o, ffn.0, ffn.2 are usual.")
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 if alpha is None else alpha / rank
    changes = {
        f"{name}.weight": new_change(layer, rank, scale, kind, generator)
        for name, layer in layers.items()
        if any(fits(name, target) for target in targets)
    }
    if start is not None:
        go_on(changes, start)
    lora = Lora(f"LoRA for {model.name}", {name: change.to(model.device) for name, change in changes.items()})
    factors = {f"{name}.{role}": p for name, change in changes.items() for role, p in change.named_parameters()}
    details = {"ss_base_model_version": model.name, "lora_rank": str(rank), "lora_alpha": f"{alpha or rank:g}"}
    loras = [(module_digest(lora.residency.module), strength) for lora, strength in (*model.loras, (lora, 1.0))]

    def write(path: Path, metadata: Mapping[str, str], gather: Gather | None = None) -> None:
        save_lora(lora, path, metadata=details | metadata)

    return Trainee(model.with_lora(lora), factors, write, digest(module_digest(model.module), loras))


def fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)


def new_change(layer: nn.Module, rank: int, scale: float, kind: str, generator: torch.Generator) -> Change:
    shape = (layer.out_features, layer.in_features) if isinstance(layer, Linear) else tuple(layer.weight.shape)
    bound = math.prod(shape[1:]) ** -0.5
    with torch.no_grad():
        down = torch.empty(rank, *shape[1:]).uniform_(-bound, bound, generator=generator)
        change = LowRank(torch.zeros(shape[0], rank, *[1] * len(shape[2:])), down, scale)
        if kind == "dora":
            weight = layer.numbers(torch.float32) if isinstance(layer, PackedLinear) else layer.weight.float().cpu()
            length = torch.linalg.vector_norm(weight.flatten(1), dim=1)
            change = Decomposed(change, length.view(-1, *[1] * len(shape[1:])))
    return change.requires_grad_(True)


def go_on(changes: Mapping[str, Change], start: Lora) -> None:
    """Give new changes the numbers of a LoRA. Raises InputError where it has others than those."""
    for name, change in changes.items():
        known = start.changes.get(name)
        shapes = [{role: p.shape for role, p in c.named_parameters()} if c else None for c in (known, change)]
        if type(known) is not type(change) or shapes[0] != shapes[1]:
            raise InputError(
                f"{start.name} has no such factors of {name}. Go on from a LoRA of this model, with the lora_rank, "
                "lora_base_model and lora_target_modules that it was trained with."
            )
        new, old = (getattr(c, "change", c) for c in (change, known))
        with torch.no_grad():
            change.load_state_dict(known.state_dict())
            new.up.mul_(old.scale / new.scale)


# ---------------------------------------------------------------- whole parts


def whole(model: WanModel, parts: Sequence[str] = ("dit",)) -> Trainee:
    """Copies of whole parts, in fp32 so that small steps are not lost; they are saved in the types that they came in.

    Trunk and VACE go into one file, as published; a motion controller into one of its own.
    """
    copies, types = {}, {}
    for part in parts:
        check_part(model, part)
        module = getattr(model.module, TRAINABLE[part])
        if any(isinstance(layer, PackedLinear) for layer in module.modules()):
            raise ModelError(
                f"The weights of {model.name} are packed into few bits, which cannot be trained. "
                "Take the model in bf16, or train a LoRA."
            )
        types[part] = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        with torch.inference_mode(False):
            copies[part] = deepcopy(module).to(model.device, torch.float32).requires_grad_(True)
    own = {TRAINABLE[part]: copy for part, copy in copies.items()}
    network = Network(**{name: own.get(name, getattr(model.module, name)) for name in TRAINABLE.values()})
    beside = {name: Residency(own[name]) if name in own else held for name, held in model.beside.items()}
    residency = Residency(own["trunk"]) if "trunk" in own else model.residency
    fronts = {"motion_controller": "motion_controller."}  # the names of the others differ as they are
    trained = {fronts.get(part, "") + name: p for part, copy in copies.items() for name, p in copy.named_parameters()}
    copy = replace(model, module=network, residency=residency, beside=beside)
    return Trainee(copy, trained, partial(write_parts, copies, types), module_digest(model.module))


def write_parts(
    parts: Mapping[str, nn.Module],
    types: Mapping[str, Mapping[str, torch.dtype]],
    path: Path | None,
    metadata: Mapping[str, str],
    gather: Gather = Tensor.detach,
) -> None:
    files: dict[Path, dict[str, Tensor]] = {}
    for part, module in parts.items():
        alone = part != "motion_controller" or len(parts) == 1
        tensors = {
            name: gather(tensor).to("cpu", types[part][name]).contiguous()
            for name, tensor in module.state_dict().items()
        }
        if path is not None:
            files.setdefault(path if alone else beside(path, part), {}).update(tensors)
    contents = {file: safetensors.torch.save(tensors, {"format": "pt", **metadata}) for file, tensors in files.items()}
    write_whole({file: partial(write_bytes, content=content) for file, content in contents.items()})


def write_bytes(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def beside(path: Path, what: str) -> Path:
    """epoch-0.safetensors -> epoch-0.motion_controller.safetensors"""
    return path.with_name(f"{path.stem}.{what}{path.suffix}")


# ---------------------------------------------------------------- both


def check_choice(model: WanModel, trainable_models: Sequence[str], lora_base_model: Sequence[str]) -> None:
    """Raises a WanError where the parts cannot be trained so."""
    if both := set(trainable_models) & set(lora_base_model):
        raise InputError(f"{' and '.join(sorted(both))} cannot be trained whole and with a LoRA at once. Choose one.")
    if not (trainable_models or lora_base_model):
        raise InputError("Say what to train: lora_base_model dit for a LoRA, or trainable_models dit for all of it.")
    for part in (*trainable_models, *lora_base_model):
        check_part(model, part)
    if model.attention in WITHOUT_GRADIENT:
        raise InputError(f"The attention backend '{model.attention}' knows no gradients. Load the model with 'auto'.")


def mixed(model: WanModel, trainable_models: Sequence[str], lora_base_model: Sequence[str], **lora_options) -> Trainee:
    """A LoRA on some parts (see `new_lora` for its options), and others whole; either list may be empty, not both.

    Beside a LoRA, whole parts are written into a file of their own, with their names behind the LoRA's.
    """
    check_choice(model, trainable_models, lora_base_model)
    if not lora_base_model:
        return whole(model, trainable_models)
    if not trainable_models:
        return new_lora(model, parts=lora_base_model, **lora_options)
    parts = whole(model, trainable_models)
    lora = new_lora(parts.model, parts=lora_base_model, **lora_options)

    def write(path: Path, metadata: Mapping[str, str], gather: Gather | None = None) -> None:
        parts.write(beside(path, "-".join(trainable_models)), metadata)
        lora.write(path, metadata)

    return Trainee(lora.model, {**parts.parameters, **lora.parameters}, write, lora.origin)
