"""VACE: a second stack of blocks that reads the frames to keep, change or follow, and advises the trunk.

Its blocks are the trunk's own kind. After some of the trunk's blocks the next of them runs and adds its hint.
Module names are those of the published files, where VACE lies beside the trunk.
Source: Jiang et al., "VACE: All-in-One Video Creation and Editing", arXiv 2503.07598.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import ModelError
from .blocks import Block, PatchEmbedding, Step, in_pieces, plus
from .layers import Linear
from .layout import HEAD_DIM

ESSENTIAL = ("vace_patch_embedding.weight", "vace_blocks.0.ffn.0.weight")


@dataclass(frozen=True)
class VACELayout:
    dim: int
    ffn_dim: int
    layers: int
    heads: int
    in_dim: int = 96

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple]) -> VACELayout | None:
        """The layout of the VACE part of a checkpoint, None where it has none; a `ModelError` where it has a half."""
        found = [key in shapes for key in ESSENTIAL]
        if not any(found):
            return None
        if not all(found):
            raise ModelError(
                f"This VACE has no '{ESSENTIAL[found.index(False)]}'. Take an unmodified file of the model."
            )
        dim, in_dim = shapes["vace_patch_embedding.weight"][:2]
        return cls(
            dim=dim,
            ffn_dim=shapes["vace_blocks.0.ffn.0.weight"][0],
            layers=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("vace_blocks.")),
            heads=dim // HEAD_DIM,
            in_dim=in_dim,
        )


class VACEBlock(Block):
    def __init__(self, layout: VACELayout, first: bool):
        super().__init__(layout.dim, layout.ffn_dim, layout.heads)
        if first:
            self.before_proj = Linear(layout.dim, layout.dim)
        self.after_proj = Linear(layout.dim, layout.dim)

    def forward(self, x: Tensor, step: Step, trunk: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (b, n, dim) -> the next block's tokens and the hint; the first block takes in the trunk's tokens."""
        if trunk is not None:
            x = plus(in_pieces(self.before_proj, x), trunk)
        x = super().forward(x, step)
        return x, self.after_proj(x)


class VACE(nn.Module):
    def __init__(self, layout: VACELayout):
        super().__init__()
        self.layout = layout
        self.vace_patch_embedding = PatchEmbedding(layout.in_dim, layout.dim)
        self.vace_blocks = nn.ModuleList(VACEBlock(layout, first=i == 0) for i in range(layout.layers))

    @property
    def dim(self) -> int:
        return self.layout.dim

    def fits(self, dim: int, trunk_layers: int) -> bool:
        """Whether this was made for such a trunk."""
        return self.dim == dim and len(self.places(trunk_layers)) == self.layout.layers

    def places(self, trunk_layers: int) -> range:
        """After which of the trunk's blocks a hint is added: spread evenly from the first."""
        return range(0, trunk_layers, math.ceil(trunk_layers / self.layout.layers))
