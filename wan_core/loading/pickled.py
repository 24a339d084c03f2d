"""Torch's own files (.pth, .pt, .ckpt, .bin): pickles, read so that only tensors and containers are ever built."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import FileError
from .keymaps import NESTINGS

PYTHONS_OWN = (b"\x80\x04", b"\x80\x05")  # how bare pickles begin; torch writes protocol 2, or a zip


def open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors by name, mapped where the file allows it.

    Raises FileError if the file asks to run code (which is not done), is damaged, or holds no named tensors.
    """
    with torch.inference_mode(False):
        weights = _unwrap(_unpickle(path))
    if not weights:
        raise FileError(f"{path} holds no tensors by name. Give a file with a model's state_dict.")
    return weights


def _unpickle(path: Path):
    # Not mapped: the bare pickles of old torch versions, and what torch would take for safetensors by its name.
    with path.open("rb") as file:
        beginning = file.read(2)
        mappable = beginning == b"PK" and path.suffix != ".safetensors"
        if beginning in PYTHONS_OWN:
            raise FileError(
                f"{path} is a pickle of Python objects, which may ask to run code, and not a checkpoint of torch. "
                "It was not read. Take the .safetensors file of the same model."
            )
        file.seek(0)
        return _guarded_load(path, str(path) if mappable else file, mappable)


def _guarded_load(path: Path, source: str | BinaryIO, mappable: bool):
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mappable)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError, AttributeError) as error:
        message = str(error)
        if wanted := re.search(r"GLOBAL ([\w.]+)|(TorchScript)", message):
            raise FileError(
                f"{path} is not a plain checkpoint: it asks to run code ({wanted[1] or wanted[2]}). It was not run. "
                "Take the .safetensors file of the same model, or save only the tensors of this one."
            ) from error
        if "allocate memory" in message:
            raise FileError(
                f"{path} is larger than the free memory, and a .pth file needs as much. "
                "Take the .safetensors file of the same model, or close other programs."
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
