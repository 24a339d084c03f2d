"""The causal video VAE of Wan 2.1: 8x8 in space, 4 in time, 16 channels.

Frame 0 becomes latent frame 0; every further group of four frames becomes one more latent frame.
All temporal layers look only backwards, so a clip can be coded in groups of frames: each layer keeps the
last frames that it saw in a `Memory`. A whole clip at once and the same clip in groups give the same
numbers; in groups the peak memory does not grow with the clip, only with the picture, and tiles bound that.

Module names are those of the published checkpoint (`Wan2.1_VAE.pth`).
Source: Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models", arXiv 2503.20314, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelError
from .tiling import TILE_SIZE, TILE_STRIDE, Size, blend, tiles, whole
from .vae_layers import (
    CUBE,
    POINT,
    AttentionBlock,
    CausalConv3d,
    Downsample,
    Memory,
    ResidualBlock,
    RMSNorm,
    SiLU,
    Upsample,
    channels_last,
    run,
)

LATENT_CHANNELS = 16
TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8
CHANNEL_MULTIPLIERS = (1, 2, 4, 4)
DOWNSAMPLE_TIME = (False, True, True)

GROUP_POSITIONS = 256  # latent positions coded at once: small pictures go several frames at a time

# Statistics of the published VAE's latents over natural video, per channel: they are part of the model,
# the DiT sees (latent - mean) / std.
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


def middle_blocks(channels: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels))


class Encoder(nn.Module):
    def __init__(self, dim: int, out_channels: int):
        super().__init__()
        widths = [dim, *(dim * m for m in CHANNEL_MULTIPLIERS)]
        self.conv1 = CausalConv3d(3, dim, CUBE)
        layers: list[nn.Module] = []
        for level, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers += [ResidualBlock(i, o), ResidualBlock(o, o)]
            if level < len(DOWNSAMPLE_TIME):
                layers.append(Downsample(o, time=DOWNSAMPLE_TIME[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle_blocks(widths[-1])
        self.head = nn.Sequential(RMSNorm(widths[-1], 3), SiLU(), CausalConv3d(widths[-1], out_channels, CUBE))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return run([self.conv1, *self.downsamples, *self.middle, *self.head], x, memory)


class Decoder(nn.Module):
    def __init__(self, dim: int, in_channels: int):
        super().__init__()
        multipliers = CHANNEL_MULTIPLIERS[::-1]
        widths = [dim * multipliers[0], *(dim * m for m in multipliers)]
        upsample_time = DOWNSAMPLE_TIME[::-1]
        self.conv1 = CausalConv3d(in_channels, widths[0], CUBE)
        self.middle = middle_blocks(widths[0])
        layers: list[nn.Module] = []
        for level, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            i = i if level == 0 else i // 2  # the upsampling before this level halved the channels
            layers += [ResidualBlock(i, o), ResidualBlock(o, o), ResidualBlock(o, o)]
            if level < len(upsample_time):
                layers.append(Upsample(o, time=upsample_time[level]))
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(RMSNorm(dim, 3), SiLU(), CausalConv3d(dim, 3, CUBE))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return run([self.conv1, *self.middle, *self.upsamples, *self.head], x, memory)


class VideoCoder(nn.Module):
    """What turns pixels (b, 3, 4n+1, 8h, 8w) in -1..1 into raw latents (b, 16, n+1, h, w) and back.

    A network says by `encode_groups` and `decode_groups` how it works on one clip; batches, tiles and what is given
    out frame by frame are the same for all. Results are fp32 and lie where the input lay, so a long clip may stay in
    RAM while a GPU codes it group by group.
    """

    latent_channels: int
    width: int  # channels where it sees whole pictures

    def encode_groups(self, pixels: Tensor) -> Iterator[Tensor]:
        """The latents of a clip, some frames at a time."""
        raise NotImplementedError

    def decode_groups(self, latents: Tensor) -> Iterator[Tensor]:
        """The pixels of a clip, not clamped, some frames at a time."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(
        self, pixels: Tensor, tiled: bool = False, tile_size: Size = TILE_SIZE, tile_stride: Size = TILE_STRIDE,
        sums: torch.dtype = torch.float32,
    ) -> Tensor:
        """(b, 3, 4n+1, H, W) -> the mean latents (b, 16, n+1, H/8, W/8) fp32.

        Tile sizes are (height, width) of latents; sums: the type in which tiles are added up.
        """
        b, _, frames, height, width = pixels.shape
        if (frames - 1) % TEMPORAL_STRIDE or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise InputError(
                f"This video has {frames} frames of {width} x {height} pixels, but the Wan VAE needs 4n+1 frames "
                f"(1, 5, 9, ... 81) and sides that are multiples of {SPATIAL_STRIDE}. Trim, repeat or resize it first."
            )
        h, w = height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
        shape = b, self.latent_channels, (frames - 1) // TEMPORAL_STRIDE + 1, h, w
        latents = torch.zeros(shape, device=pixels.device, dtype=sums)
        picked = tiles((h, w), tile_size, tile_stride) if tiled else [whole((h, w))]
        for clip, out in zip(pixels.split(1), latents.split(1), strict=True):
            blend(out, ((tile, self.encode_groups(tile.scaled(SPATIAL_STRIDE).of(clip))) for tile in picked))
        return latents.float()

    @torch.no_grad()
    def decode(
        self, latents: Tensor, tiled: bool = False, tile_size: Size = TILE_SIZE, tile_stride: Size = TILE_STRIDE,
        sums: torch.dtype = torch.float32,
    ) -> Tensor:
        """(b, 16, n+1, h, w) -> (b, 3, 4n+1, 8h, 8w) in -1..1, fp32; tiles as for `encode`."""
        b, _, groups, h, w = latents.shape
        frames = (groups - 1) * TEMPORAL_STRIDE + 1
        shape = b, 3, frames, h * SPATIAL_STRIDE, w * SPATIAL_STRIDE
        pixels = torch.zeros(shape, device=latents.device, dtype=sums)
        picked = tiles((h, w), tile_size, tile_stride) if tiled else [whole((h, w))]
        for clip, out in zip(latents.split(1), pixels.split(1), strict=True):
            blend(out, ((tile.scaled(SPATIAL_STRIDE), self.decode_groups(tile.of(clip))) for tile in picked))
        return pixels.clamp_(-1, 1).float()

    @torch.no_grad()
    def frames(
        self, latents: Tensor, tiled: bool = False, tile_size: Size = TILE_SIZE, tile_stride: Size = TILE_STRIDE,
        sums: torch.dtype = torch.float32,
    ) -> Iterator[Tensor]:
        """As `decode` of one clip (1, 16, n+1, h, w), some frames (1, 3, t, 8h, 8w) at a time as they are done.

        Tiles reach over the whole clip, so that with them all frames come at once.
        """
        if tiled:
            yield self.decode(latents, tiled, tile_size, tile_stride, sums)
            return
        for group in self.decode_groups(latents):
            yield group.to(latents.device, torch.float32).clamp_(-1, 1)


class VideoVAE(VideoCoder):
    """The published encoder and decoder. The type of the input decides the arithmetic, the device of the weights the
    place."""

    def __init__(self, dim: int = 96, latent_channels: int = LATENT_CHANNELS):
        super().__init__()
        self.latent_channels, self.width = latent_channels, dim
        self.encoder = Encoder(dim, latent_channels * 2)
        self.conv1 = CausalConv3d(latent_channels * 2, latent_channels * 2, POINT)
        self.conv2 = CausalConv3d(latent_channels, latent_channels, POINT)
        self.decoder = Decoder(dim, latent_channels)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> VideoVAE:
        """The network whose tensors have these shapes; raises ModelError where it is another family's."""
        if "encoder.conv1.weight" not in shapes or "conv2.weight" not in shapes:
            raise ModelError(
                "This is not a Wan 2.1 VAE in its published layout: it has no encoder.conv1.weight and conv2.weight. "
                "Load Wan2.1_VAE.pth or wan_2.1_vae.safetensors."
            )
        dim, latent_channels = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
        if latent_channels != LATENT_CHANNELS:
            raise ModelError(
                f"This VAE makes latents of {latent_channels} channels (48 is Wan 2.2), but Wan 2.1 models need "
                f"{LATENT_CHANNELS}. Load Wan2.1_VAE.pth or wan_2.1_vae.safetensors."
            )
        return cls(dim)

    def encode_whole(self, pixels: Tensor) -> Tensor:
        """(b, 3, 4n+1, H, W) -> the mean latents (b, 16, n+1, H/8, W/8), all frames in one pass: for training."""
        return self.encode_group(pixels, Memory(final=True))

    def decode_whole(self, latents: Tensor) -> Tensor:
        """(b, 16, n+1, h, w) -> (b, 3, 4n+1, 8h, 8w), not clamped, all frames in one pass: for training."""
        return self.decode_group(latents, Memory(final=True))

    def order_weights(self) -> None:
        """Keep the convolutions' weights in channels-last order, like the activations: no call has to turn them."""
        with torch.inference_mode(False):
            for parameter in self.parameters():
                if parameter.ndim == 5:
                    parameter.data = channels_last(parameter.data)

    def encode_groups(self, pixels: Tensor) -> Iterator[Tensor]:
        """The latents of a clip, some frames at a time."""
        self.order_weights()
        memory, device = Memory(), self.conv1.weight.device
        frames = (pixels.shape[2] - 1) // TEMPORAL_STRIDE + 1
        for begin, end in frame_groups(frames, pixels.shape[3] * pixels.shape[4] // SPATIAL_STRIDE**2):
            memory.final = end == frames
            group = pixels[:, :, max(0, begin * TEMPORAL_STRIDE - 3) : end * TEMPORAL_STRIDE - 3]
            yield self.encode_group(group.to(device), memory)

    def decode_groups(self, latents: Tensor) -> Iterator[Tensor]:
        """The pixels of a clip, not clamped, some frames at a time."""
        self.order_weights()
        memory, device = Memory(), self.conv1.weight.device
        frames = latents.shape[2]
        for begin, end in frame_groups(frames, latents.shape[3] * latents.shape[4]):
            memory.final = end == frames
            yield self.decode_group(latents[:, :, begin:end].to(device), memory)

    def encode_group(self, pixels: Tensor, memory: Memory) -> Tensor:
        moments = self.conv1(self.encoder(channels_last(pixels), memory), memory)
        return moments[:, : self.latent_channels]

    def decode_group(self, latents: Tensor, memory: Memory) -> Tensor:
        return self.decoder(self.conv2(channels_last(latents), memory), memory)


def frame_groups(frames: int, positions: int) -> Iterator[tuple[int, int]]:
    """Ranges of latent frames to code at once: the first alone (it is an image), then as many as are small enough."""
    size = max(1, GROUP_POSITIONS // positions)
    yield 0, 1
    for begin in range(1, frames, size):
        yield begin, min(begin + size, frames)


def normalised(latent: Tensor) -> Tensor:
    """Raw latents, as they travel between nodes, to what the model was trained on."""
    mean, std = statistics(latent)
    return (latent - mean) / std


def unnormalised(latent: Tensor) -> Tensor:
    mean, std = statistics(latent)
    return latent * std + mean


def statistics(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, (1, 16, 1, 1, 1) each."""
    return tuple(latent.new_tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
