"""Writes safetensors files piece by piece: what a file will hold is known before its numbers are.

The format: github.com/huggingface/safetensors, "Format" (see mapped.py, which reads it).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..saving import write_whole
from .mapped import DTYPES
from .shards import INDEX_SUFFIX, write_index

CODES = {dtype: code for code, dtype in DTYPES.items() if code != "F8_E8M0"}


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together: their names with what they will be like, and their numbers when asked for."""

    outline: Mapping[str, Tensor]  # on torch's meta device
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.outline.values())


def in_shards(pieces: Iterable[Piece], largest: int | None) -> list[list[Piece]]:
    """The pieces in as many files as are needed for none to hold more than `largest` bytes, if pieces allow it."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if largest is not None and shards[-1] and size + piece.bytes > largest:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.bytes
    return shards


def shard_paths(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]


def write_shards(path: Path, shards: Sequence[Sequence[Piece]], metadata: Mapping[str, str]) -> list[Path]:
    """Write one file, or the parts of a set with their index; all of them appear at once. Returns their paths.

    Raises FileError where they cannot be written; then there is none of them.
    """
    paths = shard_paths(path, len(shards))
    writers = {file: partial(write_pieces, pieces, metadata) for file, pieces in zip(paths, shards, strict=True)}
    if len(paths) > 1:
        places = {
            name: file.name
            for file, pieces in zip(paths, shards, strict=True)
            for piece in pieces
            for name in piece.outline
        }
        size = sum(piece.bytes for pieces in shards for piece in pieces)
        writers[path.with_name(path.name + INDEX_SUFFIX)] = partial(write_index, weight_map=places, size=size)
    write_whole(writers)
    return list(writers)


def write_pieces(pieces: Iterable[Piece], metadata: Mapping[str, str], path: Path) -> None:
    """One file. Wide types come first, so that every tensor lies at a multiple of its numbers' size."""
    outlines = {name: tensor for piece in pieces for name, tensor in piece.outline.items()}
    header: dict = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in sorted(outlines.items(), key=lambda item: -item[1].itemsize):
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        file.truncate(begin + end)
        for piece in pieces:
            for name, tensor in piece.make().items():
                file.seek(begin + header[name]["data_offsets"][0])
                file.write(memoryview_of(tensor))


def memoryview_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, which numpy may have no type for."""
    flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if math.prod(flat.shape) else memoryview(b"")
