"""Tensors on disk that were expensive to make, under a name made of everything they follow from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import FileError
from ..saving import write_whole

SAMPLE = 64  # numbers from each end of a tensor that tell one model from another


def digest(*facts: object) -> str:
    """A name for these facts, which are what JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


def file_digest(file: Path) -> str:
    """The name of a file's content."""
    whole = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            whole.update(piece)
    return whole.hexdigest()


def module_digest(module: nn.Module) -> str:
    """The name of a network's weights: their names, shapes and types, and some numbers of each."""
    whole = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        numbers = tensor.detach().flatten()
        ends = torch.cat([numbers[:SAMPLE], numbers[-SAMPLE:]]).cpu().contiguous()
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        whole.update(ends.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:40]


@dataclass(frozen=True)
class Cache:
    folder: Path

    def __contains__(self, name: str) -> bool:
        return self.file(name).is_file()

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        """Raises FileError for one that is damaged."""
        with self._opened(name) as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}

    def __setitem__(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Complete or not at all. Raises FileError when the disk is full."""
        content = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
        write_whole({self.file(name): lambda file: file.write_bytes(content)})

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Of the tensors under a name, which stay on the disk."""
        with self._opened(name) as stored:
            return {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}

    def _opened(self, name: str) -> safetensors.safe_open:
        try:
            return safetensors.safe_open(self.file(name), "pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise FileError(
                f"{self.file(name)} in the cache cannot be read ({error}). Delete it and start again: what was in it "
                "is encoded anew."
            ) from error

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
