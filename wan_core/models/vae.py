"""The causal video VAE of Wan 2.1: 8x8 in space, 4 in time, 16 channels.

Frame 0 becomes latent frame 0; every further group of four frames becomes one more latent frame.
All temporal layers look only backwards, so a clip can be coded in pieces of any length: each layer
keeps the last frames that it saw in a `Memory`. A whole clip at once and the same clip in pieces
give the same numbers.

Module names are those of the published checkpoint (`Wan2.1_VAE.pth`).
Source: Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models", arXiv 2503.20314, section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_CHANNELS = 16
TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8
CHANNEL_MULTIPLIERS = (1, 2, 4, 4)
DOWNSAMPLE_TIME = (False, True, True)

# Statistics of the published VAE's latents over natural video, per channel: they are part of the model,
# the DiT sees (latent - mean) / std.
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


class Memory:
    """What the temporal layers remember between two pieces of one clip: their last input frames."""

    def __init__(self):
        self.frames: dict[nn.Module, Tensor] = {}

    def is_first(self, layer: nn.Module) -> bool:
        return layer not in self.frames

    def exchange(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """Put the last `count` frames seen so far in front of x (zeros before the clip begins)."""
        past = self.frames.get(layer)
        if past is None:
            past = x.new_zeros(*x.shape[:2], count, *x.shape[3:])
        x = torch.cat([past, x], dim=2)
        self.frames[layer] = x[:, :, -count:] if count else x[:, :, :0]
        return x


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution, padded in space as usual and in time with past frames only."""

    def __init__(self, in_channels, out_channels, kernel_size, padding=0):
        kernel = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        space = (0, padding, padding)
        super().__init__(in_channels, out_channels, kernel, padding=space)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        past = self.kernel_size[0] - 1
        if past:
            x = memory.exchange(self, x, past)
        return super().forward(x)


class RMSNorm(nn.Module):
    """Divides each position by the root mean square over its channels."""

    def __init__(self, channels: int, dimensions: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dimensions))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (x.shape[1] ** 0.5) * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_channels, 3), nn.SiLU(), CausalConv3d(in_channels, out_channels, 3, padding=1),
            RMSNorm(out_channels, 3), nn.SiLU(), nn.Dropout(0.0), CausalConv3d(out_channels, out_channels, 3, padding=1),
        )  # fmt: skip
        self.shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        shortcut = self.shortcut(x, memory) if self.shortcut is not None else x
        for layer in self.residual:
            x = layer(x, memory) if isinstance(layer, CausalConv3d) else layer(x)
        return x + shortcut


class AttentionBlock(nn.Module):
    """Self-attention over the positions of each single frame, one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * t, c, h, w)
        # (bt, 3c, h, w) -> three of (bt, 1, hw, c)
        q, k, v = self.to_qkv(self.norm(frames)).reshape(b * t, 1, 3 * c, h * w).transpose(2, 3).chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(out.transpose(2, 3).reshape(b * t, c, h, w))
        return x + out.reshape(b, t, c, h, w).transpose(1, 2)


def each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of (b, c, t, h, w)."""
    b, c, t, h, w = x.shape
    y = layer(x.transpose(1, 2).reshape(b * t, c, h, w))
    return y.reshape(b, t, *y.shape[1:]).transpose(1, 2)


class Downsample(nn.Module):
    """Halves height and width, and on request the frame rate: frame 0 stays, then two become one."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = each_frame(self.resample, x)
        if self.time_conv is None:
            return x
        first = x[:, :, :1] if memory.is_first(self) else None
        if first is not None:
            memory.frames[self] = first
            x = x[:, :, 1:]
        if x.shape[2]:
            x = self.time_conv(memory.exchange(self, x, 1))
        return x if first is None else torch.cat([first, x], dim=2)


class Upsample(nn.Module):
    """Doubles height and width, and on request the frame rate: frame 0 stays, then one becomes two."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        if self.time_conv is not None:
            x = self.double_time(x, memory)
        return each_frame(self.resample, x)

    def double_time(self, x: Tensor, memory: Memory) -> Tensor:
        # Frame 0 is neither doubled nor remembered: the published network was trained so.
        first = x[:, :, :1] if memory.is_first(self) else None
        if first is not None:
            memory.frames[self] = first[:, :, :0]
            x = x[:, :, 1:]
        if x.shape[2]:
            b, c, t, h, w = x.shape
            # the two halves of the channels are the even and the odd frames
            x = self.time_conv(x, memory).reshape(b, 2, c, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)
        return x if first is None else torch.cat([first, x], dim=2)


def run(layers, x: Tensor, memory: Memory) -> Tensor:
    for layer in layers:
        if isinstance(layer, (RMSNorm, nn.SiLU)):
            x = layer(x)
        else:
            x = layer(x, memory)
    return x


def middle_blocks(channels: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


class Encoder(nn.Module):
    def __init__(self, dim: int, out_channels: int):
        super().__init__()
        widths = [dim, *(dim * m for m in CHANNEL_MULTIPLIERS)]
        self.conv1 = CausalConv3d(3, dim, 3, padding=1)
        layers: list[nn.Module] = []
        for level, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers += [ResidualBlock(i, o), ResidualBlock(o, o)]
            if level < len(DOWNSAMPLE_TIME):
                layers.append(Downsample(o, time=DOWNSAMPLE_TIME[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle_blocks(widths[-1])
        self.head = nn.Sequential(RMSNorm(widths[-1], 3), nn.SiLU(), CausalConv3d(widths[-1], out_channels, 3, padding=1))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return run([self.conv1, *self.downsamples, *self.middle, *self.head], x, memory)


class Decoder(nn.Module):
    def __init__(self, dim: int, in_channels: int):
        super().__init__()
        multipliers = CHANNEL_MULTIPLIERS[::-1]
        widths = [dim * multipliers[0], *(dim * m for m in multipliers)]
        upsample_time = DOWNSAMPLE_TIME[::-1]
        self.conv1 = CausalConv3d(in_channels, widths[0], 3, padding=1)
        self.middle = middle_blocks(widths[0])
        layers: list[nn.Module] = []
        for level, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            i = i if level == 0 else i // 2  # the upsampling before this level halved the channels
            layers += [ResidualBlock(i, o), ResidualBlock(o, o), ResidualBlock(o, o)]
            if level < len(upsample_time):
                layers.append(Upsample(o, time=upsample_time[level]))
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(RMSNorm(dim, 3), nn.SiLU(), CausalConv3d(dim, 3, 3, padding=1))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return run([self.conv1, *self.middle, *self.upsamples, *self.head], x, memory)


class VideoVAE(nn.Module):
    """Encoder and decoder between pixels (b, 3, 4n+1, 8h, 8w) in -1..1 and raw latents (b, 16, n+1, h, w)."""

    def __init__(self, dim: int = 96, latent_channels: int = LATENT_CHANNELS):
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = Encoder(dim, latent_channels * 2)
        self.conv1 = CausalConv3d(latent_channels * 2, latent_channels * 2, 1)
        self.conv2 = CausalConv3d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(dim, latent_channels)

    def encode_whole(self, pixels: Tensor) -> Tensor:
        """(b, 3, 4n+1, H, W) -> the mean latents (b, 16, n+1, H/8, W/8), all frames in one pass."""
        memory = Memory()
        return self.conv1(self.encoder(pixels, memory), memory)[:, : self.latent_channels]

    def decode_whole(self, latents: Tensor) -> Tensor:
        """(b, 16, n+1, h, w) -> (b, 3, 4n+1, 8h, 8w), not clamped, all frames in one pass."""
        memory = Memory()
        return self.decoder(self.conv2(latents, memory), memory)
