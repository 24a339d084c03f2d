"""The optimizers, each by the library that is known for it; only torch's own is always there.

AdamW: Loshchilov and Hutter, arXiv 1711.05101. 8-bit states: Dettmers et al., arXiv 2110.02861. Adafactor: Shazeer and
Stern, arXiv 1804.04235. Prodigy: Mishchenko and Defazio, arXiv 2306.06101. Schedule-free: Defazio et al., arXiv
2405.15682. Muon: muon.py. LoRA+: Hayou et al., arXiv 2402.12354.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import InputError


@dataclass(frozen=True)
class Kind:
    """Where an optimizer is, what to install for it, and what it is given beside rate and decay.

    state_bytes: what it keeps of each number, at most. takes_parts: it steps each number by itself, so that each
    process may hold some of them.
    """

    module: str
    name: str
    package: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    state_bytes: int = 8
    takes_parts: bool = False


OPTIMIZERS = {
    "adamw": Kind("torch.optim", "AdamW", options={"betas": (0.9, 0.999)}, takes_parts=True),
    "adamw8bit": Kind("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", {"betas": (0.9, 0.999)}, state_bytes=3),
    "adafactor": Kind(
        "transformers", "Adafactor", "transformers", {"scale_parameter": False, "relative_step": False}, state_bytes=1
    ),
    "prodigy": Kind(
        "prodigyopt", "Prodigy", "prodigyopt", {"safeguard_warmup": True, "use_bias_correction": True}, state_bytes=16
    ),
    "schedule_free": Kind("schedulefree", "AdamWScheduleFree", "schedulefree", takes_parts=True),
    "muon": Kind(f"{__package__}.muon", "Muon"),
}


@dataclass(frozen=True)
class OptimizerSettings:
    """`optimizer` is one of OPTIMIZERS, `optimizer_options` are its library's own.

    lora_plus_ratio   how much faster a LoRA's second factor learns than its first (LoRA+, 16 is usual); 1: as fast
    max_grad_norm     longer gradients are cut to this length; 0 leaves them
    ema_decay         what is saved and shown is an average of about the last 1 / (1 - ema_decay) steps; 0: the last
    """

    optimizer: str = "adamw"
    optimizer_options: Mapping[str, object] = field(default_factory=dict)
    weight_decay: float = 0.01
    lora_plus_ratio: float = 1.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """An optimizer as the settings say. Each of its groups has its own `ratio` to the learning rate (LoRA+).

    Raises InputError where its library is missing, or does not know an option.
    """
    kind = OPTIMIZERS[settings.optimizer]
    try:
        found = getattr(importlib.import_module(kind.module), kind.name)
    except ImportError as error:
        raise InputError(
            f"The optimizer {settings.optimizer} needs {kind.package}, which cannot be imported ({error}). "
            f"Run 'pip install {kind.package}', or choose adamw."
        ) from error
    ratios = {name: settings.lora_plus_ratio if name.endswith(".up") else 1.0 for name in parameters}
    groups = [
        {"params": [parameter for name, parameter in parameters.items() if ratios[name] == ratio], "ratio": ratio}
        for ratio in dict.fromkeys(ratios.values())
    ]
    options = {**kind.options, "weight_decay": settings.weight_decay, **settings.optimizer_options}
    try:
        optimizer = found(groups, lr=learning_rate, **options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The optimizer {settings.optimizer} cannot take these options: {error}. Change optimizer_options."
        ) from error
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
