"""How distilled models and LoRAs are sampled, one row each. Only data: adding a model is adding a row.

Facts: the configurations and pages that docs/few_steps.md names.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class FewSteps:
    """Settings of the sampler, by its names. timesteps: each step's noise level; empty: as `shift` spaces them."""

    steps: int
    cfg: float = 1.0
    shift: float = 5.0
    scheduler: str = "lcm"
    timesteps: str = ""


FEW_STEPS = {
    "WanTiny-T2V-4steps": FewSteps(4, shift=3.0, scheduler="euler"),
    "lightx2v 14B": FewSteps(4),
    "Self-Forcing 1.3B": FewSteps(4),
    "FastWan": FewSteps(3, timesteps="1000, 757, 522"),
    "CausVid 1.3B": FewSteps(3, timesteps="1000, 757, 522"),
    "CausVid 14B": FewSteps(9, scheduler="euler", timesteps="1000, 934, 862, 756, 603, 410, 250, 140, 74"),
    "AccVid 14B": FewSteps(10, scheduler="unipc"),
}


def few_steps(name: str) -> FewSteps:
    if name not in FEW_STEPS:
        raise InputError(f"There is no preset '{name}'. Choose one of {', '.join(FEW_STEPS)}.")
    return FEW_STEPS[name]
