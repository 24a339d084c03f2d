"""Opens checkpoints: names, shapes and types at once, each tensor as a view of the mapped file when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ..models.packed import Packed
from .gguf_files import open_gguf
from .keymaps import STACKED, bundled, published_names
from .mapped import Entry, open_safetensors, type_name
from .pickled import open_pickle
from .scales import fold_scales
from .shards import complete

# What people find under a checkpoint's name instead of it: the first bytes, and what to do.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights. Run 'git lfs pull', or download the file itself"),
    (b"<", "a web page, not the weights. Use the download link of the file, not the link of the page that shows it"),
    (b"{", "a JSON text, not the weights. Give the .safetensors or .pth file"),
)


class Checkpoint:
    """The tensors of one or several files, under the published names.

    `shapes` maps each name to its shape, `stored_names` to its name in the file, `metadata` is the text stored in the
    files, `description` names the files in messages.
    """

    def __init__(self, entries: Mapping[str, Entry], metadata: Mapping[str, str], files: list[Path]):
        self.description = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        self.stored_names = published_names(entries)
        named = {name: entries[stored] for name, stored in self.stored_names.items()}
        self._entries = _arranged(fold_scales(named, self.stored_names, metadata, self.description))
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.metadata = dict(metadata)
        self.files = files

    def part(self, belongs: Callable[[str], bool]) -> Checkpoint:
        """Only those tensors whose names belong."""
        part = copy(self)
        part.shapes = {name: shape for name, shape in self.shapes.items() if belongs(name)}
        return part

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def storage(self, name: str) -> str:
        """How the tensor is stored: the name of a type or a packing."""
        return self._entries[name].packing or type_name(self.dtype(name))

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, backed by the mapped file; the numbers in fp32 of what is stored packed."""
        stored = self.stored(name)
        return stored.numbers() if isinstance(stored, Packed) else stored

    def forget(self, name: str) -> None:
        """Give back the memory of a tensor that is not needed any more; it can be read again."""
        self._entries[name].forget()

    def stored(self, name: str) -> Tensor | Packed:
        """The tensor or packed weight, backed by the mapped file. Usable for training even inside inference mode."""
        with torch.inference_mode(False):
            return self._entries[name].read()


def open_checkpoint(paths: str | PathLike | Iterable[str | PathLike], kind: str = "") -> Checkpoint:
    """Open a checkpoint: a file, a list of parts, one part of a set, or its index.json.

    Of an all-in-one checkpoint, which holds several models, only the one of this kind (see identify.KINDS).
    Raises FileError in words for what is missing, empty, truncated, damaged, unsafe, or no checkpoint at all.
    """
    given = [paths] if isinstance(paths, (str, PathLike)) else list(paths)
    shards = complete(Path(path) for path in given)
    if not shards:
        raise FileError("No checkpoint file was given. Give a path, or a list of the parts of one checkpoint.")
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        found, texts = _open_file(shard.path)
        found = shard.taken(found)
        repeated = next((name for name in found if name in entries), None)
        if repeated:
            names = ", ".join(shard.path.name for shard in shards)
            raise FileError(
                f"{names} are not parts of one checkpoint: two of them hold the tensor '{repeated}'. "
                "Load them one at a time."
            )
        entries |= found
        metadata |= texts
    if prefix := bundled(entries).get(kind):
        entries = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
    return Checkpoint(entries, metadata, [shard.path for shard in shards])


def _open_file(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    if path.is_dir():
        raise FileError(f"{path} is a folder. Give one of the checkpoint files in it.")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise FileError(f"{path} is empty: its download never began. Download it again.")
    # The content decides, not the suffix: renamed files are common.
    if start.startswith(b"GGUF"):
        return open_gguf(path)
    if start[5:9] == b"\0\0\0{":  # a header length below a terabyte, then the header
        return open_safetensors(path)
    if start.startswith((b"PK", b"\x80")):
        return {name: _held(tensor) for name, tensor in open_pickle(path).items()}, {}
    for magic, what in IMPOSTORS:
        if start.lstrip().startswith(magic):
            raise FileError(f"{path} is {what}.")
    if path.suffix == ".safetensors":
        raise FileError(f"{path} is damaged: it does not begin with a safetensors header. Download it again.")
    raise FileError(f"{path} is not a checkpoint. WanFlow reads .safetensors, .gguf and .pth, .pt, .ckpt, .bin files.")


def _arranged(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Tensors that other layouts store in other shapes, as the marks at the end of their names say (see keymaps)."""
    arranged: dict[str, Entry] = {}
    stacks: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        if part := STACKED.match(name):
            stacks.setdefault(part["name"], {})[part["place"]] = entry
        elif name.endswith("[None]"):
            shape = (1,) * name.count("[None]") + entry.shape
            arranged[name.replace("[None]", "")] = Entry(shape, entry.dtype, partial(_reshaped, entry, shape))
        else:
            arranged[name] = entry
    for name, places in stacks.items():
        parts = [places[place] for place in sorted(places)]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        arranged[name] = Entry(shape, parts[0].dtype, partial(_stacked, parts))
    return arranged


def _reshaped(entry: Entry, shape: tuple[int, ...]) -> Tensor:
    return _numbers(entry).reshape(shape)


def _stacked(parts: list[Entry]) -> Tensor:
    return torch.cat([_numbers(part) for part in parts])


def _numbers(entry: Entry) -> Tensor:
    stored = entry.read()
    return stored.numbers() if isinstance(stored, Packed) else stored


def _held(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor)
