"""Noise levels against recorded runs of the reference; every solver against diffusers and an exact solution."""

import math
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.sampling.schedules import SOLVERS, noise_levels, read_timesteps
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "data" / "golden" / "scheduler.safetensors"


def diffusers_twin(name, shift):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "solver_order": 2}
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "unipc":
        return UniPCMultistepScheduler(solver_type="bh2", lower_order_final=True, **flow)
    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=True, final_sigmas_type="zero", **flow
    )


def curved_velocity(x, sigma):
    """A smooth field that depends on place and level, to tell apart solvers that agree on straight lines."""
    return torch.sin(3 * x + 2 * sigma) + x * sigma


def run(solver, x, velocity=curved_velocity):
    for i, sigma in enumerate(solver.sigmas[:-1]):
        x = solver.step(i, x, velocity(x, sigma))
    return x


@pytest.mark.parametrize(
    "steps, strength, shift", [(50, 1.0, 5.0), (50, 0.7, 5.0), (40, 1.0, 3.0), (30, 1.0, 16.0), (4, 1.0, 5.0)]
)
def test_levels_equal_the_recorded_reference(steps, strength, shift):
    expected = load_file(GOLDEN)[f"sigmas_n{steps}_s{strength}_shift{shift}"]
    levels = noise_levels(steps, shift, strength)
    assert len(levels) == steps + 1 and levels[-1] == 0
    assert torch.allclose(torch.tensor(levels[:-1]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "unipc", "dpm++"])
@pytest.mark.parametrize("steps, shift", [(1, 5.0), (2, 1.0), (3, 5.0), (20, 5.0), (30, 16.0)])
def test_equals_diffusers(name, steps, shift):
    twin = diffusers_twin(name, shift)
    solver = SOLVERS[name](noise_levels(steps, shift, SOLVERS[name].highest))
    if name == "euler":
        twin.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        twin.set_timesteps(steps)
        twin.sigmas = torch.tensor(solver.sigmas, dtype=torch.float64)  # its own start a little lower
    assert torch.allclose(torch.tensor(solver.sigmas), twin.sigmas.float(), rtol=1e-6, atol=1e-6)

    x = expected = torch.randn(4, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i, timestep in enumerate(twin.timesteps):
        velocity = curved_velocity(expected, solver.sigmas[i])
        expected = twin.step(velocity, timestep, expected, return_dict=False)[0]
        x = solver.step(i, x, curved_velocity(x, solver.sigmas[i]))
        assert (x - expected).norm() / expected.norm() <= 1e-6, f"step {i}"


@pytest.mark.parametrize("sigmas", [noise_levels(4, 5.0, 1.0), [1.0, 0.757, 0.522, 0.0], [0.8, 0.0]])
def test_lcm_equals_diffusers(sigmas):
    """Its draws and ours, from generators with the same seed."""
    theirs, ours = (torch.Generator().manual_seed(3) for _ in range(2))
    twin = FlowMatchLCMScheduler(shift=1.0)
    twin.set_timesteps(sigmas=sigmas[:-1])
    x = expected = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    solver = SOLVERS["lcm"](sigmas, lambda i: torch.randn(x.shape, generator=ours))
    for i, timestep in enumerate(twin.timesteps):
        velocity = curved_velocity(expected, sigmas[i])
        expected = twin.step(velocity, timestep, expected, generator=theirs, return_dict=False)[0]
        x = solver.step(i, x, curved_velocity(x, sigmas[i]))
        assert (x - expected).norm() / expected.norm() <= 1e-6, f"step {i}"


@pytest.mark.parametrize(
    "text, numbers", [("", ()), ("1000, 757, 522", (1000, 757, 522)), ("1000 757.5", (1000, 757.5))]
)
def test_timesteps_as_users_write_them(text, numbers):
    assert read_timesteps(text) == numbers
    with pytest.raises(InputError, match="it has to be numbers, such as 1000, 757, 522"):
        read_timesteps("1000, fast")


def still(i):
    return torch.zeros(())


def gaussian(mean, spread):
    """The exact velocity towards N(mean, spread^2), and where its flow takes x from level sigma to 0.

    x = (1 - s) * clean + s * noise is Gaussian at every level, so E[noise - clean | x] is linear in x, and the flow
    keeps every x at the same number of standard deviations from the mean.
    """

    def deviation(sigma):
        return math.hypot((1 - sigma) * spread, sigma)

    def velocity(x, sigma):
        slope = (sigma - (1 - sigma) * spread**2) / deviation(sigma) ** 2
        return slope * (x - (1 - sigma) * mean) - mean

    def solution(x, sigma):
        return mean + spread * (x - (1 - sigma) * mean) / deviation(sigma)

    return velocity, solution


@pytest.mark.parametrize("name, order", [("euler", 1), ("dpm++", 2), ("unipc", 2)])
def test_converges_to_the_exact_flow_with_its_order(name, order):
    velocity, solution = gaussian(mean=0.7, spread=0.3)
    start = 0.95
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error(steps):
        return (run(SOLVERS[name](noise_levels(steps, 1.0, start)), x, velocity) - solution(x, start)).norm().item()

    assert error(100) < 3e-2 / order
    assert error(400) / error(800) > 0.8 * 2**order


def test_full_runs_start_where_the_official_code_starts():
    first = {name: noise_levels(50, 5.0, solver.highest)[0] for name, solver in SOLVERS.items()}
    assert first == {"euler": 1.0, "dpm++": 1.0, "lcm": 1.0, "unipc": pytest.approx(5 * 0.999 / (1 + 4 * 0.999))}


def test_the_solvers_are_different():
    x = torch.linspace(-2, 2, 9)
    ends = [run(solver(noise_levels(8, 5.0, 0.9), noise=still), x) for solver in SOLVERS.values()]
    assert all((a - b).abs().max() > 1e-3 for k, a in enumerate(ends) for b in ends[:k])


def test_the_state_stays_float32():
    for solver in SOLVERS.values():
        assert run(solver(noise_levels(3, 5.0, 0.999), noise=still), torch.ones(2)).dtype == torch.float32
