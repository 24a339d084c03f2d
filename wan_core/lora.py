"""LoRAs: small changes to a model's parameters, worked in while a run calls the layers.

The stored weights never change, and nothing is merged beforehand: in each call a layer computes with its own numbers
plus the changes. That costs one small product a layer and the memory of one changed weight; it works the same on packed
weights and on weights that are fetched call by call, and another strength needs no loading.

A control LoRA widens the input of a Text to Video model, as those of Flux do: behind the 16 channels of the noisy
latents the model reads the normalised latents of a control video. The stored weights have nothing for these channels,
which counts as zeros, and the LoRA adds its own. Source: spacepxl, "Wan2.1-control-loras" and "WanTraining".
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import MethodType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ModelError
from .models.changes import Change, LowRank, flat
from .models.layers import Linear
from .models.layout import LATENT_CHANNELS, PATCH, size_name
from .models.network import Network
from .models.packed import PackedLinear
from .offload.residency import Residency

ATTENTION = re.compile(r"attn\.[qkvo](_img)?\.weight$")
NUMBERED = re.compile(r"(?P<vace>vace_)?blocks\.(?P<number>\d+)\.")
HINTS = ("ss_base_model_version", "modelspec.architecture", "modelspec.title", "software")
IMAGE_PARTS = ("img_emb.", "k_img.", "v_img.")
INPUT = "patch_embedding.weight"
PARTS = {
    "motion_controller.": "they need a motion speed controller, which this model has not",
    "ref_conv.": "they belong to a reference image input, which this model has not",
    "control_adapter.": "they belong to a camera input, which this model has not",
}


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA, tied to no model.

    changes   the published name of a parameter -> what happens to it
    unread    why something of the file could not be read -> its names
    metadata  what the file says about itself
    remark    what was taken for granted in reading it, may be empty
    """

    name: str
    changes: Mapping[str, Change]
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""

    @property
    def note(self) -> str:
        """The shortest of it that tells what the LoRA is for; may be empty."""
        return ", ".join(dict.fromkeys(filter(None, map(self.metadata.get, HINTS))))

    @cached_property
    def residency(self) -> Residency:
        """The factors, moved as all weights are; the models that the LoRA is applied to share them."""
        return Residency(nn.ModuleList(self.changes.values()))

    @cached_property
    def width(self) -> int | None:
        """Of the models it was trained for, as far as the attention layers tell."""
        widths = Counter(change.shape[0] for name, change in self.changes.items() if ATTENTION.search(name))
        return widths.most_common(1)[0][0] if widths else None

    @cached_property
    def channels(self) -> int | None:
        """Of the input of the models it was trained for; None where it leaves the reading of the input as it is."""
        change = self.changes.get(INPUT)
        return None if change is None else change.shape[1] // math.prod(PATCH)

    @cached_property
    def controls(self) -> bool:
        """Whether it gives Text to Video models a control video; camera models have as many channels."""
        others = (*IMAGE_PARTS, "control_adapter.")
        is_other = any(part in name for name in self.changes for part in others)
        return self.channels == 2 * LATENT_CHANNELS and not is_other


Loras = tuple[tuple[Lora, float], ...]  # with their strengths, in the order in which they were applied


@dataclass(frozen=True)
class Parameter:
    """Where a network holds a parameter, and its shape, for a packed one that of its numbers."""

    module: nn.Module
    name: str
    shape: tuple[int, ...]


def parameters(network: Network) -> dict[str, Parameter]:
    """All parameters of trunk, VACE and motion controller by their published names (the last under its own)."""
    found = {}
    for path, module in network.named_modules():
        prefix = path.removeprefix("trunk").removeprefix("vace").removeprefix(".") if path else ""
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            packed = isinstance(module, PackedLinear) and name == "weight"
            shape = (module.out_features, module.in_features) if packed else tuple(parameter.shape)
            found[f"{prefix}.{name}" if prefix else name] = Parameter(module, name, shape)
    return found


@dataclass(frozen=True)
class Fit:
    """Which changes of a LoRA a model can take, and why it cannot take the others (reason -> names)."""

    changes: Mapping[str, Change]
    skipped: Mapping[str, tuple[str, ...]]

    def reasons(self) -> str:
        """One line a reason."""
        return "\n".join(
            f"{len(names)} {'parts' if len(names) > 1 else 'part'} left out ({some(names)}): {reason}."
            for reason, names in self.skipped.items()
        )


def fit(lora: Lora, network: Network) -> Fit:
    targets, changes, skipped = parameters(network), {}, {reason: list(names) for reason, names in lora.unread.items()}
    for name, change in lora.changes.items():
        reason = misfit(lora, name, change, targets.get(name), network)
        if reason is None:
            changes[name] = change
        else:
            skipped.setdefault(reason, []).append(name)
    return Fit(changes, {reason: tuple(names) for reason, names in skipped.items()})


def misfit(lora: Lora, name: str, change: Change, target: Parameter | None, network: Network) -> str | None:
    """Why this change cannot be made; None where it can."""
    layout = network.trunk.layout
    if lora.width not in (None, layout.dim):  # even where a part would fit by chance
        return f"trained for {size_name(lora.width)}, and this model has {size_name(layout.dim)}"
    if target is not None and flat(target.shape) == change.shape:
        return None
    if target is None:
        return absent(name, network)
    if name == INPUT and change.shape[0] == layout.dim:
        if lora.controls and lora.channels == layout.in_dim:
            return None
        return f"trained for {lora.channels} input channels, and this model has {layout.in_dim}"
    sizes = ("{} x {}".format(*shape) for shape in (change.shape, flat(target.shape)))
    return "trained for {} numbers, and this model has {}".format(*sizes)


def widened(network: Network, lora: Lora, name: str) -> Network:
    """The network, called `name`, with the input that a control LoRA needs; for other LoRAs it stays as it is.

    Raises ModelError where that is no Text to Video model, or has a control LoRA already.
    """
    layout, own = network.trunk.layout, network.trunk.patch_embedding.in_channels
    if not lora.controls or own == lora.channels or lora.changes[INPUT].shape[0] != layout.dim:
        return network
    if layout.in_dim == lora.channels:
        raise ModelError(
            f"The LoRA {lora.name} gives {name} a control video, but it has one from another LoRA already. Remove one "
            "of the two."
        )
    if layout.in_dim != LATENT_CHANNELS:
        raise ModelError(
            f"The LoRA {lora.name} gives a Text to Video model a control video, but {name} is of another kind "
            f"({layout.family}, in_dim {layout.in_dim}). Load a Text to Video model of {size_name(layout.dim)}."
        )
    return Network(network.trunk.widened(lora.channels), network.vace, network.motion_controller)


def absent(name: str, network: Network) -> str:
    """Why a model has no parameter that other Wan 2.1 models have."""
    if any(part in name for part in IMAGE_PARTS):
        return "they look at an image, and this model looks at none (harmless: the rest works)"
    if name.startswith("vace_") and network.vace is None:
        return "they need a VACE module, which this model has not; put Add Wan Module in front of Apply Wan LoRA"
    if numbered := NUMBERED.match(name):
        blocks = network.vace.vace_blocks if numbered["vace"] else network.trunk.blocks
        if int(numbered["number"]) >= len(blocks):
            return f"they belong to blocks after the last of this model, which has {len(blocks)}"
    reasons = (reason for prefix, reason in PARTS.items() if name.startswith(prefix))
    return next(reasons, "this model has no such parts")


def report(lora: Lora, fitted: Fit, strength: float) -> str:
    """What was matched and what was not, for the user."""
    count = len(fitted.changes) + sum(map(len, fitted.skipped.values()))
    lines = [f"{lora.name}: {len(fitted.changes)} of {count} parts fit, strength {strength:g}.", fitted.reasons()]
    if lora.controls and INPUT in fitted.changes:
        lines.append("The model reads a control video now, from Wan Control Video; without one, zeros.")
    return "\n".join(filter(None, [*lines, lora.remark, lora.note and f"The file says: {lora.note}."]))


def some(names: tuple[str, ...], shown: int = 2) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


# ---------------------------------------------------------------- while a run lasts

Chain = list[tuple[Change, float]]

_running: WeakKeyDictionary[nn.Module, Loras] = WeakKeyDictionary()  # a trunk's blocks -> what is worked in now


@contextmanager
def worked_in(network: Network, loras: Loras) -> Iterator[None]:
    """Inside the `with`, the layers of `network` compute with the changes of `loras`. Runs of one model may nest."""
    blocks = network.trunk.blocks  # the same for all handles, however wide their input is
    if blocks in _running:
        if _running[blocks] != loras:
            raise RuntimeError("These weights are in use with other LoRAs; the run inside must have the same.")
        yield
        return
    _running[blocks] = loras
    previous = {}
    try:
        for module, chains in plan(network, loras).items():
            previous[module] = vars(module).get("forward")  # a compiled one has its own
            module.forward = changed(module, chains)
        yield
    finally:
        del _running[blocks]
        for module, forward in previous.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def plan(network: Network, loras: Loras) -> dict[nn.Module, dict[str, Chain]]:
    """Module -> name of its parameter -> the changes to make to it, in order."""
    targets, chains = parameters(network), {}
    for lora, strength in loras:
        for name, change in fit(lora, network).changes.items():
            if not strength and not (name == INPUT and lora.controls):  # which is there to be read, without effect
                continue
            target = targets[name]
            chains.setdefault(target.module, {}).setdefault(target.name, []).append((change, strength))
    return chains


def changed(module: nn.Module, chains: Mapping[str, Chain]) -> Callable:
    """A forward for `module` that computes with changed parameters. It reads them when it is called, wherever they
    are then."""
    plain = module.forward
    if isinstance(module, PackedLinear) and "weight" in chains:
        unpacked = MethodType(Linear.forward, module)  # takes numbers for its weight
    else:
        unpacked = plain

    def forward(*arguments, **options):
        x = arguments[0]
        beside = chains["weight"] if is_cheaper_beside(module, chains, x) else []
        with swapped(module, {name: chain for name, chain in chains.items() if chain is not beside}, x.dtype):
            y = (plain if beside else unpacked)(*arguments, **options)
        for change, strength in beside:
            y = change(y, strength, x)
        return y

    return forward


def is_cheaper_beside(module: nn.Module, chains: Mapping[str, Chain], x: Tensor) -> bool:
    """Whether to add what the changes of the weight make of x to the layer's answer, instead of changing the weight.

    For low ranks the two differ only in the number of products: rows of x times both its sides, or the weight's sides
    multiplied. To train, the former needs no gradient as large as the weight.
    """
    low_rank = all(isinstance(change, LowRank) for change, _ in chains.get("weight", ()))
    if not (isinstance(module, Linear) and "weight" in chains and low_rank):
        return False
    rows = x.numel() // module.in_features
    few = rows * (module.in_features + module.out_features) < module.in_features * module.out_features
    return few or torch.is_grad_enabled()


@contextmanager
def swapped(module: nn.Module, chains: Mapping[str, Chain], dtype: torch.dtype) -> Iterator[None]:
    """The module with its parameters changed: those of linear layers in `dtype`, others in fp32, to be narrowed."""
    stored = dict(module._parameters)
    try:
        for name, chain in chains.items():
            if isinstance(module, PackedLinear) and name == "weight":
                value = module.numbers(dtype)
            else:
                value = stored[name].to(dtype if isinstance(module, Linear) else torch.float32)
            for change, strength in chain:
                value = made(change, value, strength)
            module._parameters[name] = value
        yield
    finally:
        module._parameters.update(stored)


def made(change: Change, value: Tensor, strength: float) -> Tensor:
    """The changed value. Of an input that is read with more or fewer channels (the second side) than the change has,
    those are the first of these; channels without weights count as zeros."""
    if flat(value.shape) == change.shape:
        return change(value, strength)
    more = change.shape[1] // math.prod(PATCH) - value.shape[1]
    if more > 0:
        return change(F.pad(value, (0, 0, 0, 0, 0, 0, 0, more)), strength)
    return torch.cat([change(value[:, :more], strength), value[:, more:]], dim=1)
