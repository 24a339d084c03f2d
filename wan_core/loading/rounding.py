"""Weights in the type that the user chose, and what the choice cost."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..models.packed import Packed, PackedLinear
from ..models.packings import unpack_scaled
from ..offload.quantize import Storage, narrowed, relative_error, sampled
from ..offload.units import is_matrix


def kept(name: str, stored: Tensor | Packed, storage: Storage, narrow: Collection[str]) -> Tensor | Packed:
    """What is in a file, as `storage` keeps it; `narrow` names what scales are for (see `quantize.matrices`)."""
    if storage.dtype is None or (storage.scales and name not in narrow):
        return stored
    if storage.scales:
        return stored if is_in(stored, storage.dtype) else rounded(stored, storage)
    if isinstance(stored, Packed):
        return stored.numbers(storage.dtype)
    cast = is_matrix(name, stored) or (storage.is_narrow and stored.is_floating_point())
    return stored.to(storage.dtype) if cast else stored


def is_in(stored: Tensor | Packed, dtype: torch.dtype) -> bool:
    """Whether this is in the type already, with or without scales. Rounded again it could only become worse."""
    if isinstance(stored, Packed):
        return stored.unpack is unpack_scaled and stored.parts["weight"].dtype == dtype
    return stored.dtype == dtype


def rounded(stored: Tensor | Packed, storage: Storage) -> Packed:
    numbers = stored.numbers() if isinstance(stored, Packed) else stored
    parts = narrowed(numbers, storage.dtype, storage.scales)
    if numbers.is_meta:
        return Packed(tuple(numbers.shape), parts, unpack_scaled)
    some = sampled(len(numbers))
    found = unpack_scaled({name: part[some] if part.ndim else part for name, part in parts.items()}, torch.float32)
    return Packed(tuple(numbers.shape), parts, unpack_scaled, relative_error(found, numbers[some]))


def rounding_errors(module: nn.Module) -> dict[str, float]:
    """Layer -> by how much of its size its weight changed when it was rounded while loading."""
    layers = ((path, layer.error) for path, layer in module.named_modules() if isinstance(layer, PackedLinear))
    return {path: error for path, error in layers if error is not None}


def rounding_note(module: nn.Module, name: str) -> str:
    """One line for the user on what was rounded while loading, "" where nothing was."""
    errors = rounding_errors(module)
    if not errors:
        return ""
    mean, worst = sum(errors.values()) / len(errors), max(errors, key=errors.get)
    return (
        f"{name}: {len(errors)} matrices were rounded to eight bits, which changed them by {mean:.2%} on average and "
        f"by {errors[worst]:.2%} at most ({worst})."
    )
