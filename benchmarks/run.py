"""Race WanFlow against its peers on the CPU: `python benchmarks/run.py [dit|vae|training ...] [--rounds N]`.

Writes results/TABLE.json (every sample) and results/TABLE.md (medians and ratios).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
from dataclasses import asdict

import contestants
import torch
from comfyui_wanflow.wan_core.compute import compute_dtype
from measure import HERE, Result, git, processor, race
from training import training_table


def dit_table(rounds: int) -> list[Result]:
    """The 1.3B model's width, 1560 tokens (one 480 x 832 frame), 512 text tokens."""
    found = race("DiT, 2 layers, fp32", contestants.dit(2, (1, 60, 104), 512, torch.float32), rounds)
    # 16-bit weights: the peers compute in their type, WanFlow in the one that this processor is fast in
    narrow = contestants.dit(1, (1, 60, 104), 512, torch.bfloat16)
    return found + race("DiT, 1 layer, bf16 weights", narrow, rounds, tolerance=3e-2)


def vae_table(rounds: int) -> list[Result]:
    """The published width, fp32."""
    results = []
    for frames, size in ((5, 128), (1, 256)):
        encode, decode = contestants.vae(frames, size, size)
        results += race(f"VAE encode {frames} x {size} x {size}", encode, rounds)
        results += race(f"VAE decode {frames} x {size} x {size}", decode, rounds)
    return results


TABLES = {"dit": dit_table, "vae": vae_table, "training": training_table}


def machine() -> dict[str, str]:
    changed = git("status", "--porcelain", "--untracked-files=no", "--", HERE, HERE.parent / "wan_core" / "models")
    versions = {name: importlib.metadata.version(name) for name in contestants.LIBRARIES if contestants.installed(name)}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "processor": processor(),
        "threads used": str(torch.get_num_threads()),
        "type chosen for bf16 weights": str(compute_dtype("cpu")).removeprefix("torch."),
        "load average": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "torch": torch.__version__,
        **versions,
    }


def markdown(facts: dict[str, str], results: list[Result]) -> str:
    """A table of medians; ratios are against the fastest peer's (smallest, for memory)."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        "",
        "| workload | library | CPU s | ratio | wall s | peak memory MB | ratio | relative difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        peers = [r for r in results if r.workload == result.workload and r.library != "wanflow"]
        best = [min((getattr(r, name) for r in peers), default=float("nan")) for name in ("cpu_seconds", "peak_mb")]
        lines.append(
            f"| {result.workload} | {result.library} | {result.cpu_seconds:.2f} | {result.cpu_seconds / best[0]:.2f} "
            f"| {result.seconds:.2f} | {result.peak_mb:.0f} | {result.peak_mb / best[1]:.2f} | {result.error:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="dit|vae|training", help="which to run; all if none is named")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for name in arguments.tables or TABLES:
        results = TABLES[name](arguments.rounds)
        facts = machine()
        table = markdown(facts, results)
        print(table, flush=True)
        kept = {"machine": facts, "results": [asdict(result) for result in results]}
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.md").write_text(table)
        (folder / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
