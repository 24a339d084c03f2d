"""What is copied, used and dropped together: a whole block, or a single layer beside the blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; every kernel's loads are satisfied with it
Form = tuple[tuple[int, torch.dtype, torch.Size], ...]  # of the copies: first byte, type, shape


@dataclass(frozen=True, eq=False)
class Place:
    """Where a module holds a parameter, and where its copy lies in the flat buffer of the unit."""

    layer: nn.Module
    name: str
    stored: nn.Parameter
    dtype: torch.dtype  # of copies
    offset: int  # bytes

    @property
    def bytes(self) -> int:
        return self.stored.numel() * self.dtype.itemsize


@dataclass(eq=False)
class Flat:
    """Memory in which a unit's copies lie one after the other, now of this unit, now of that."""

    bytes: Tensor  # uint8
    parts: dict[Form, list[nn.Parameter]] = field(default_factory=dict)

    def of(self, form: Form) -> list[nn.Parameter]:
        """The memory as parameters. Blocks are mostly alike, so that few have to be made."""
        if form not in self.parts:
            with torch.inference_mode(False):
                self.parts[form] = [
                    frozen(self.bytes[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape))
                    for begin, dtype, shape in form
                ]
        return self.parts[form]


@dataclass(eq=False)
class Unit:
    """The parameters that one module's call needs.

    copies: the resident ones, in the order of `places`; memory: what is stored, one after the other, in main memory,
    where the parameters themselves are parts of a file.
    """

    module: nn.Module
    is_block: bool
    places: tuple[Place, ...]
    copies: list[nn.Parameter] | None = None
    memory: Tensor | None = None

    @cached_property
    def bytes(self) -> int:
        return sum(place.bytes for place in self.places)

    @cached_property
    def span(self) -> int:
        """Bytes of a flat buffer for all copies."""
        return self.places[-1].offset + self.places[-1].bytes

    @property
    def parameter_count(self) -> int:
        return sum(place.stored.numel() for place in self.places)

    def copied(self, device: torch.device) -> list[nn.Parameter]:
        """Fresh copies, each in memory of its own."""
        with torch.inference_mode(False), torch.no_grad():
            return [frozen(place.stored.to(device, place.dtype)) for place in self.places]

    @cached_property
    def form(self) -> Form:
        return tuple((place.offset, place.dtype, place.stored.shape) for place in self.places)

    def pack(self, flat: Flat) -> None:
        """Write all copies into memory of at least `span` bytes."""
        with torch.no_grad():
            if self.memory is not None:
                flat.bytes[: self.span].copy_(self.memory)
            else:
                torch._foreach_copy_(flat.of(self.form), [place.stored for place in self.places])

    def remember(self) -> None:
        """Read the parameters into main memory, once."""
        if self.memory is None:
            with torch.inference_mode(False):
                flat = Flat(torch.empty(self.span, dtype=torch.uint8))
                self.pack(flat)
            self.memory = flat.bytes

    def put(self, copies: list[nn.Parameter]) -> None:
        """Let the layers compute with these."""
        for place, copy in zip(self.places, copies, strict=True):
            place.layer._parameters[place.name] = copy

    def restore(self) -> None:
        """Let the layers hold what is stored."""
        for place in self.places:
            place.layer._parameters[place.name] = place.stored


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def find_units(module: nn.Module, compute_dtype: torch.dtype | None) -> list[Unit]:
    """All of a network's parameters, in its order; what stands in a list (`nn.ModuleList`) is a block."""
    return list(_units_below(module, "", compute_dtype))


def _units_below(module: nn.Module, path: str, compute_dtype: torch.dtype | None) -> Iterator[Unit]:
    if own := _places({path: module}, compute_dtype):
        yield Unit(module, False, own)
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if not isinstance(module, nn.ModuleList):
            yield from _units_below(child, child_path, compute_dtype)
        elif places := _places(dict(child.named_modules(prefix=child_path)), compute_dtype):
            yield Unit(child, True, places)


def _places(layers: dict[str, nn.Module], compute_dtype: torch.dtype | None) -> tuple[Place, ...]:
    """The layers' own parameters, one after the other."""
    places, offset = [], 0
    for path, layer in layers.items():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                dtype = _copy_dtype(f"{path}.{name}", parameter, compute_dtype)
                places.append(Place(layer, name, parameter, dtype, offset))
                offset += -(-places[-1].bytes // ALIGNMENT) * ALIGNMENT
    return tuple(places)


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether this is the weight of a linear layer, a convolution or an embedding: nearly all of a model's bytes.

    Biases, norms and modulations are small, matter more, and keep the type that they are stored in.
    """
    return name.endswith("weight") and parameter.dim() >= 2 and parameter.is_floating_point()


def _copy_dtype(path: str, parameter: nn.Parameter, compute_dtype: torch.dtype | None) -> torch.dtype:
    if compute_dtype is None or not path.startswith(("blocks.", "vace_blocks.")) or not is_matrix(path, parameter):
        return parameter.dtype
    return min(parameter.dtype, compute_dtype, key=lambda dtype: dtype.itemsize)
