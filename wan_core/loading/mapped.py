"""Safetensors files as mapped memory: a tensor is a view of the file, paged in by the operating system when used.

The format (github.com/huggingface/safetensors, "Format"): eight bytes with the header's length, the header in JSON
(name -> dtype, shape, data_offsets), the data. The package of that name maps whole files as private memory, which a
system refuses for files larger than its memory; here nothing is set aside for copies, so that any file can be opened.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ..models.packed import Packed

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # exponents alone; torch has a type for them from 2.7 on
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes, the limit of the format
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not read yet.

    `packing` names how its numbers are packed, "" where they lie plainly. `forget` gives back the memory of its part of
    the file, which is read again if it is wanted again.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor | Packed]
    packing: str = ""
    forget: Callable[[], None] = lambda: None


def open_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a file. Raises FileError if it is truncated or damaged."""
    header, start = _header(path)
    metadata = header.pop("__metadata__", {})
    try:
        rows = {name: (row["dtype"], tuple(row["shape"]), *row["data_offsets"]) for name, row in header.items()}
        longest = max((end for _, _, _, end in rows.values()), default=0)
        consistent = all(_is_consistent(*row) for row in rows.values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path) from error
    _check_size(path, start + longest)
    if not consistent:
        raise _damaged(path)
    mapped = map_file(path)
    entries = {}
    for name, (stored_type, shape, begin, end) in rows.items():
        if stored_type not in DTYPES:
            raise FileError(
                f"{path} stores '{name}' as {stored_type}, which WanFlow cannot read. Take the bf16 or fp16 file."
            )
        dtype = DTYPES[stored_type]
        read = partial(view, mapped, start + begin, shape, dtype)
        entries[name] = Entry(shape, dtype, read, forget=partial(give_back, mapped, start + begin, start + end))
    return entries, metadata


def _header(path: Path) -> tuple[dict, int]:
    """The JSON header, and where the data begin."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > LONGEST_HEADER:
            raise _damaged(path)
        _check_size(path, 8 + length)
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _damaged(path) from error
    return header, 8 + length


def _is_consistent(stored_type: str, shape: tuple[int, ...], begin: int, end: int) -> bool:
    if min(begin, *shape, 0) < 0 or end < begin:
        return False
    return stored_type not in DTYPES or end - begin == math.prod(shape) * DTYPES[stored_type].itemsize


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size
    if size < expected:
        raise FileError(
            f"{path} is incomplete: it holds {size:,} of at least {expected:,} bytes. "
            "The download or the copy was interrupted; download it again."
        )


def _damaged(path: Path) -> FileError:
    return FileError(f"{path} is damaged: its safetensors header is not readable. Download it again.")


def map_file(path: Path) -> mmap.mmap:
    """The file as copy-on-write memory: a tensor may be written to, which changes neither file nor other readers."""
    with path.open("rb") as file:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flags = mmap.MAP_PRIVATE | (NO_RESERVE if sys.platform == "linux" else 0)
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def view(mapped: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over a part of the mapping, which lives as long as the tensor does."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(shape)


def give_back(mapped: mmap.mmap, begin: int, end: int) -> None:
    """Let the system have the memory of this part again, as far as it fills whole pages. Changes to it are lost."""
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)
