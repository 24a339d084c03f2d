"""What a run keeps of its steps for the model's cache, and what the model learns from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..model import WanModel
from .magcache import CURVES, MEASURED, Curve, MagCache, Measuring, curve_of
from .reuse import Residuals
from .teacache import TeaCache


def residuals_for(
    model: WanModel, timesteps: Tensor, alike: Sequence[bool], time_add: Tensor | None
) -> Residuals | None:
    """None where the cache, if there is one, keeps no residuals.

    timesteps (n,), 0..1000; alike: for each step whether it asks the model for the same prompts as the step before.
    """
    if isinstance(model.cache, TeaCache):
        skipped = model.cache.plan(model.trunk, timesteps, time_add)
    elif isinstance(model.cache, MagCache):
        levels = levels_of(timesteps)
        curve = known_curve(model, levels)
        if curve is None:
            return Measuring(len(levels))
        skipped = model.cache.skipped(levels, curve)
    else:
        return None
    return Residuals([skip and same for skip, same in zip(skipped, alike, strict=True)], model.cache.device)


def known_curve(model: WanModel, levels: Sequence[float]) -> Curve | None:
    """For MagCache; None where it still has to be measured for a run over these levels."""
    if model.cache.curve != MEASURED:
        return CURVES[model.cache.curve]
    curve = model.curves.get(model.changes)
    return curve if curve is not None and curve.reaches(levels) else None


def learn(model: WanModel, measured: Measuring, timesteps: Tensor, agreed: Callable[[Tensor], Tensor]) -> str:
    """Let the model know the curve that was measured in a whole run; the sentence that says so.

    agreed: makes of a tensor that of the process which leads, where several measure.
    """
    levels = levels_of(timesteps)
    if len(levels) > 1:
        model.curves[model.changes] = curve_of(levels, agreed(measured.ratios()).tolist())
    return f"{model.cache.name} measured this model in {len(levels)} steps and skipped none. The next run skips."


def levels_of(timesteps: Tensor) -> list[float]:
    return (timesteps / 1000).tolist()
