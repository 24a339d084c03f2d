"""From noise to a video in a few steps: noise levels, and the solvers that walk down them.

The model was trained by flow matching: x = (1 - sigma) * clean + sigma * noise, and it predicts the velocity
noise - clean. A solver object lives for one run: `step(i, x, velocity)` takes x from sigmas[i] to sigmas[i + 1].
Levels and coefficients are Python floats (fp64), the state stays in the type of x. There is no hidden randomness: one
that needs new noise is told where to get it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from ..errors import InputError

Level = TypeVar("Level", float, Tensor)


def shifted(sigma: Level, shift: float) -> Level:
    """Spend more steps on high noise, which large videos need: shift * sigma / (1 + (shift - 1) * sigma).

    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206, 5.3.2.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise_levels(steps: int, shift: float, highest: float) -> list[float]:
    """steps + 1 falling levels: evenly from `highest` to 0, then shifted. `highest` is 1 for pure noise.

    For video-to-video all steps are run from a lower `highest` (DiffSynth-Studio's meaning of denoising strength;
    with shift 5 a strength of 0.7 starts at sigma 0.921).
    """
    return [shifted(highest * (1 - i / steps), shift) for i in range(steps)] + [0.0]


def read_timesteps(text: str) -> tuple[float, ...]:
    """Timesteps as a user writes them, such as "1000, 757, 522"; none for an empty text. Raises InputError."""
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise InputError(f"timesteps is {text!r}, but it has to be numbers, such as 1000, 757, 522.") from error


def check_part(first: str, start: float, last: str, end: float) -> None:
    """Raises InputError where the inputs `first` and `last` name no part of a run, 0 to 1."""
    if not 0 <= start < end <= 1:
        raise InputError(
            f"{first} is {start} and {last} is {end}, but {first} has to be before {last}, both within 0 and 1."
        )


class Euler:
    """The straight line along the velocity: first order, the default of DiffSynth-Studio."""

    highest = 1.0  # the level of a full run's first step

    def __init__(self, sigmas: list[float], noise: Callable[[int], Tensor] | None = None):
        self.sigmas = sigmas

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        return x + velocity * (self.sigmas[i + 1] - self.sigmas[i])


def log_signal_to_noise(sigma: float) -> float:
    """lambda, the time in which the multistep solvers are polynomial."""
    return math.log(1 - sigma) - math.log(sigma) if sigma < 1 else -math.inf


class DPMSolver:
    """DPM-Solver++ (2M), midpoint form: the clean video is extrapolated from this prediction and the one before.

    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", arXiv 2211.01095,
    algorithm 2. The last step, into sigma 0, is of first order, as in Wan's `fm_solvers.py`.
    """

    highest = 1.0

    def __init__(self, sigmas: list[float], noise: Callable[[int], Tensor] | None = None):
        self.sigmas = sigmas
        self.clean: list[Tensor] = []  # the clean videos predicted in the last two steps

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        self.remember(i, x, velocity)
        return self.predict(i, x)

    def remember(self, i: int, x: Tensor, velocity: Tensor) -> None:
        self.clean = [*self.clean[-1:], x - self.sigmas[i] * velocity]

    def predict(self, i: int, x: Tensor) -> Tensor:
        """x at sigmas[i] -> x at sigmas[i + 1]."""
        sigma, target = self.sigmas[i], self.sigmas[i + 1]
        clean = self.clean[-1]
        if 0 < i < len(self.sigmas) - 2:
            clean = clean + (clean - self.clean[-2]) * (0.5 * self.log_step(i + 1) / self.log_step(i))
        return x * (target / sigma) + clean * self.weight(i + 1)

    def log_step(self, i: int) -> float:
        """How far step i went in lambda."""
        return log_signal_to_noise(self.sigmas[i]) - log_signal_to_noise(self.sigmas[i - 1])

    def weight(self, i: int) -> float:
        """alpha_t * (1 - exp(-h)) for the step that arrives at level i, written so that sigma 0 is no exception."""
        sigma, target = self.sigmas[i - 1], self.sigmas[i]
        return (1 - target) - (1 - sigma) * target / sigma


class UniPC(DPMSolver):
    """UniPC of order 2, variant B2: the same prediction, then corrected with what the model says there.

    The correction costs no call of the model: the velocity at the predicted point is used for it and for the next
    step. Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
    arXiv 2302.04867; the official default for Wan 2.1 (`fm_solvers_unipc.py`).
    """

    highest = 0.999  # as in the official code: the corrector cannot count with lambda = -infinity

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        older = self.clean
        self.remember(i, x, velocity)
        if i > 0:
            x = self.correct(i, older)
        self.before = x
        return self.predict(i, x)

    def correct(self, i: int, older: list[Tensor]) -> Tensor:
        """Arrive at sigmas[i] once more from the x before, now that the clean video at the end is known too."""
        sigma, target = self.sigmas[i - 1], self.sigmas[i]
        start, end = older[-1], self.clean[-1]
        if len(older) == 1:
            clean = start + (end - start) * 0.5
        else:
            past, present = self.corrector_weights(i)
            clean = start + (older[-2] - start) * past + (end - start) * present
        return self.before * (target / sigma) + clean * self.weight(i)

    def corrector_weights(self, i: int) -> tuple[float, float]:
        """Weights of the older and the newest difference that satisfy the conditions of orders 1 and 2."""
        h = self.log_step(i)
        ratio = -self.log_step(i - 1) / h  # where the older point lies, when the step goes from 0 to 1
        scale = -math.expm1(-h)
        first = 1 / scale - 1 / h
        second = 1 / scale - 2 * first / h
        past = (first - second) / (1 - ratio)  # past + present = first; ratio * past + present = second
        return past / ratio, first - past


class LCM:
    """Jump to the clean video, then back to the next level with new noise: how distilled models were trained to walk.

    noise(i): for step i, as x. Luo et al., "Latent Consistency Models", arXiv 2310.04378, algorithm 3, for flows.
    """

    highest = 1.0

    def __init__(self, sigmas: list[float], noise: Callable[[int], Tensor]):
        self.sigmas, self.noise = sigmas, noise

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        clean, target = x - self.sigmas[i] * velocity, self.sigmas[i + 1]
        return clean if target == 0 else (1 - target) * clean + target * self.noise(i)


# What a user can choose.
SOLVERS = {"euler": Euler, "unipc": UniPC, "dpm++": DPMSolver, "lcm": LCM}
