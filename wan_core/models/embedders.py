"""Small networks beside the trunk that turn what a user gives into what its slots take.

Image features become context tokens, camera rays something to add to the patches, a speed something to add to the
modulation. Conditions call them; the trunk's forward never does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from .layers import Conv2d, LayerNorm, Linear

IMAGE_FEATURES = 1280  # width of the CLIP ViT-H features
CAMERA_FOLD = 8  # rays come in pixels, eight to a latent position


class ImageEmbedding(nn.Module):
    """CLIP features (b, n, width) -> context tokens (b, n, dim). Those of first / last frame models know positions."""

    def __init__(self, width: int, dim: int, positions: int = 0):
        super().__init__()
        self.width = width
        self.proj = nn.Sequential(
            LayerNorm(width), Linear(width, width), nn.GELU(), Linear(width, dim), LayerNorm(dim)
        )  # fmt: skip
        self.emb_pos = nn.Parameter(torch.zeros(1, positions, width)) if positions else None

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[-1] != self.width:
            raise ModelError(
                f"The image encoder gives features {features.shape[-1]} wide, but this model looks at {self.width} "
                "wide ones. Load the image encoder that it was trained with (clip_vision_h.safetensors for Wan 2.1)."
            )
        if self.emb_pos is not None:
            features = features + self.emb_pos[:, : features.shape[1]].to(features.dtype)
        return self.proj(features)


class ResidualConvolution(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = Conv2d(dim, dim, 3, padding=1)
        self.conv2 = Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class CameraAdapter(nn.Module):
    """Pluecker rays (b, channels, T, 8h, 8w) -> (b, dim, T, h/2, w/2), one value a patch."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.conv = Conv2d(channels * CAMERA_FOLD**2, dim, 2, stride=2)
        self.residual_blocks = nn.ModuleList([ResidualConvolution(dim)])

    def forward(self, rays: Tensor) -> Tensor:
        b, _, t, _, _ = rays.shape
        x = F.pixel_unshuffle(rays.transpose(1, 2).flatten(0, 1), CAMERA_FOLD)  # (bT, 64c, h, w)
        x = self.conv(x)
        for block in self.residual_blocks:
            x = block(x)
        return x.unflatten(0, (b, t)).transpose(1, 2)


class MotionController(nn.Module):
    """A speed (n,), 0..100 as trained -> (n, 6, dim), added to the modulation. Comes in a file of its own."""

    def __init__(self, frequency_dim: int, dim: int):
        super().__init__()
        self.frequency_dim, self.dim = frequency_dim, dim
        self.linear = nn.Sequential(
            Linear(frequency_dim, dim), nn.SiLU(), Linear(dim, dim), nn.SiLU(), Linear(dim, dim * 6)
        )

    def fits(self, dim: int, trunk_layers: int) -> bool:
        """Whether this was made for such a trunk; its layers do not matter."""
        return self.dim == dim

    def forward(self, speed: Tensor) -> Tensor:
        return self.linear(sinusoid(speed * 10, self.frequency_dim)).unflatten(1, (6, -1))


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """(b,) -> (b, dim): cosines, then sines, of frequencies from 1 down to 1/10000; taken in fp64, given in fp32."""
    device = "cpu" if positions.device.type == "mps" else positions.device  # Apple's cards have no fp64
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim // 2))
    angles = positions.to(device).double()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float().to(positions.device)
