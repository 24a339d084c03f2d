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
OURS = "wanflow"  # what begins so is ours; of several, the one with just this name is compared
TOLERANCE = 1e-4  # relative error against ours, in fp32
CPU = torch.device("cpu")

Contestants = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Sample:
    cpu_seconds: float  # of this process, all threads
    seconds: float
    peak_mb: float  # growth of the device's memory over what it was before the call


@dataclass(frozen=True)
class Result:
    """Medians of one contestant in one workload."""

    library: str
    cpu_seconds: float
    seconds: float
    peak_mb: float
    error: float  # relative, against ours
    samples: list[dict]


@dataclass(frozen=True)
class Workload:
    """What was measured, and what was hoped for.

    floor: seconds that the arithmetic alone takes here (see floors.py); against: the libraries that ours is compared
    with, by default all that are not ours; time: "cpu_seconds" or "seconds"; figure: what is to be small, by default
    our time over that of the fastest other, else in `unit`; target, aim: what it has to be, and what would be fine.
    """

    name: str
    results: list[Result]
    floor: float | None = None
    target: float | None = None
    aim: float | None = None
    against: tuple[str, ...] = ()
    time: str = "cpu_seconds"
    figure: float | None = None
    unit: str = ""

    @property
    def ours(self) -> Result:
        return next(result for result in self.results if result.library == OURS)

    @property
    def others(self) -> list[Result]:
        if self.against:
            return [result for result in self.results if result.library in self.against]
        return [result for result in self.results if not result.library.startswith(OURS)]

    def best(self, measure: str) -> Result | None:
        return min(self.others, key=lambda result: getattr(result, measure), default=None)

    def ratio(self, result: Result, measure: str) -> float | None:
        """How much more of `measure` a contestant takes than the best of the others."""
        best = self.best(measure)
        return getattr(result, measure) / getattr(best, measure) if best and getattr(best, measure) > 0 else None

    @property
    def found(self) -> float | None:
        return self.ratio(self.ours, self.time) if self.figure is None else self.figure


def memory_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(function: Callable[[], object], device: torch.device = CPU) -> Sample:
    gc.collect()
    return (on_card if device.type == "cuda" else on_processor)(function)


def on_processor(function: Callable[[], object]) -> Sample:
    ctypes.CDLL(None).malloc_trim(0)  # what the last contestant freed must not serve this one
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, cpu, clock = memory_mb("VmRSS"), time.process_time(), time.perf_counter()
    function()
    return Sample(time.process_time() - cpu, time.perf_counter() - clock, memory_mb("VmHWM") - before)


def on_card(function: Callable[[], object]) -> Sample:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, cpu, clock = torch.cuda.memory_allocated(), time.process_time(), time.perf_counter()
    function()
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - clock, torch.cuda.max_memory_allocated()
    return Sample(time.process_time() - cpu, seconds, (peak - before) / 2**20)


def race(
    workload: str,
    contestants: Contestants,
    rounds: int,
    tolerance: float = TOLERANCE,
    gradients: bool = False,
    device: torch.device = CPU,
) -> list[Result]:
    """One unmeasured run each, whose results must agree, then `rounds` rounds in turn."""
    with torch.inference_mode(not gradients):
        outputs = {library: function() for library, function in contestants.items()}
        errors = {library: relative_error(out, outputs[OURS]) for library, out in outputs.items()}
        if not max(errors.values()) <= tolerance:
            raise SystemExit(f"{workload}: the results differ: {errors}. There is nothing to compare.")
        del outputs
        samples: dict[str, list[Sample]] = {library: [] for library in contestants}
        for _ in range(rounds):
            for library, function in contestants.items():
                samples[library].append(measure(function, device))
    return [summed_up(library, runs, errors[library]) for library, runs in samples.items()]


def relative_error(out: Tensor, wanted: Tensor) -> float:
    out, wanted = out.float().cpu(), wanted.float().cpu()
    return ((out - wanted).norm() / wanted.norm()).item()


def summed_up(library: str, samples: list[Sample], error: float) -> Result:
    medians = (statistics.median(getattr(s, name) for s in samples) for name in ("cpu_seconds", "seconds", "peak_mb"))
    return Result(library, *medians, error, [asdict(sample) for sample in samples])


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    wide = "AVX-512" if any("avx512f" in line for line in lines) else "AVX2 at most"
    return f"{model}, {wide}, {os.cpu_count()} threads"


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", HERE, *arguments], capture_output=True, text=True, check=True).stdout.strip()
