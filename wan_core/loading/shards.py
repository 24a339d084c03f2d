"""Which files make up one checkpoint: a single file, all parts of a set, or what an index lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import FileError

WEIGHT_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin", ".gguf")
INDEX_SUFFIX = ".index.json"
PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")


def complete(paths: Iterable[Path]) -> list[Path]:
    """The whole set that these files belong to: one part of five stands for all five.

    Raises FileError when a part or a file is missing.
    """
    files: dict[Path, None] = {}  # ordered, each once
    for path in map(Path, paths):
        if not path.exists():
            raise FileError(f"There is no file {path}. Check the path, or download the file again.")
        files.update(dict.fromkeys(_whole_set(path)))
    missing = [path for path in files if not path.exists()]
    if missing:
        names = ", ".join(path.name for path in missing)
        raise FileError(
            f"{missing[0].parent} holds {len(files) - len(missing)} of the {len(files)} parts of this checkpoint; "
            f"missing: {names}. Download the missing parts into that folder."
        )
    return list(files)


def _whole_set(path: Path) -> list[Path]:
    if path.name.endswith(INDEX_SUFFIX):
        return _listed(path)
    part = PART.match(path.name)
    if not part:
        return [path]
    count = int(part["count"])
    return [path.with_name(f"{part['stem']}-{i:05d}-of-{count:05d}{part['suffix']}") for i in range(1, count + 1)]


def _listed(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [index.parent / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{index} is not a checkpoint index: it must be JSON with a 'weight_map' of tensor names to files. "
            "Give the .safetensors files themselves, or download the index again."
        ) from error


def group(folder: Path) -> list[list[Path]]:
    """The checkpoints directly inside a folder, each as its list of files, in the order of their names."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in WEIGHT_SUFFIXES:
            part = PART.match(path.name)
            groups.setdefault(part["stem"] if part else path.name, []).append(path)
    return list(groups.values())
