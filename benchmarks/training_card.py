"""Training on a graphics card at true sizes: seconds a step, and the memory that was taken and foretold.

`python benchmarks/training_card.py [--folder FOLDER]` trains models with random weights for some steps and writes
results/training_card.md; it needs 32 GB of disk. A card's memory is held to each case's limit by a cap on torch's
allocator. `--device cpu` runs the first case alone, as a toy, to see that the script works.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from comfyui_wanflow.nodes.host.standalone import host
from comfyui_wanflow.wan_core.loading.load import load_model
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.training.examples import Example
from comfyui_wanflow.wan_core.training.loop import train
from comfyui_wanflow.wan_core.training.memory import size, training_memory
from comfyui_wanflow.wan_core.training.settings import Settings
from comfyui_wanflow.wan_core.training.trainee import new_lora, whole
from measure import HERE, git
from random_weights import on_meta, write_random

LAYOUTS = {
    "toy": DiTLayout(dim=128, ffn_dim=256, layers=2, heads=1),
    "1.3B": DiTLayout(dim=1536, ffn_dim=8960, layers=30, heads=12),
    "14B": DiTLayout(dim=5120, ffn_dim=13824, layers=40, heads=40),
}


@dataclass(frozen=True)
class Case:
    model: str
    kind: str  # lora, or whole
    frames: int  # of latents, of 480 x 832
    weight_dtype: str = "auto"
    limit: int = 80  # GB
    optimizer: str = "adamw"
    offload: bool = False  # of activations

    @property
    def name(self) -> str:
        parts = [self.model, self.kind, f"{4 * (self.frames - 1) + 1} frames", self.weight_dtype, self.optimizer]
        return ", ".join([*parts, *(["activations in main memory"] if self.offload else []), f"{self.limit} GB"])


CASES = (
    Case("1.3B", "lora", 9),
    Case("1.3B", "lora", 21),
    Case("1.3B", "whole", 9),
    Case("14B", "lora", 9, "fp8_e4m3fn", 24),
    Case("14B", "lora", 21, "fp8_e4m3fn", 24, offload=True),
    Case("14B", "lora", 9, "auto", 24, "adamw8bit", offload=True),  # half of the weights travel
    Case("14B", "lora", 21),
)


class Clips(list):
    facts = "random"

    def __init__(self, shape: tuple[int, ...]):
        generator = torch.Generator().manual_seed(0)
        draw = [torch.randn(1, *tail, generator=generator) for tail in (shape, (60, 4096))]
        super().__init__([Example(*draw)])
        self.groups = [shape]

    def batch(self, indices, generators) -> Example:
        return self[0]


def run(case: Case, folder: Path, device: str, steps: int) -> str:
    layout = LAYOUTS[case.model]
    file = write_random(folder / f"{case.model}.safetensors", [on_meta(lambda: DiT(layout))], torch.bfloat16)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        share = case.limit * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    model = load_model(file, weight_dtype=case.weight_dtype, device=device)
    trainee = new_lora(model, 32) if case.kind == "lora" else whole(model)
    shape = (16, case.frames, 60, 104) if case.model != "toy" else (16, case.frames, 8, 8)
    settings = Settings(max_train_steps=steps, repeat=steps, optimizer=case.optimizer, offload_activations=case.offload)
    memory, times = training_memory(trainee, [shape], settings), [time.perf_counter()]
    with tempfile.TemporaryDirectory() as out, host.attached(trainee.model, memory.room):
        train(trainee, Clips(shape), settings, Path(out), lambda *facts: times.append(time.perf_counter()))
    seconds = median(end - begin for begin, end in zip(times[1:], times[2:], strict=False))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    resident = model.resident_bytes()
    return f"| {case.name} | {seconds:.2f} | {size(peak)} | {size(memory.room)} + {size(resident)} of weights |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="for the random checkpoints (default: a temporary one)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    cases = CASES if arguments.device == "cuda" else [replace(CASES[0], model="toy", frames=2)]
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "a processor"
    commit = git("rev-parse", "--short", "HEAD")
    lines = [f"{name}, torch {torch.__version__}, commit {commit}; 480 x 832, rank 32.", ""]
    lines += ["| training | seconds a step | peak memory | foretold |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        for case in cases:
            lines.append(run(case, arguments.folder or Path(temporary), arguments.device, arguments.steps))
            print(lines[-1], flush=True)
    if arguments.device == "cuda":
        (HERE / "results" / "training_card.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
