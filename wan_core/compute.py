"""Where to compute, and in which type: what the machine really does fast.

Importing this touches no GPU, and nothing here changes torch's settings: OMP_NUM_THREADS and the like stay the user's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from .errors import InputError

OVERRIDE = "WANFLOW_COMPUTE_DTYPE"
# Whether everything is computed in the most ordinary way, to see what a fast one does to a result: docs/fast_paths.md.
PLAIN = os.environ.get("WANFLOW_PLAIN", "0") not in ("", "0")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WORTHWHILE = 1.5  # bf16 costs accuracy, so on a CPU it has to be this much faster
PROBE_ROUNDS = 3


def default_device() -> torch.device:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """The type to compute in: bf16 on graphics cards; on a CPU fp32, unless a measurement shows that bf16 is fast.

    The environment variable WANFLOW_COMPUTE_DTYPE (float32, bfloat16, float16) decides instead if it is set.
    """
    if wish := os.environ.get(OVERRIDE):
        if wish not in DTYPES:
            raise InputError(f"{OVERRIDE} is {wish!r}. Set it to one of {', '.join(DTYPES)}, or remove it.")
        return DTYPES[wish]
    if torch.device(device).type != "cpu" or bf16_gain() >= WORTHWHILE:
        return torch.bfloat16
    return torch.float32


@functools.cache
def bf16_gain() -> float:
    """How many times faster bf16 is than fp32 on this CPU: measured once a machine, then read from the cache file."""
    path = cache_folder() / "bf16_gain.json"
    key = f"{processor()}, torch {torch.__version__}"
    known = read_json(path)
    if key not in known:
        known[key] = round(measure_bf16_gain(), 2)
        write_json(path, known)
    return known[key]


def measure_bf16_gain() -> float:
    """The time of one small transformer block in fp32 over that in bf16; takes about a second.

    Weights are stored in bf16 in both cases: fp32 pays for widening them, as it does in the models.
    """
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    square = torch.full((1024, 1024), 0.01, dtype=torch.bfloat16)
    wide = torch.full((4096, 1024), 0.01, dtype=torch.bfloat16)
    for _ in range(PROBE_ROUNDS):  # in turns, so that another program's load hits both
        for dtype in best:
            tokens = torch.ones(1, 256, 1024, dtype=dtype)
            start = time.perf_counter()
            # (1, 256, 1024) -> three of (1, 8, 256, 128)
            q, k, v = (F.linear(tokens, square.to(dtype)).unflatten(-1, (8, 128)).transpose(1, 2) for _ in range(3))
            tokens = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            hidden = F.gelu(F.linear(F.linear(tokens, square.to(dtype)), wide.to(dtype)), approximate="tanh")
            F.linear(hidden, wide.to(dtype).t())
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """The folder for what can be measured again, where each system keeps such things."""
    if base := os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA"):
        return Path(base) / "wanflow"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "wanflow"


def read_json(path: Path) -> dict[str, float]:
    try:
        content = json.loads(path.read_text())
        return {str(key): float(value) for key, value in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):  # absent or damaged: it is only a cache
        return {}


def write_json(path: Path, content: dict[str, float]) -> None:
    """All or nothing; a read-only home only means that the measurement is made again next time."""
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content))
        temporary.replace(path)


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """(total, free) bytes of a CUDA device, what torch keeps for later counted as free; None for others."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device; None where nobody tells: of main memory only Linux does."""
    if device.type != "cpu":
        memory = device_memory(device)
        return memory and memory[1]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None
