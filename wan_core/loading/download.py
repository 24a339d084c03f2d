"""Finds the files of a published model: in the folders users keep models in, and only then on ModelScope."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import FileError
from .catalog import Source
from .shards import complete

LOCAL = Path("models")  # ./models/<organisation>/<name>/, as ModelScope's own tools lay it out
OFFLINE = "WANFLOW_OFFLINE"
# File names that say nothing about the model inside; others may also lie directly in a model folder.
GENERIC = ("diffusion_pytorch_model", "pytorch_model", "model.")


def fetch(source: Source, folders: Iterable[Path] = ()) -> list[Path]:
    """The files of a source, complete. Searches `folders` and ./models first, and contacts nobody if they are there.

    A pattern that ends with "/" (or is empty) means a folder, which is returned as it is.
    Raises FileError if they are not found and may not or cannot be downloaded.
    """
    if found := find(source, folders):
        return found
    if os.environ.get(OFFLINE, "0") not in ("", "0"):
        raise FileError(
            f"{source} is not on this machine, and {OFFLINE} forbids downloads. Put it into "
            f"{LOCAL / source.model_id}, or into the folder {source.model_id} of one of your model folders."
        )
    _download(source)
    found = find(source)
    if not found:
        raise FileError(f"ModelScope's {source.model_id} has no files '{source.pattern}'. Check the name and pattern.")
    return found


def find(source: Source, folders: Iterable[Path] = ()) -> list[Path]:
    """The files of a source that are on this machine, in `folders` or ./models; empty unless all of them are."""
    name = source.model_id.split("/")[-1]
    for root in (*map(Path, folders), LOCAL):
        for folder in (root / source.model_id, root / name):
            if found := _matches(folder, source.pattern):
                return found
        if "*" not in source.pattern and not source.pattern.startswith(GENERIC):
            if found := _matches(root, source.pattern):
                return found
    return []


def _matches(folder: Path, pattern: str) -> list[Path]:
    if pattern == "" or pattern.endswith("/"):
        whole = folder / pattern
        return [whole] if whole.is_dir() and any(whole.iterdir()) else []
    found = sorted(folder.glob(pattern)) if folder.is_dir() else []
    try:
        return complete(found)
    except FileError:  # an interrupted download left some of the parts
        return []


def _download(source: Source) -> None:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise FileError(
            f"{source} is not on this machine, and downloading needs the package modelscope. "
            f"Install it with 'pip install modelscope', or put the files into {LOCAL / source.model_id}."
        ) from None
    whole_folder = source.pattern == "" or source.pattern.endswith("/")
    pattern = source.pattern + "*" if whole_folder else source.pattern
    try:
        snapshot_download(source.model_id, allow_file_pattern=pattern, local_dir=str(LOCAL / source.model_id))
    except Exception as error:  # the package raises many kinds, from the network's to its own
        raise FileError(
            f"Downloading {source} from ModelScope failed ({error}). Check the connection and the name, "
            f"or put the files into {LOCAL / source.model_id}."
        ) from error
