"""The machine that this runs on, as far as it can be asked, and how fast it is, measured in a moment."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from ..compute import compute_dtype, default_device, device_memory, processor
from .machines import BASE, GEN4, GIB, Machine

USED = 0.75  # of the rate of one large product is what a whole network reaches
SIDES = {"cuda": 8192, "cpu": 1536}  # of the product that is timed
COPIED = 2**28  # bytes that are copied to the card
ROUNDS = 3
UNKNOWN_RAM = 32 * GIB
KERNELS = 40 * 2**20  # bytes of code that a run loads when it first computes


def this_machine(device: torch.device | str | None = None, held: int = 0) -> Machine:
    """device: that models run on, by default the fastest; held: bytes on it that do not count as taken."""
    device = torch.device(device or default_device())
    memory, ram = device_memory(device), main_memory() or UNKNOWN_RAM
    rate = measured_rate(device)
    if memory is None:
        return Machine(processor(), None, ram, rate, base=own_memory() + KERNELS)
    total, free = memory
    name = torch.cuda.get_device_name(device)
    return Machine(name, total, ram, rate, measured_bus(device), taken=total - free - held, base=own_memory() + KERNELS)


def main_memory() -> int | None:
    """Bytes of this machine's memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def own_memory() -> int:
    """Bytes of main memory that this process takes now."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return BASE


def measured_rate(device: torch.device) -> float:
    """Products and sums a second that a network reaches on the device."""
    side, dtype = SIDES.get(device.type, SIDES["cuda"]), compute_dtype(device)
    square = torch.ones(side, side, device=device, dtype=dtype)
    return USED * 2 * side**3 / fastest(lambda: square @ square, device)


def measured_bus(device: torch.device) -> float:
    """Bytes a second from pinned memory to the device."""
    if device.type != "cuda":
        return GEN4
    here = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPIED, dtype=torch.uint8, device=device)
    return COPIED / fastest(lambda: there.copy_(here, non_blocking=True), device)


def fastest(work, device: torch.device) -> float:
    """Seconds of the fastest of some rounds, after one that does not count."""
    best = float("inf")
    for _ in range(1 + ROUNDS):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
