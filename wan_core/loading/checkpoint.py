"""Reads checkpoints lazily: names, shapes and types at once, each tensor as a view of the mapped file when asked.

Nothing is copied into memory: the operating system pages weights in as they are used, and drops them again.
Pickles are read with torch's restricted loader; one that wants to run code is refused unread.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FileError
from .keymaps import NESTINGS, published_names
from .shards import complete

SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format

# What people find under a checkpoint's name instead of it: the first bytes, and what to do.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights. Run 'git lfs pull', or download the file itself"),
    (b"<", "a web page, not the weights. Use the download link of the file, not the link of the page that shows it"),
    (b"{", "a JSON text, not the weights. Give the .safetensors or .pth file"),
    (b"GGUF", "a GGUF file, which WanFlow cannot read yet. Take the .safetensors file of the same model"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Checkpoint:
    """The tensors of one or several files, under the published names.

    `shapes` maps each name to its shape, `metadata` is the text stored in the files, `description` names them for
    messages.
    """

    def __init__(self, entries: Mapping[str, Entry], metadata: Mapping[str, str], files: list[Path]):
        self._entries = {name: entries[stored] for name, stored in published_names(entries).items()}
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.metadata = dict(metadata)
        self.files = files
        self.description = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, backed by the mapped file. Usable for training even inside inference mode."""
        with torch.inference_mode(False):
            return self._entries[name].read()


def open_checkpoint(paths: str | PathLike | Iterable[str | PathLike]) -> Checkpoint:
    """Open a checkpoint: a file, a list of parts, one part of a set, or its index.json.

    Raises FileError in words for what is missing, empty, truncated, corrupt, unsafe, or no checkpoint at all.
    """
    given = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
    files = complete(Path(path) for path in given)
    if not files:
        raise FileError("No checkpoint file was given. Give a path, or a list of the parts of one checkpoint.")
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for path in files:
        found, texts = _open_file(path)
        repeated = next((name for name in found if name in entries), None)
        if repeated:
            names = ", ".join(file.name for file in files)
            raise FileError(
                f"{names} are not parts of one checkpoint: both hold the tensor '{repeated}'. Load them one at a time."
            )
        entries |= found
        metadata |= texts
    return Checkpoint(entries, metadata, files)


def _open_file(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    if path.is_dir():
        raise FileError(f"{path} is a folder. Give one of the checkpoint files in it.")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise FileError(f"{path} is empty: its download never began. Download it again.")
    # The content decides, not the suffix: renamed files are common.
    if start[5:9] == b"\0\0\0{":  # a header length below a terabyte, then the header
        return _open_safetensors(path)
    if start.startswith((b"PK", b"\x80")):
        return _open_pickle(path), {}
    for magic, what in IMPOSTORS:
        if start.lstrip().startswith(magic):
            raise FileError(f"{path} is {what}.")
    if path.suffix == ".safetensors" or len(start) < 9:
        raise FileError(f"{path} is damaged: it does not begin with a safetensors header. Download it again.")
    raise FileError(f"{path} is not a checkpoint. WanFlow reads .safetensors files and .pth, .pt, .ckpt, .bin pickles.")


def _open_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    header = _safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    try:
        file = safe_open(path, framework="pt")  # keeps the file mapped as long as an entry or a tensor lives
    except SafetensorError as error:
        raise FileError(f"{path} is damaged ({error}). Download it again.") from error
    entries = {}
    for name, row in header.items():
        if row["dtype"] not in SAFETENSORS_TYPES:
            raise FileError(
                f"{path} stores '{name}' as {row['dtype']}, which WanFlow cannot read. Take the bf16 or fp16 file."
            )
        entries[name] = Entry(tuple(row["shape"]), SAFETENSORS_TYPES[row["dtype"]], partial(file.get_tensor, name))
    return entries, metadata


def _safetensors_header(path: Path) -> dict:
    """The JSON header: name -> {dtype, shape, data_offsets}. The file's size is checked against it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > LARGEST_HEADER:
            raise FileError(f"{path} is damaged: it does not begin with a safetensors header. Download it again.")
        text = file.read(length)
    if len(text) < length:
        raise _truncated(path, size, 8 + length)
    try:
        header = json.loads(text)
        ends = [row["data_offsets"][1] for name, row in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise FileError(f"{path} is damaged: its safetensors header is not readable. Download it again.") from error
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise _truncated(path, size, expected)
    return header


def _truncated(path: Path, size: int, expected: int) -> FileError:
    return FileError(
        f"{path} is incomplete: it holds {size:,} of at least {expected:,} bytes. "
        "The download or the copy was interrupted; download it again."
    )


def _open_pickle(path: Path) -> dict[str, Entry]:
    with torch.inference_mode(False):
        weights = _unwrap(_unpickle(path))
    if not weights:
        raise FileError(f"{path} holds no tensors by name. Give a file with a model's state_dict.")
    return {name: Entry(tuple(t.shape), t.dtype, lambda tensor=t: tensor) for name, t in weights.items()}


def _unpickle(path: Path):
    """The object in a .pth file; only tensors and plain containers are ever built."""
    is_zip = path.open("rb").read(2) == b"PK"  # older files have no zip around the pickle and cannot be mapped
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        wanted = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", str(error))
        if wanted:
            raise FileError(
                f"{path} is not a plain checkpoint: it asks to run code ({wanted[1] or wanted[2]}). It was not run. "
                "Take the .safetensors file of the same model, or save only the tensors of this one."
            ) from error
        raise FileError(
            f"{path} is damaged or incomplete and cannot be read as a torch file. Download it again."
        ) from error


def _unwrap(saved) -> dict[str, Tensor]:
    """The state_dict inside what a training program saved."""
    if not isinstance(saved, Mapping):
        return {}
    for key in NESTINGS:
        if isinstance(saved.get(key), Mapping):
            return _unwrap(saved[key])
    return {name: value for name, value in saved.items() if isinstance(name, str) and isinstance(value, Tensor)}
