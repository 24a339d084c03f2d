"""Runs contestants in turn and measures each: processor seconds, time on the clock, growth of memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-4  # relative error against the first contestant, in fp32


@dataclass(frozen=True)
class Sample:
    cpu_seconds: float  # of this process, all threads
    seconds: float
    peak_mb: float  # growth of the resident set over what it was before the call


@dataclass(frozen=True)
class Result:
    """Medians of one contestant in one workload."""

    workload: str
    library: str
    cpu_seconds: float
    seconds: float
    peak_mb: float
    error: float  # relative, against ours
    samples: list[dict]


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(function: Callable[[], Tensor]) -> Sample:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the last contestant freed must not serve this one
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, cpu, clock = memory_mb("VmRSS"), time.process_time(), time.perf_counter()
    function()
    return Sample(time.process_time() - cpu, time.perf_counter() - clock, memory_mb("VmHWM") - before)


def race(
    workload: str,
    contestants: dict[str, Callable[[], Tensor]],
    rounds: int,
    tolerance: float = TOLERANCE,
    gradients: bool = False,
):
    """One unmeasured run each, whose results must agree, then `rounds` rounds in turn. -> a list of results."""
    with torch.inference_mode(not gradients):
        outputs = {library: function() for library, function in contestants.items()}
        wanted = outputs["wanflow"]
        errors = {library: ((out - wanted).norm() / wanted.norm()).item() for library, out in outputs.items()}
        if max(errors.values()) > tolerance:
            raise SystemExit(f"{workload}: the results differ: {errors}. There is nothing to compare.")
        del outputs, wanted
        samples: dict[str, list[Sample]] = {library: [] for library in contestants}
        for _ in range(rounds):
            for library, function in contestants.items():
                samples[library].append(measure(function))
    return [
        Result(
            workload, library,
            *(statistics.median(getattr(s, name) for s in runs) for name in ("cpu_seconds", "seconds", "peak_mb")),
            errors[library], [asdict(s) for s in runs],
        )
        for library, runs in samples.items()
    ]  # fmt: skip


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    wide = "AVX-512" if any("avx512f" in line for line in lines) else "AVX2 at most"
    return f"{model}, {wide}, {os.cpu_count()} threads"


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", HERE, *arguments], capture_output=True, text=True, check=True).stdout.strip()
