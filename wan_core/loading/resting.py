"""Weights that rest on disk in another type than their file's: in a second file, written once."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from ..compute import cache_folder
from ..offload.quantize import STORAGE
from .checkpoint import Checkpoint, open_checkpoint
from .convert import changes, convert
from .download import Library

WRITING = 1  # changes with what is written, so that older files are not taken for it


def on_disk(checkpoint: Checkpoint, weight_dtype: str, library: Library) -> Checkpoint:
    """The checkpoint with its weights in this type, mapped from a file; itself where they are in it already.

    Where the file is not there yet it is written, which is said through the library. Raises FileError where it cannot.
    """
    storage = STORAGE[weight_dtype]
    if not changes(checkpoint, storage):
        return checkpoint
    path = place_of(checkpoint, weight_dtype)
    if not path.exists():
        library.say(
            f"Writes {checkpoint.description} as {weight_dtype} to {path}, once, for weights to rest on disk in this "
            "type. It may be deleted at any time. With rest_on cpu nothing is written."
        )
        progress = cache(library.progress) if library.progress else None
        convert(checkpoint, storage, path, on_written=lambda done, total: progress and progress(total).update(done))
    found = open_checkpoint(path)
    found.files, found.description = checkpoint.files, checkpoint.description
    return found


def place_of(checkpoint: Checkpoint, weight_dtype: str) -> Path:
    """Where the converted file lies; another one as soon as the original changes."""
    facts = [str(WRITING), weight_dtype, *checkpoint.stored_names.values()]
    for file in checkpoint.files:
        state = file.stat()
        facts += [str(file.resolve()), str(state.st_size), str(state.st_mtime_ns)]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    return cache_folder() / "weights" / f"{checkpoint.files[0].stem}-{weight_dtype}-{key}.safetensors"
