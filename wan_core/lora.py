"""LoRAs: small changes to a model's parameters, worked in while a run calls the layers.

The stored weights never change, and nothing is merged beforehand: in each call a layer computes with its own numbers
plus the changes. That costs one small product a layer and the memory of one changed weight; it works the same on packed
weights and on weights that are fetched call by call, and another strength needs no loading.
"""

from __future__ import annotations

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

from .models.changes import Change, LowRank, flat
from .models.dit import size_name
from .models.layers import Linear
from .models.network import Network
from .models.packed import PackedLinear
from .offload.residency import Residency

ATTENTION = re.compile(r"attn\.[qkvo](_img)?\.weight$")
NUMBERED = re.compile(r"(?P<vace>vace_)?blocks\.(?P<number>\d+)\.")
HINTS = ("ss_base_model_version", "modelspec.architecture", "modelspec.title", "software")
IMAGE_PARTS = ("img_emb.", "k_img.", "v_img.")
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
    if name == "patch_embedding.weight":
        channels, own = (columns // 4 for columns in (change.shape[1], flat(target.shape)[1]))  # 4 latents a patch
        return f"trained for {channels} input channels, and this model has {own}"
    sizes = ("{} x {}".format(*shape) for shape in (change.shape, flat(target.shape)))
    return "trained for {} numbers, and this model has {}".format(*sizes)


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
    return "\n".join(filter(None, [*lines, lora.remark, lora.note and f"The file says: {lora.note}."]))


def some(names: tuple[str, ...], shown: int = 2) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


# ---------------------------------------------------------------- while a run lasts

Chain = list[tuple[Change, float]]

_running: WeakKeyDictionary[nn.Module, Loras] = WeakKeyDictionary()  # trunk -> what is worked into it now


@contextmanager
def worked_in(network: Network, loras: Loras) -> Iterator[None]:
    """Inside the `with`, the layers of `network` compute with the changes of `loras`. Runs of one model may nest."""
    trunk = network.trunk
    if trunk in _running:
        if _running[trunk] != loras:
            raise RuntimeError("These weights are in use with other LoRAs; the run inside must have the same.")
        yield
        return
    _running[trunk] = loras
    previous = {}
    try:
        for module, chains in plan(network, loras).items():
            previous[module] = vars(module).get("forward")  # a compiled one has its own
            module.forward = changed(module, chains)
        yield
    finally:
        del _running[trunk]
        for module, forward in previous.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def plan(network: Network, loras: Loras) -> dict[nn.Module, dict[str, Chain]]:
    """Module -> name of its parameter -> the changes to make to it, in order."""
    targets, chains = parameters(network), {}
    for lora, strength in loras:
        for name, change in fit(lora, network).changes.items() if strength else ():
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
                value = change(value, strength)
            module._parameters[name] = value
        yield
    finally:
        module._parameters.update(stored)
