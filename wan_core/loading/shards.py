"""Which files make up one checkpoint: a single file, all parts of a set, or what an index lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TypeVar

from ..errors import FileError

WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
INDEX_SUFFIX = ".index.json"
PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A file of a checkpoint. Of one that an `index` lists, the checkpoint has only the tensors of these `names`: other
    checkpoints may share the file, and have others of it."""

    path: Path
    index: Path | None = None
    names: frozenset[str] = frozenset()

    def taken(self, found: Mapping[str, T]) -> Mapping[str, T]:
        """Of what was found in the file, by name, what belongs to the checkpoint.

        Raises FileError where something of it is not there.
        """
        if self.index is None:
            return found
        if lacking := sorted(self.names - found.keys()):
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise FileError(
                f"{self.index} says that {self.path} holds the tensor '{lacking[0]}'{more}, which it does not. "
                "The two are not of one download: take both from the same place."
            )
        return {name: value for name, value in found.items() if name in self.names}


def complete(paths: Iterable[Path]) -> list[Shard]:
    """The whole set that these files belong to: one part of five stands for all five, an index for what it lists.

    Raises FileError when a part or a file is missing.
    """
    shards: dict[Path, Shard] = {}  # ordered, each once
    for path in map(Path, paths):
        if not path.exists():
            raise FileError(f"There is no file {path}. Check the path, or download the file again.")
        shards |= {shard.path: shard for shard in _whole_set(path)}
    missing = [shard for shard in shards.values() if not shard.path.exists()]
    if missing:
        whole = missing[0].index or "This checkpoint"
        places = ", ".join(str(shard.path) for shard in missing)
        raise FileError(
            f"{whole} has {len(shards)} parts, of which {len(missing)} {'is' if len(missing) == 1 else 'are'} missing: "
            f"{places}. Download the missing parts to where they are looked for."
        )
    return list(shards.values())


def _whole_set(path: Path) -> list[Shard]:
    if path.name.endswith(INDEX_SUFFIX):
        return _listed(path)
    part = PART.match(path.name)
    if not part:
        return [Shard(path)]
    count = int(part["count"])
    names = (f"{part['stem']}-{i:05d}-of-{count:05d}{part['suffix']}" for i in range(1, count + 1))
    return [Shard(path.with_name(name)) for name in names]


def _listed(index: Path) -> list[Shard]:
    """What an index lists, its own folder's files first."""
    files: dict[str, set[str]] = {}
    try:
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(file, set()).add(name)
        fixed = [file for file in files if PureWindowsPath(file).anchor]  # also of a path that begins with "/"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{index} is not a checkpoint index: it must be JSON with a 'weight_map' of tensor names to files. "
            "Give the .safetensors files themselves, or download the index again."
        ) from error
    if fixed:
        raise FileError(
            f"{index} lists {fixed[0]}, which is a place on somebody's machine. The files of an index are found from "
            "its own folder, such as part.safetensors or ../shared.safetensors. Give the files themselves."
        )
    order = sorted(files, key=lambda file: ("/" in file, file))
    return [Shard(index.parent / file, index, frozenset(files[file])) for file in order]


def write_index(index: Path, weight_map: Mapping[str, str], size: int) -> None:
    """weight_map: the names of tensors to files, from the index's folder; size: of all the tensors, in bytes."""
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
    index.write_text(text, encoding="utf-8")


def group(folder: Path) -> list[list[Path]]:
    """The checkpoints directly inside a folder, each as its list of files, in the order of their names.

    An index stands for the files that it lists.
    """
    groups: dict[str, list[Path]] = {}
    listed: set[Path] = set()
    for path in sorted(folder.iterdir()):
        if path.name.endswith(INDEX_SUFFIX):
            groups[path.name] = [path]
            listed |= _files_of(path)
        elif path.is_file() and path.suffix in WEIGHT_SUFFIXES:
            part = PART.match(path.name)
            groups.setdefault(part["stem"] if part else path.name, []).append(path)
    return [files for files in groups.values() if not listed.issuperset(files)]


def _files_of(index: Path) -> set[Path]:
    try:
        return {shard.path for shard in _listed(index)}
    except FileError:  # said when it is opened
        return set()
