"""Loading a checkpoint of 2 GB: `python benchmarks/loading.py [--rounds N] [--folder FOLDER]`.

Every way runs in a process of its own: it loads, then reads a number of each page of memory, as a first run would. The
processes are copies of one that has imported everything and loaded a tiny model each way, so that only loading counts.
Writes results/loading.json (every sample) and results/loading.md (medians). The test files stay in FOLDER (4 GB, by
default in the system's temporary folder) and are used again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from comfyui_wanflow.wan_core.loading.keymaps import published_names
from comfyui_wanflow.wan_core.loading.load import load_model
from comfyui_wanflow.wan_core.loading.mapped import open_safetensors
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from contestants import randomise
from diffusers import WanTransformer3DModel
from measure import memory_mb
from run import machine
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).resolve().parent
LARGE = DiTLayout(dim=1536, ffn_dim=8960, layers=21, heads=12)  # of the 1.3B model's width: 2.0 GB in bf16
TINY = DiTLayout(dim=128, ffn_dim=128, layers=1, heads=1)
PAGE = 4096
COLUMNS = ("load_cpu", "touch_cpu", "load_seconds", "touch_seconds", "peak_mb", "anonymous_mb")


class Files:
    """The same weights under the published names and as a folder of diffusers."""

    def __init__(self, folder: Path, layout: DiTLayout):
        self.layout, self.published, self.diffusers = layout, folder / "published.safetensors", folder / "transformer"
        if not self.published.exists():
            self.write()

    def write(self) -> None:
        ours = DiT(self.layout)
        randomise(ours, seed=0)
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in ours.state_dict().items()}
        with torch.device("meta"):
            theirs = WanTransformer3DModel(
                num_attention_heads=self.layout.heads, ffn_dim=self.layout.ffn_dim, num_layers=self.layout.layers
            )
        self.diffusers.mkdir(parents=True, exist_ok=True)
        theirs.save_config(self.diffusers)
        names = {stored: name for name, stored in published_names(theirs.state_dict()).items()}
        stored = {name: weights[published] for name, published in names.items()}
        save_file(stored, self.diffusers / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        save_file(weights, self.published, {"format": "pt"})

    def forget(self) -> None:
        """Let the system drop what it remembers of them, so that the next reading comes from the disk."""
        for file in (self.published, *self.diffusers.iterdir()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------- the ways


def bare_mmap(files: Files) -> nn.Module:
    """The least that can be done: map the file, lay the tensors over it, assign them to an empty module."""
    with torch.device("meta"):
        module = DiT(files.layout)
    entries, _ = open_safetensors(files.published)
    module.load_state_dict({name: entry.read() for name, entry in entries.items()}, assign=True)
    return module


def wanflow(files: Files) -> nn.Module:
    return load_model(files.published, device="cpu").module


def wanflow_fp16(files: Files) -> nn.Module:
    """Another type than the file's: one tensor after the other."""
    return load_model(files.published, "fp16", device="cpu").module


def diffusers_folder(files: Files) -> nn.Module:
    return WanTransformer3DModel.from_pretrained(files.diffusers, torch_dtype=torch.bfloat16)


def diffusers_file(files: Files) -> nn.Module:
    return WanTransformer3DModel.from_single_file(
        str(files.published), config=str(files.diffusers), torch_dtype=torch.bfloat16, local_files_only=True
    )


WAYS: dict[str, Callable[[Files], nn.Module]] = {
    "bare mmap and assign": bare_mmap,
    "wanflow": wanflow,
    "wanflow, to fp16": wanflow_fp16,
    "diffusers from_pretrained": diffusers_folder,
    "diffusers from_single_file": diffusers_file,
}


def touch(module: nn.Module) -> None:
    for parameter in module.parameters():
        numbers = parameter.detach().view(-1)
        numbers[:: PAGE // numbers.element_size()].float().sum()


# ---------------------------------------------------------------- measuring


def run_way(way: Callable[[Files], nn.Module], files: Files) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    resident, anonymous = memory_mb("VmRSS"), memory_mb("RssAnon")
    begun = time.perf_counter(), time.process_time()
    module = way(files)
    loaded = time.perf_counter(), time.process_time()
    touch(module)
    touched = time.perf_counter(), time.process_time()
    return {
        "load_seconds": loaded[0] - begun[0],
        "load_cpu": loaded[1] - begun[1],
        "touch_seconds": touched[0] - loaded[0],
        "touch_cpu": touched[1] - loaded[1],
        "peak_mb": memory_mb("VmHWM") - resident,
        "anonymous_mb": memory_mb("RssAnon") - anonymous,
    }


def sample(way: Callable[[Files], nn.Module], files: Files) -> dict[str, float]:
    """What `run_way` finds in a copy of this process."""
    answer, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, json.dumps(run_way(way, files)).encode())
        os._exit(0)
    os.close(tell)
    with os.fdopen(answer) as told:
        text = told.read()
    os.waitpid(child, 0)
    return json.loads(text)


def measured(files: Files, rounds: int) -> dict[str, list[dict]]:
    """Samples of each way, in turn: one that reads from the disk, then `rounds` with the files in memory."""
    samples: dict[str, list[dict]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            if number == 0:
                files.forget()
            samples[name].append(sample(way, files))
            print(name, {column: round(value, 3) for column, value in samples[name][-1].items()}, flush=True)
    return samples


def markdown(facts: dict[str, str], samples: dict[str, list[dict]], size: float) -> str:
    lines = [
        ", ".join(f"{name} {value}" for name, value in facts.items()) + f". The file has {size:.0f} MB.",
        "",
        "| way | load CPU s | first touch CPU s | both | ratio to bare mmap | both, wall s | from the disk, wall s "
        "| peak memory MB | of the file | anonymous MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    middle = {
        name: {column: statistics.median(run[column] for run in runs[1:]) for column in COLUMNS}
        for name, runs in samples.items()
    }
    cpu = {name: values["load_cpu"] + values["touch_cpu"] for name, values in middle.items()}
    for name, values in middle.items():
        lines.append(
            f"| {name} | {values['load_cpu']:.3f} | {values['touch_cpu']:.3f} | {cpu[name]:.3f} "
            f"| {cpu[name] / cpu['bare mmap and assign']:.2f} | {wall(values):.2f} | {wall(samples[name][0]):.2f} "
            f"| {values['peak_mb']:.0f} | {values['peak_mb'] / size:.2f} | {values['anonymous_mb']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def wall(run: dict[str, float]) -> float:
    return run["load_seconds"] + run["touch_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wanflow-loading")
    arguments = parser.parse_args()
    tiny, large = Files(arguments.folder / "tiny", TINY), Files(arguments.folder, LARGE)
    for way in WAYS.values():
        touch(way(tiny))
    facts, size = machine(), large.published.stat().st_size / 2**20
    samples = measured(large, arguments.rounds)
    table = markdown(facts, samples, size)
    print(table)
    (HERE / "results" / "loading.md").write_text(table)
    kept = {"machine": facts, "layout": asdict(LARGE), "file_mb": size, "samples": samples}
    (HERE / "results" / "loading.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
