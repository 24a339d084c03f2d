"""Tiles of a picture that overlap and fade into each other: bounded memory for networks that see whole pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from ..errors import InputError

Size = tuple[int, int]  # (height, width) in latent pixels
TILE_SIZE: Size = (30, 52)  # of the reference: nine tiles for 480 x 832
TILE_STRIDE: Size = (15, 26)
SMALLEST = 8  # no side of a tile is made shorter when memory runs out


@dataclass(frozen=True)
class Tiling:
    """How to work: tile by tile, or on the whole picture, where this size of tile is only what would come next.

    sums: the type in which tiles are added up.
    """

    tiled: bool = False
    tile_size: Size = TILE_SIZE
    tile_stride: Size = TILE_STRIDE
    sums: torch.dtype = torch.float32

    def largest(self, shape: Size) -> Size:
        """The most of a picture of this shape that is worked on at once."""
        return tuple(map(min, shape, self.tile_size)) if self.tiled else shape

    def smaller(self) -> Tiling | None:
        """What takes less memory; None where tiles are as small as they get."""
        if not self.tiled:
            return replace(self, tiled=True)
        if max(self.tile_size) <= SMALLEST:
            return None
        size = tuple(min(side, max(SMALLEST, side // 2)) for side in self.tile_size)
        strides = zip(self.tile_stride, self.tile_size, size, strict=True)
        strides = tuple(max(1, stride * new // side) for stride, side, new in strides)
        return replace(self, tile_size=size, tile_stride=strides)


@dataclass
class Ladder:
    """Ways to work on pictures of one shape, each with less memory than the one before; those given up are gone."""

    shape: Size
    steps: list[Tiling]

    def first(self, fits: Callable[[Size], bool]) -> Tiling:
        """The first whose largest part fits, else the last."""
        while not fits(self.steps[0].largest(self.shape)) and self.step_down():
            pass
        return self.steps[0]

    def step_down(self) -> bool:
        """Give the first up. False where it is the last."""
        if len(self.steps) == 1:
            return False
        del self.steps[0]
        return True


def ladder(shape: Size, **tiling) -> Ladder:
    """From what is asked for (the fields of `Tiling`) down to the smallest tiles, for pictures of this shape."""
    step = Tiling(**tiling)
    steps = [step]
    while step := step.smaller():
        if step.largest(shape) != steps[-1].largest(shape):
            steps.append(step)
    return Ladder(shape, steps)


@dataclass(frozen=True)
class Span:
    """Positions begin..end of a side of `length`; it fades over `border` positions where it has a neighbour."""

    begin: int
    end: int
    length: int
    border: int

    def scaled(self, scale: int) -> Span:
        return Span(self.begin * scale, self.end * scale, self.length * scale, self.border * scale)

    def weights(self) -> Tensor:
        """(end - begin,) in 0..1, rising and falling linearly at inner edges."""
        weights = torch.ones(self.end - self.begin)
        if self.border:
            ramp = ((torch.arange(self.end - self.begin) + 1) / self.border).clamp(max=1)
            if self.begin > 0:
                weights = torch.minimum(weights, ramp)
            if self.end < self.length:
                weights = torch.minimum(weights, ramp.flip(0))
        return weights


def spans(length: int, size: int, stride: int) -> list[Span]:
    """Cover 0..length by spans of `size` that begin at multiples of `stride`; the last one may be shorter."""
    found: list[Span] = []
    for begin in range(0, length, stride):
        found.append(Span(begin, min(begin + size, length), length, size - stride))
        if begin + size >= length:
            break
    return found


@dataclass(frozen=True)
class Tile:
    """A rectangle of a picture."""

    rows: Span
    columns: Span

    def scaled(self, scale: int) -> Tile:
        return Tile(self.rows.scaled(scale), self.columns.scaled(scale))

    def of(self, picture: Tensor) -> Tensor:
        """The tile's part of (..., height, width), a view."""
        return picture[..., self.rows.begin : self.rows.end, self.columns.begin : self.columns.end]

    def weights(self) -> Tensor:
        """(rows, columns): how much this tile counts at each position, the smaller of the two ramps."""
        return torch.minimum(self.rows.weights()[:, None], self.columns.weights()[None, :])


def whole(shape: Size) -> Tile:
    return Tile(*(Span(0, length, length, 0) for length in shape))


def tiles(shape: Size, size: Size, stride: Size) -> list[Tile]:
    """Tiles that cover a picture of `shape`, row by row."""
    for axis, n, step in zip(("height", "width"), size, stride, strict=True):
        if not 0 < step <= n:
            raise InputError(
                f"tile_stride {step} does not go with tile_size {n} in {axis}: the stride must be at least 1 and at "
                f"most the size, or gaps stay between the tiles. Use half the size, as in (30, 52) and (15, 26)."
            )
    rows, columns = (spans(*side) for side in zip(shape, size, stride, strict=True))
    return [Tile(*pair) for pair in product(rows, columns)]


def blend(out: Tensor, parts: Iterable[tuple[Tile, Iterable[Tensor]]]) -> None:
    """Fill `out` (b, c, t, height, width), zeros so far, from tiles whose frames come in groups."""
    total = out.new_zeros(out.shape[-2:])
    for tile, groups in parts:
        weights = tile.weights().to(out)
        tile.of(total).add_(weights)
        frame = 0
        for group in groups:
            count = group.shape[2]
            tile.of(out)[:, :, frame : frame + count].add_(group.to(out) * weights)
            frame += count
    out.div_(total)
