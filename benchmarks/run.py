"""Race WanFlow against its peers: `python benchmarks/run.py cpu`, `gpu`, `all`, or rows by their names (C3 G1 …).

    --rounds N    how often each contestant is measured (3)
    --toy         tiny networks, on the processor, nothing is kept: to see that the rows work
    --folder      where checkpoints are put, and used again

Each row runs in a process of its own, all of its contestants in that one, in turn. Writes results/cpu.json or gpu.json
(every sample), the tables beside them, and what README.md and docs/speed.md show of them (see report.py).
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import report
from measure import HERE, git, processor

SUITES = {"cpu": ("C1", "C2", "C2b", "C3", "C4", "C5", "C6", "C7", "C8", "C9"),
          "gpu": ("G1", "G2", "G3", "G4", "G5", "G6", "G7", "G8")}  # fmt: skip
SOURCES = "wan_core", "benchmarks"
# As on a processor without products in bf16: what was found out about this one is not asked for.
ENVIRONMENT = {"C2b": {"ONEDNN_MAX_CPU_ISA": "AVX2", "WANFLOW_COMPUTE_DTYPE": "float32"}}


def facts(device: str) -> dict[str, str]:
    """What one has to know to believe the numbers."""
    import contestants
    import torch
    from comfyui_wanflow.wan_core.compute import compute_dtype

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *(HERE.parent / name for name in SOURCES))
    found = {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "processor": processor(),
        "threads used": str(torch.get_num_threads()),
        "type chosen for bf16 weights": str(compute_dtype("cpu")).removeprefix("torch."),
    }
    if device == "cuda":
        found = {name: found[name] for name in ("date", "commit", "processor")}
        found |= {"card": torch.cuda.get_device_name(), "cuDNN": str(torch.backends.cudnn.version())}
    versions = {name: contestants.version(name) for name in contestants.present()}
    return found | {"load average": f"{os.getloadavg()[0]:.1f}", "torch": torch.__version__, **versions}


def measured(row: str, options: argparse.Namespace) -> dict:
    """In this process: a row's facts and workloads, or the reason why there are none."""
    import torch
    from setting import Setting

    suite = suite_of(row)
    if suite == "gpu" and not (options.toy or torch.cuda.is_available()):
        return {"skipped": "there is no CUDA card here"}
    device = "cuda" if suite == "gpu" and not options.toy else "cpu"
    setting = Setting(torch.device(device), options.rounds, options.toy, options.folder)
    workloads = importlib.import_module(suite).ROWS[row](setting)
    return {"facts": facts(device), "workloads": [asdict(workload) for workload in workloads]}


def suite_of(row: str) -> str:
    return next(suite for suite, rows in SUITES.items() if row in rows)


def in_a_process(row: str, options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "row.json"
        command = [sys.executable, str(HERE / "run.py"), row, "--into", str(into), "--rounds", str(options.rounds)]
        command += ["--folder", str(options.folder), *(["--toy"] if options.toy else [])]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT.get(row, {}))
        return json.loads(into.read_text()) if done.returncode == 0 else {"skipped": f"failed ({done.returncode})"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [row for suite in SUITES.values() for row in suite]
    parser.add_argument("rows", nargs="+", choices=["all", *SUITES, *rows], metavar="cpu|gpu|all|ROW")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "wanflow-benchmarks")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.into:
        options.into.write_text(json.dumps(measured(options.rows[0], options)))
        return
    for row in rows:
        if not {"all", suite_of(row), row} & set(options.rows):
            continue
        found = in_a_process(row, options)
        if "skipped" in found:
            print(f"{row} is left out: {found['skipped']}.", flush=True)
            continue
        print(report.table({row: found}), flush=True)
        if not options.toy:
            report.keep(suite_of(row), row, found)


if __name__ == "__main__":
    main()
