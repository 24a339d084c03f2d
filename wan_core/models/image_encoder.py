"""The CLIP image encoder that shows pictures to Wan's image models.

The visual tower of OpenCLIP's ViT-H/14, a vision transformer with a norm in front. Wan looks at what the last but one
block gives, so the last block, the final norm and the projection are neither built nor loaded.

Module names are those of the published checkpoint (`models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`).
Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020;
Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from .layers import Conv2d, LayerNorm, Linear, widened

HEAD_DIM = 80
EPS = 1e-5

# Mean and deviation of the colours in CLIP's training pictures: what the encoder sees is (colour - mean) / deviation.
COLOUR_MEAN = (0.48145466, 0.4578275, 0.40821073)
COLOUR_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageEncoderLayout:
    """The sizes of an encoder; the defaults are ViT-H/14's. `layers` counts the blocks that are run."""

    dim: int = 1280
    mlp_dim: int = 5120
    heads: int = 16
    layers: int = 31
    patch: int = 14
    side: int = 224  # of the pictures, in pixels

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> ImageEncoderLayout:
        """Read the layout from a state dict's shapes (published names). Raises ModelError if it is no such encoder."""
        try:
            dim, _, patch, _ = shapes["visual.patch_embedding.weight"]
            positions = shapes["visual.pos_embedding"][1]
            mlp_dim = shapes["visual.transformer.0.mlp.0.weight"][0]
        except KeyError as missing:
            raise ModelError(
                f"This is not a CLIP image encoder in its published layout: it has no tensor {missing}. Wan 2.1 needs "
                "CLIP ViT-H (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or clip_vision_h.safetensors)."
            ) from None
        if dim % HEAD_DIM:
            raise ModelError(
                f"This CLIP image encoder has width {dim} (1024 is CLIP ViT-L), but Wan 2.1 needs CLIP ViT-H with "
                "width 1280. Load clip_vision_h.safetensors or Wan's own models_clip_open-clip-….pth."
            )
        numbers = [int(name.split(".")[2]) for name in shapes if name.startswith("visual.transformer.")]
        return cls(dim, mlp_dim, dim // HEAD_DIM, max(numbers), patch, math.isqrt(positions - 1) * patch)

    @property
    def positions(self) -> int:
        """One for the whole picture, then one for each patch."""
        return 1 + (self.side // self.patch) ** 2

    def reads(self, name: str) -> bool:
        """Whether a tensor of the published checkpoint is used: the text tower and the end of this one are not."""
        return name.startswith("visual.") and not name.startswith(
            ("visual.head", "visual.post_norm.", f"visual.transformer.{self.layers}.")
        )


class Attention(nn.Module):
    def __init__(self, layout: ImageEncoderLayout):
        super().__init__()
        self.heads = layout.heads
        self.to_qkv = Linear(layout.dim, layout.dim * 3)
        self.proj = Linear(layout.dim, layout.dim)

    def forward(self, x: Tensor) -> Tensor:
        # (b, n, 3 * dim) -> three of (b, heads, n, head_dim)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, layout: ImageEncoderLayout):
        super().__init__()
        self.norm1 = LayerNorm(layout.dim, EPS)
        self.attn = Attention(layout)
        self.norm2 = LayerNorm(layout.dim, EPS)
        self.mlp = nn.Sequential(Linear(layout.dim, layout.mlp_dim), nn.GELU(), Linear(layout.mlp_dim, layout.dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisualTower(nn.Module):
    def __init__(self, layout: ImageEncoderLayout):
        super().__init__()
        self.patch_embedding = Conv2d(3, layout.dim, layout.patch, layout.patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, layout.dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, layout.positions, layout.dim))
        self.pre_norm = LayerNorm(layout.dim, EPS)
        self.transformer = nn.ModuleList(Block(layout) for _ in range(layout.layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)  # (b, 3, side, side) -> (b, patches, dim)
        x = torch.cat([widened(self.cls_embedding, x).expand(len(x), -1, -1), x], dim=1)
        x = self.pre_norm(x + widened(self.pos_embedding, x))
        for block in self.transformer:
            x = block(x)
        return x


class ImageEncoder(nn.Module):
    """Pictures in, one vector for the whole and one for each patch out."""

    def __init__(self, layout: ImageEncoderLayout):
        super().__init__()
        self.layout = layout
        self.visual = VisualTower(layout)

    def forward(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """images (b, H, W, 3) in 0..1, of any size -> (b, 257, 1280) in `dtype`."""
        return self.visual(self.prepared(images).to(dtype))

    def prepared(self, images: Tensor) -> Tensor:
        """(b, H, W, 3) in 0..1 -> (b, 3, side, side), with CLIP's colours.

        Stretched to a square and not filtered before shrinking, as the models were trained (Wan's own code).
        """
        mean, deviation = images.new_tensor(COLOUR_MEAN), images.new_tensor(COLOUR_DEVIATION)
        size = (self.layout.side,) * 2
        x = F.interpolate(images.movedim(-1, 1).float(), size, mode="bicubic", align_corners=False)
        return (x - mean[:, None, None]) / deviation[:, None, None]
