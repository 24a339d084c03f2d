"""Which attention kernel serves a run: each is tried on the real device.

What a kernel's makers measured says little about this card, this driver and these versions, and one that answers
wrongly ruins videos without a word. So none is used before it gave right numbers here. `auto` takes the fastest of
those that are as exact as torch's own; `sage` computes in 8 bits, so that only its name chooses it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from .. import compute
from ..compute import cache_folder, read_json, write_json
from ..offload.recovery import is_shortage
from .attention import EXACT, FAILURES, SOURCES, Kernel, kernel, say_refused

DTYPES = (torch.bfloat16, torch.float16)  # that the kernels know
TOKENS, HEADS, HEAD_DIM = 8190, 12, 128  # a quarter of 81 frames of 832 x 480, in no kernel's whole tiles
SHARPNESS = 3.0  # of the queries: such scores single out some keys, as those of trained models do
ROWS = 64  # of the queries at either end are compared with the formula
ROUNDS, CALLS = 3, 3
WORTHWHILE = 1.05  # times as fast as torch's own choice, which most of the world has tried already
FAILED = float("inf")


def chosen(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that serves a run there whose `backend` is wished for. Never `auto`, nor one that does not work.

    Trials know the way forward alone, so that with gradients `auto` is torch's own.
    """
    if backend == "sdpa" or (backend == "auto" and torch.is_grad_enabled()) or compute.PLAIN:
        return "sdpa"
    if not has_kernels(device, dtype):
        if backend != "auto":
            say_refused(backend, f"does not know {str(dtype).removeprefix('torch.')} on {device.type}")
        return "sdpa"
    if backend == "auto":
        return fastest(device, dtype)
    return backend if is_right(backend, device, dtype) else "sdpa"


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there may be others than torch's own."""
    return device.type == "cuda" and dtype in DTYPES


@functools.cache
def is_right(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this kernel gives right numbers there. Tried once a process; what speaks against it is said."""
    far = error(kernel(name), *sample(device, dtype))
    if far > SOURCES[name].tolerance:
        say_refused(name, "does not work here" if far == FAILED else f"is {far:.0%} off the formula here")
    return far <= SOURCES[name].tolerance


@functools.cache
def fastest(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest exact kernel there: tried once for a device and its versions, then read from the cache file."""
    names = ["sdpa", *(name for name, source in SOURCES.items() if source.tolerance == EXACT and kernel(name))]
    if len(names) == 1:
        return "sdpa"
    path = cache_folder() / "attention.json"
    known, keys = read_json(path), {name: f"{machine(device)}, {dtype}, {name} {version(name)}" for name in names}
    if not known.keys() >= set(keys.values()):
        known |= {keys[name]: round(time, 3) for name, time in times(names, device, dtype).items()}
        write_json(path, known)
    found = {name: known[key] for name, key in keys.items()}
    best = min(found, key=found.get)
    best = best if found["sdpa"] >= WORTHWHILE * found[best] else "sdpa"
    told = ", ".join(f"{name} {time:.2f} ms" for name, time in found.items() if time < FAILED)
    logging.getLogger("WanFlow").info("Attention by %s: of those tried here, %s.", best, told)
    return best


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


def version(name: str) -> str:
    """Of the package that a kernel comes with; nothing where that is torch, or does not tell."""
    try:
        return importlib.metadata.version(SOURCES[name].package)
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return ""


def times(names: list[str], device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds that a call of each kernel takes there; FAILED for those that are not right."""
    data = sample(device, dtype)
    right = {name: kernel(name) for name in names if error(kernel(name), *data) <= EXACT}
    return dict.fromkeys(names, FAILED) | milliseconds(right, *data)


def sample(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, TOKENS, HEADS, HEAD_DIM), always the same."""
    shape, generator = (3, 1, TOKENS, HEADS, HEAD_DIM), torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(shape, device=device, dtype=dtype, generator=generator)
    return q.mul_(SHARPNESS), k, v


@torch.no_grad()
def error(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> float:
    """How far its answer lies from the formula's in fp32, as a part of that one's size; FAILED where there is none."""
    try:
        found = kernel(q, k, v)
    except FAILURES as failure:
        if is_shortage(failure):
            raise
        return FAILED
    if found.shape != q.shape:
        return FAILED
    ends = [*range(ROWS), *range(-ROWS, 0)]
    scores = torch.einsum("bnhd,bmhd->bhnm", q[:, ends].float(), k.float()) * q.shape[-1] ** -0.5
    meant = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.float())
    far = ((found[:, ends].float() - meant).norm() / meant.norm()).item()
    return far if far < FAILED else FAILED  # NaN is not


@torch.no_grad()
def milliseconds(kernels: Mapping[str, Kernel], q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """What a call of each takes at best. They were called before, so that none pays for its first time."""
    best = dict.fromkeys(kernels, FAILED)
    for _ in range(ROUNDS):  # in turns, so that another program's load hits all
        for name, call in kernels.items():
            wait(q.device)
            start = time.perf_counter()
            for _ in range(CALLS):
                call(q, k, v)
            wait(q.device)
            best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1000)
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
