"""Checkpoints of random numbers, written tensor by tensor: true sizes without true memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import nn

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
BLOCK = 2**20  # numbers that are drawn once and written again and again


def write_random(path: Path, modules: list[nn.Module], dtype: torch.dtype, scale: float = 0.02) -> Path:
    """A safetensors file with all tensors of the modules (on the meta device), unless it is there already.

    Norms multiply by one, so that what goes in still shows in what comes out.
    """
    if path.exists():
        return path
    shapes = {name: tuple(tensor.shape) for module in modules for name, tensor in module.state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(scale).to(dtype)
    data, ones = (tensor.view(torch.uint8).numpy().tobytes() for tensor in (numbers, torch.ones_like(numbers)))
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            source = ones if is_norm(name) else data
            for begin in range(0, size, len(source)):
                file.write(source[: size - begin])
    partial.replace(path)
    return path


def is_norm(name: str) -> bool:
    layer, _, role = name.rpartition(".")
    return role == "gamma" or (role == "weight" and "norm" in layer.rpartition(".")[2])


def on_meta(make) -> nn.Module:
    with torch.device("meta"):
        return make()
