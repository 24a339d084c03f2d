"""Layers whose weight stays as its file packs it, in fewer bits than are computed with.

Each call unpacks the weight, uses the numbers and drops them, so that memory holds the packed form alone. The parts of
a packed weight (its bits and their scales) are ordinary parameters: they move between devices as all others do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import fp8
from .layers import Embedding, Linear, linear, rows_at, widened
from .packings import unpack_scaled

Unpack = Callable[[Mapping[str, Tensor], torch.dtype], Tensor]

# Packed bytes that are unpacked at once. What arises on the way is up to 30 times as large: on a CPU it stays in the
# cache (twice as fast for the K types), elsewhere a little of the memory buys few calls.
PIECE_ON_CPU, PIECE = 2**20, 2**24
FLOATS_OF_8_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


def unpack_by_pieces(unpack: Unpack, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """`unpack(parts, dtype)`, some rows at a time."""
    weight = parts["weight"]
    rows, piece = weight.shape[0], PIECE_ON_CPU if weight.device.type == "cpu" else PIECE
    step = max(1, piece * rows // max(1, weight.nbytes))
    if step >= rows:
        return unpack(parts, dtype)
    out = None
    for begin in range(0, rows, step):
        some = slice(begin, begin + step)
        numbers = unpack({name: part[some] if part.ndim else part for name, part in parts.items()}, dtype)
        if out is None:
            out = numbers.new_empty(rows, *numbers.shape[1:])
        out[some] = numbers
    return out


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight of `shape` in some packing.

    `parts` holds "weight" (rows, …) and the packing's scales, each a single number or one row for each row of the
    weight; `unpack(parts, dtype)` makes the numbers of the rows that it is given. `error` tells by how much of its size
    the weight changed where it was packed here.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    unpack: Unpack
    error: float | None = None

    def numbers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return unpack_by_pieces(self.unpack, self.parts, dtype).reshape(self.shape)


class Product(torch.autograd.Function):
    """A linear layer with a packed weight, on the way to something that is trained.

    The way back unpacks the weight once more: its numbers, kept for it, would take twice the memory of fp8 and more.
    """

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, unpack: Unpack, names: tuple[str, ...], *parts: Tensor) -> Tensor:
        ctx.unpack, ctx.names = unpack, names
        ctx.save_for_backward(*parts)
        return linear(x, Product.weight(ctx, parts, x.dtype), widened(bias, x))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight = Product.weight(ctx, ctx.saved_tensors, gradient.dtype)
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return gradient @ weight, of_bias, None, None, *[None] * len(ctx.names)

    @staticmethod
    def weight(ctx, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return unpack_by_pieces(ctx.unpack, dict(zip(ctx.names, parts, strict=True)), dtype)


class PackedLinear(Linear):
    """A Linear with a packed weight; `weight` holds its bits, `numbers` tells what they mean.

    in_fp8: multiply in 8-bit floats where the device can, instead of unpacking.
    """

    def __init__(self, layer: Linear, packed: Packed):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        hold(self, packed)
        self.bias = layer.bias
        self.in_fp8 = False

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`, made anew."""
        return unpack_by_pieces(self.unpack, {name: getattr(self, name) for name in self.part_names}, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            parts = [getattr(self, name) for name in self.part_names]
            return Product.apply(x, self.bias, self.unpack, self.part_names, *parts)
        if self.in_fp8 and fp8.fits(x, self.weight):
            return fp8.linear(x, self.weight, self.scale, widened(self.bias, x))
        return linear(x, self.numbers(x.dtype), widened(self.bias, x))


class PackedEmbedding(Embedding):
    """An embedding with a packed table, of which only the rows asked for are unpacked, to fp32."""

    def __init__(self, layer: Embedding, packed: Packed):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        hold(self, packed)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = {name: getattr(self, name) for name in self.part_names}
        rows = {name: rows_at(part, tokens) if part.ndim else part for name, part in parts.items()}
        return self.unpack(rows, torch.float32)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def hold(layer: PackedLinear | PackedEmbedding, packed: Packed) -> None:
    """Make the parts the layer's parameters."""
    layer.unpack, layer.part_names, layer.error = packed.unpack, tuple(packed.parts), packed.error
    for name, part in packed.parts.items():
        layer.register_parameter(name, nn.Parameter(part, requires_grad=False))


KINDS = {Linear: PackedLinear, Embedding: PackedEmbedding}


def keep_packed(module: nn.Module, name: str, packed: Packed) -> bool:
    """Let the layer whose parameter this is hold it packed. False where its kind of layer needs the numbers."""
    path, _, parameter = name.rpartition(".")
    layer = module.get_submodule(path)
    kind = KINDS.get(type(layer))
    if parameter != "weight" or kind is None:
        return False
    module.set_submodule(path, kind(layer, packed))
    return True


def multiply_in_fp8(module: nn.Module, names: Collection[str]) -> int:
    """Let those of the named weights that lie in 8-bit floats be multiplied so where the device can.

    Weights without scales get a scale of one. Returns how many there are.
    """
    count = 0
    for name in names:
        path = name.removesuffix(".weight")
        layer = module.get_submodule(path)
        if type(layer) is Linear and layer.weight.dtype in FLOATS_OF_8_BITS:
            parts = {"weight": layer.weight, "scale": torch.ones((), device=layer.weight.device)}
            keep_packed(module, name, Packed(layer.weight.shape, parts, unpack_scaled))
            layer = module.get_submodule(path)
        if isinstance(layer, PackedLinear) and layer.unpack is unpack_scaled and layer.scale.shape[1:] in ((), (1,)):
            layer.in_fp8 = layer.weight.dtype in FLOATS_OF_8_BITS
            count += layer.in_fp8
    return count
