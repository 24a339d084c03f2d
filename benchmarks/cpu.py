"""The rows that a processor is enough for: C1 to C8 of the plan, and C9, a step of a LoRA's training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import contestants
import loading
import torch
import training
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.offload.residency import Residency
from floors import convolution_rate, dit_operations, product_rate, vae_operations
from measure import OURS, Contestants, Workload, race
from setting import Setting
from torch import Tensor

FP32, BF16 = torch.float32, torch.bfloat16
ELSEWHERE = torch.device("cpu:0")  # to torch another place than "cpu", so that weights travel there


def dit_row(setting: Setting, layers: int, dtype: torch.dtype, note: str, target: float, aim: float) -> list[Workload]:
    layout, grid = setting.layout("1.3B", layers), setting.grid(17, 256, 384)
    tokens = grid[0] * grid[1] * grid[2] // 4
    given = contestants.inputs(grid)
    racing = contestants.dits(contestants.random_dit(layout, dtype), given)
    name = f"DiT, {layers} of 30 layers, {tokens} tokens, {note}"
    results = race(name, racing, setting.rounds, tolerance=1e-4 if dtype == FP32 else 3e-2)
    floor = dit_operations(layout, tokens) / product_rate(setting, FP32, dtype)
    return [Workload(name, results, floor, target, aim)]


def c1(setting: Setting) -> list[Workload]:
    return dit_row(setting, 2, FP32, "fp32", target=1.00, aim=0.88)


def c2(setting: Setting) -> list[Workload]:
    return dit_row(setting, 1, BF16, "weights in bf16", target=0.30, aim=0.18)


def c2_without_bf16(setting: Setting) -> list[Workload]:
    """ComfyUI widens weights there as we do; the targets are for those that do not."""
    [found] = dit_row(setting, 1, BF16, "weights in bf16, a processor without", target=1.00, aim=0.88)
    name, narrow = f"{found.name}, against those that multiply in bf16", ("diffusers", "diffsynth")
    return [found, replace(found, name=name, against=narrow, target=0.30, aim=0.18)]


def vae_row(setting: Setting, name: str, racing: Contestants, operations: int, target: float, aim: float) -> Workload:
    results = race(name, racing, setting.rounds)
    return Workload(name, results, operations / convolution_rate(setting, FP32), target, aim)


def c3(setting: Setting) -> list[Workload]:
    coders = contestants.vaes(setting.vae_width)
    found = []
    for size in ((5, 128, 128), (9, 128, 128)):
        frames, height, width = setting.clip(*size)
        latents = random(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        racing = {library: partial(coder.decode, latents) for library, coder in coders.items()}
        _, operations = vae_operations(frames, height, width, setting.vae_width)
        name = f"VAE decode {frames} x {height} x {width}, fp32"
        found.append(vae_row(setting, name, racing, operations, target=0.75, aim=0.60))
    return found


def c4(setting: Setting) -> list[Workload]:
    frames, height, width = setting.clip(9, 128, 128)
    pixels = random(1, 3, frames, height, width).clamp(-1, 1)
    coders = contestants.vaes(setting.vae_width)
    racing = {library: partial(coder.encode, pixels) for library, coder in coders.items()}
    operations, _ = vae_operations(frames, height, width, setting.vae_width)
    name = f"VAE encode {frames} x {height} x {width}, fp32"
    return [vae_row(setting, name, racing, operations, target=0.90, aim=0.65)]


def c5(setting: Setting) -> list[Workload]:
    _, height, width = setting.clip(1, 256, 256)
    pixels = random(1, 3, 1, height, width).clamp(-1, 1)
    coders = contestants.vaes(setting.vae_width)
    racing = {library: partial(there_and_back, coder, pixels) for library, coder in coders.items()}
    operations = sum(vae_operations(1, height, width, setting.vae_width))
    name = f"VAE, an image of {height} x {width} there and back, fp32"
    return [vae_row(setting, name, racing, operations, target=0.50, aim=0.35)]


def there_and_back(coder: contestants.Coder, pixels: Tensor) -> Tensor:
    return coder.decode(coder.encode(pixels))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def c8(setting: Setting) -> list[Workload]:
    """Tiny blocks that all travel, against the same that lie where they are used.

    They hand on what they are given: what they would compute is a hundred times the bookkeeping, and varies by as much.
    """
    blocks, passes = 40, 20
    network = contestants.random_dit(DiTLayout(dim=16, ffn_dim=16, layers=blocks, heads=1, text_dim=16))
    for block in network.blocks:
        block.forward = lambda x, step: x
    given = contestants.Inputs(random(1, 16, 1, 2, 2), torch.tensor([500.0]), random(1, 4, 16))
    swapped = Residency(network, rest_on="cpu")
    swapped.ensure(0, ELSEWHERE)

    def forwards() -> Tensor:
        return torch.stack([network(*given) for _ in range(passes)])

    def travelling() -> Tensor:
        with swapped.attached(ELSEWHERE):
            return forwards()

    name, still = f"Offload, bookkeeping for {blocks} tiny blocks", f"{OURS}, all weights in place"
    results = race(name, {OURS: travelling, still: forwards}, 4 * setting.rounds)
    overhead = (results[0].cpu_seconds - results[1].cpu_seconds) / passes / blocks
    return [Workload(name, results, target=50, aim=20, against=(still,), figure=1e6 * overhead, unit="µs a block")]


Row = Callable[[Setting], list[Workload]]
ROWS: dict[str, Row] = {
    "C1": c1, "C2": c2, "C2b": c2_without_bf16, "C3": c3, "C4": c4, "C5": c5, "C6": loading.c6, "C7": loading.c7,
    "C8": c8, "C9": training.c9,
}  # fmt: skip
