"""Tiny VAEs for the latents of Wan 2.1: a thirtieth of the work of the full one, for previews and drafts.

Plain 2-D networks, frame by frame, whose blocks also see what the same block was given for the frame before. So a clip
can be coded in groups of frames, and memory does not grow with its length. Four frames become one latent frame, and one
latent frame four frames, the first three of which lie before the clip and are dropped.

Module names are those of the published checkpoints (`taew2_1`, `lighttaew2_1`).
Source: Ollin Boer Bohan, TAEHV, github.com/madebyollin/taehv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from .layers import Conv2d
from .vae import (
    LATENT_CHANNELS,
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    VideoCoder,
    frame_groups,
    normalised,
    unnormalised,
)
from .vae_layers import DoublingConv2d

Past = dict[nn.Module, Tensor]  # the last frame (1, c, h, w) that each block was given
WIDTH = 64  # of the published networks, where they see whole pictures
BLOCKS = 3  # in each of three stages
CLAMP = 3.0
BEFORE = TEMPORAL_STRIDE - 1  # frames that are decoded before frame 0
LAST_LAYER, FIRST_LAYER, LATENT_LAYER = "decoder.22", "encoder.0", "decoder.1"
SHRINK, WIDEN, NARROW = (2, 7, 12), (7, 13, 19), (8, 14, 20)  # layers that change the rate of frames, and widths


class Clamp(nn.Module):
    """Latents softly into -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / CLAMP) * CLAMP


class PastBlock(nn.Module):
    """A residual block of frames (t, c, h, w), each beside the frame before it."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            Conv2d(2 * width, width, 3, padding=1), nn.ReLU(),
            Conv2d(width, width, 3, padding=1), nn.ReLU(),
            Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, past: Past) -> Tensor:
        before = past.get(self)
        before = torch.zeros_like(x[:1]) if before is None else before
        past[self] = x[-1:].clone()  # a view would keep the whole group alive
        return F.relu(self.conv(torch.cat([x, torch.cat([before, x[:-1]])], dim=1)) + x)


class Pool(nn.Module):
    """`rate` frames become one: (t, c, h, w) -> (t / rate, c, h, w)."""

    def __init__(self, width: int, rate: int):
        super().__init__()
        self.conv = Conv2d(rate * width, width, 1, bias=False)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unflatten(0, (-1, self.rate)).flatten(1, 2))


class Grow(nn.Module):
    """One frame becomes `rate`: (t, c, h, w) -> (t rate, c, h, w)."""

    def __init__(self, width: int, rate: int):
        super().__init__()
        self.conv = Conv2d(width, rate * width, 1, bias=False)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.rate, -1)).flatten(0, 1)


def encoder(width: int, rates: tuple[int, ...]) -> nn.Sequential:
    layers = [Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for rate in rates:
        layers += [Pool(width, rate), Conv2d(width, width, 3, stride=2, padding=1, bias=False)]
        layers += [PastBlock(width) for _ in range(BLOCKS)]
    return nn.Sequential(*layers, Conv2d(width, LATENT_CHANNELS, 3, padding=1))


def decoder(widths: tuple[int, ...], rates: tuple[int, ...]) -> nn.Sequential:
    layers = [Clamp(), Conv2d(LATENT_CHANNELS, widths[0], 3, padding=1), nn.ReLU()]
    for before, after, rate in zip(widths[:-1], widths[1:], rates, strict=True):
        layers += [PastBlock(before) for _ in range(BLOCKS)]
        # nn.Identity is in the place of the published doubling of the picture, which waits for the convolution
        layers += [nn.Identity(), Grow(before, rate), DoublingConv2d(before, after, 3, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), Conv2d(widths[-1], 3, 3, padding=1))


class TinyVAE(VideoCoder):
    """Between pixels and raw latents, as the full VAE.

    raw: whether its own latents are the full VAE's as they are, or normalised as the diffusion model sees them.
    """

    latent_channels = LATENT_CHANNELS

    def __init__(
        self, width: int = WIDTH, widths: tuple[int, ...] = (256, 128, 64, 64),
        pool: tuple[int, ...] = (2, 2, 1), grow: tuple[int, ...] = (1, 2, 2), raw: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.raw, self.width = raw, width
        self.encoder = encoder(width, pool)
        self.decoder = decoder(widths, grow)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], raw: bool = False) -> TinyVAE:
        """The network whose tensors have these shapes; raises ModelError where it is another family's."""
        try:
            width, widths = shapes["encoder.0.weight"][0], (shapes["decoder.1.weight"][0],)
            widths += tuple(shapes[f"decoder.{layer}.weight"][0] for layer in NARROW)
            pool = tuple(shapes[f"encoder.{layer}.conv.weight"][1] // width for layer in SHRINK)
            grow = tuple(
                shapes[f"decoder.{layer}.conv.weight"][0] // before
                for layer, before in zip(WIDEN, widths, strict=False)
            )
        except KeyError as error:
            raise ModelError(
                f"This tiny VAE lacks {error}. Load an unmodified taew2_1 or lighttaew2_1, or the full Wan2.1_VAE.pth."
            ) from None
        rates = [a * b * c for a, b, c in (pool, grow)]
        if rates != [TEMPORAL_STRIDE] * 2:
            raise ModelError(
                f"This tiny VAE makes one latent frame of {rates[0]} frames and {rates[1]} frames of one, but those of "
                f"Wan 2.1 stand for {TEMPORAL_STRIDE}. Load taew2_1 or lighttaew2_1."
            )
        return cls(width, widths, pool, grow, raw)

    def encode_groups(self, pixels: Tensor) -> Iterator[Tensor]:
        """Each latent frame sees its four frames from the first on; after the last one the clip stands still."""
        past, device = {}, next(self.parameters()).device
        frames = (pixels.shape[2] - 1) // TEMPORAL_STRIDE + 1
        for begin, end in frame_groups(frames, pixels.shape[3] * pixels.shape[4] // SPATIAL_STRIDE**2):
            group = pixels[0, :, begin * TEMPORAL_STRIDE : end * TEMPORAL_STRIDE].transpose(0, 1).to(device)
            missing = (end - begin) * TEMPORAL_STRIDE - len(group)
            group = torch.cat([group, group[-1:].expand(missing, -1, -1, -1)])
            latents = as_clip(run(self.encoder, group / 2 + 0.5, past))
            yield latents if self.raw else unnormalised(latents)

    def decode_groups(self, latents: Tensor) -> Iterator[Tensor]:
        past, device = {}, next(self.parameters()).device
        for begin, end in frame_groups(latents.shape[2], latents.shape[3] * latents.shape[4]):
            group = latents[:, :, begin:end].to(device)
            group = group if self.raw else normalised(group)
            pixels = as_clip(run(self.decoder, group[0].transpose(0, 1), past))
            yield pixels[:, :, 0 if begin else BEFORE :] * 2 - 1


def as_clip(frames: Tensor) -> Tensor:
    """(t, c, h, w) -> (1, c, t, h, w)."""
    return frames.transpose(0, 1)[None]


def run(layers: nn.Sequential, x: Tensor, past: Past) -> Tensor:
    """Call the layers in turn; the blocks are given the past."""
    for layer in layers:
        x = layer(x, past) if isinstance(layer, PastBlock) else layer(x)
    return x
