"""The layers of the Wan 2.1 VAE, exact re-formulations of the published ones that run faster.

- Activations stay in channels-last order from end to end, so that norms, 1x1 convolutions and attention read
  whole channel vectors, and taking frames apart or together is a view.
- A clip begins with nothing before it. The published layers convolve zeros there; these skip the taps that would
  meet only zeros, which makes a single image a 2-D network.
- Doubling an image to its nearest neighbours and convolving it with 3x3 weights reads each pixel several times:
  the same sums come from 2x2 convolutions of the small image, with 4/9 of the multiplications.

Every temporal layer looks only backwards. What it must know of the past lives in a `Memory`, so a clip can be
coded in groups of frames; the layers themselves hold nothing but weights, under their published names. The type of
the input decides the arithmetic, whatever type the weights are stored in.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import compute
from . import winograd
from .layers import Conv2d, widened

CUBE, TIME, POINT = (3, 3, 3), (3, 1, 1), (1, 1, 1)  # kernels: frames, rows, columns


class Memory:
    """What the layers keep between two groups of frames of one clip: each its last input frames.

    final: no group follows this one, so nothing has to be kept any more.
    """

    def __init__(self, final: bool = False):
        self.final = final
        self.kept: dict[nn.Module, list[Tensor]] = {}
        self.seen: Counter[nn.Module] = Counter()  # how many frames each layer was given so far

    def recall(self, layer: nn.Module, x: Tensor, count: int) -> list[Tensor]:
        """(b, c, t, h, w) -> its frames (b, c, h, w) behind the last `count` ones.

        Before a clip begins there is nothing: several frames get zeros in front, a single one only what there is.
        """
        seen, frames = self.seen[layer], x.unbind(2)
        self.seen[layer] += len(frames)
        if len(frames) == 1:
            return [*self.kept.get(layer, [])[-seen:], *frames]
        return [*self.kept.get(layer, [torch.zeros_like(frames[0])] * count), *frames]

    def keep(self, layer: nn.Module, frames: list[Tensor], count: int) -> None:
        """Remember the last `count` of these frames, which may begin with those remembered before."""
        if self.final:
            return
        # Into the same places, as long as the clip lasts: new ones would scatter the heap, views keep all frames alive.
        # What autograd has seen must stay as it was.
        if layer not in self.kept or torch.is_grad_enabled():
            self.kept[layer] = [torch.zeros_like(frames[0]) for _ in range(count)]
        for place, frame in zip(self.kept[layer][-len(frames) :], frames[-count:], strict=True):
            place.copy_(frame)

    def split_first(self, layer: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Frame 0 of the clip, if x begins with it, and the other frames."""
        first = 0 if self.seen[layer] else 1
        self.seen[layer] += x.shape[2]
        return [x[:, :, :1]] * first, x[:, :, first:]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def frames_apart(x: Tensor) -> Tensor:
    """(b, c, t, h, w) -> (b t, c, h, w), a view in channels-last order."""
    # merging sides of one would lose the strides by which torch knows channels-last order
    return x[:, :, 0] if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)


def frames_together(x: Tensor, batch: int) -> Tensor:
    """(b t, c, h, w) -> (b, c, t, h, w), a view in channels-last order."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def stack_frames(frames: list[Tensor]) -> Tensor:
    """Frames (b, c, h, w) -> (b, c, t, h, w) in channels-last order."""
    return torch.stack([frame.movedim(1, -1) for frame in frames], dim=1).movedim(-1, 1)


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution, padded in space as usual and in time with past frames only."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], time_stride: int = 1):
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_channels, out_channels, kernel, (time_stride, 1, 1), padding)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        weight, bias = widened(self.weight, x), widened(self.bias, x)
        if self.kernel_size == POINT:
            return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
        past = self.kernel_size[0] - self.stride[0]
        frames = memory.recall(self, x, past)
        if self.kernel_size == TIME:
            out = mix_frames(frames, weight.flatten(2), bias, self.stride[0])
        elif x.shape[2] == 1:
            out = convolve_last(frames, weight, bias)[:, :, None]
        elif winograd.pays(x):
            out = winograd.convolve_frames(frames, weight, bias)
        else:
            out = convolve(stack_frames(frames), weight, bias, self.padding)
        memory.keep(self, frames, past)
        return out


def convolve(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int, int]) -> Tensor:
    """F.conv3d with oneDNN where it can: torch takes a way ten times slower for one clip with few channels."""
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if fits and not compute.PLAIN:
        return torch.mkldnn_convolution(x, weight, bias, padding, (1, 1, 1), (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, padding=padding)


def convolve_last(frames: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """The last frame of a 3x3x3 convolution: up to three frames (b, c, h, w) -> (b, d, h, w)."""
    taps = weight.unbind(2)[-len(frames) :]  # those that meet a frame
    out = F.conv2d(frames[0], taps[0], bias, padding=1)
    for frame, tap in zip(frames[1:], taps[1:], strict=True):
        out += F.conv2d(frame, tap, padding=1)
    return out


def mix_frames(frames: list[Tensor], weight: Tensor, bias: Tensor, step: int) -> Tensor:
    """A convolution over time alone: t frames (b, c, h, w) and (d, c, taps) -> (b, d, (t - taps) // step + 1, h, w)."""
    frames = [frame.movedim(1, -1) for frame in frames]
    taps = weight.unbind(2)[-len(frames) :]  # before the clip there is nothing to see
    mixed = []
    for begin in range(0, len(frames) - len(taps) + 1, step):
        products = (F.linear(frame, tap) for frame, tap in zip(frames[begin:], taps, strict=False))
        mixed.append(sum(products, bias))
    return torch.stack(mixed, dim=1).movedim(-1, 1)


class RMSNorm(nn.Module):
    """Divides each position by the root mean square over its channels."""

    def __init__(self, channels: int, dimensions: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dimensions))

    def forward(self, x: Tensor) -> Tensor:
        x, gamma = x.movedim(1, -1), widened(self.gamma, x).flatten()
        if x.device.type == "cuda" or compute.PLAIN:
            return F.rms_norm(x, gamma.shape, gamma, eps=1e-24).movedim(-1, 1)
        # torch's own takes six passes over x on a CPU
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        x = x * (x.shape[-1] ** 0.5 / norm).to(x.dtype)
        return (x * gamma if torch.is_grad_enabled() else x.mul_(gamma)).movedim(-1, 1)


class SiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())  # it follows a norm, whose result nobody else reads


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_channels, 3), SiLU(), CausalConv3d(in_channels, out_channels, CUBE),
            RMSNorm(out_channels, 3), SiLU(), nn.Dropout(0.0), CausalConv3d(out_channels, out_channels, CUBE),
        )  # fmt: skip
        self.shortcut = CausalConv3d(in_channels, out_channels, POINT) if in_channels != out_channels else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x, memory)
        return run(self.residual, x, memory).add_(shortcut)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution, published as such, of tokens (..., c)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, widened(self.weight, tokens).flatten(1), widened(self.bias, tokens))


class AttentionBlock(nn.Module):
    """Self-attention over the positions of each single frame, one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = PointwiseConv2d(channels, channels * 3, 1)
        self.proj = PointwiseConv2d(channels, channels, 1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        b, c, t, h, w = x.shape
        tokens = frames_apart(self.norm(x)).flatten(2).transpose(1, 2)[:, None]  # (b t, 1, h w, c), one head
        q, k, v = self.to_qkv(tokens).chunk(3, dim=-1)
        tokens = self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + tokens.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)


class Downsample(nn.Module):
    """Halves height and width, and on request the frame rate: frame 0 stays, then two become one."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, TIME, time_stride=2) if time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = frames_together(self.resample(frames_apart(x)), x.shape[0])
        if self.time_conv is None:
            return x
        parts, x = memory.split_first(self, x)
        for first in parts:
            memory.kept[self.time_conv] = [first[:, :, 0].clone()]
        if x.shape[2]:
            parts.append(self.time_conv(x, memory))
        return torch.cat(parts, dim=2)


class DoublingConv2d(nn.Conv2d):
    """Nearest neighbours at twice the size, then a 3x3 convolution, in one: (n, c, h, w) -> (n, d, 2h, 2w).

    Row 2i of the large image sees rows i-1 and i of the small one, row 2i+1 sees i and i+1, and so do columns: each of
    the four phases is a 2x2 convolution. One call computes all four at every 2x2 window of the padded image; phase
    (p, q) then takes the windows that begin at (p, q).
    """

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        weight, bias = widened(self.weight, x), widened(self.bias, x)
        if compute.PLAIN:
            return F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, padding=1)
        bias = None if bias is None else bias.repeat(4)
        windows = F.conv2d(x, phase_weights(weight), bias, padding=1)  # (n, 4 d, h+1, w+1)
        out = x.new_empty(n, 2 * h, 2 * w, self.out_channels).permute(0, 3, 1, 2)
        for phase, values in enumerate(windows.chunk(4, dim=1)):
            p, q = divmod(phase, 2)
            out[:, :, p::2, q::2] = values[:, :, p : p + h, q : q + w]
        return out


def phase_weights(weight: Tensor) -> Tensor:
    """(d, c, 3, 3) over a doubled image -> (4 d, c, 2, 2) over the small one, phases (0,0) (0,1) (1,0) (1,1)."""
    # taps[p] sums the three taps that fall on each of the two rows (or columns) that phase p sees
    taps = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    phases = torch.einsum("pik,qjl,dckl->pqdcij", taps, taps, weight).flatten(0, 2)
    return phases.contiguous(memory_format=torch.channels_last)


class Upsample(nn.Module):
    """Doubles height and width, and on request the frame rate: frame 0 stays, then one becomes two."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        # nn.Identity is in the place of the published nn.Upsample
        self.resample = nn.Sequential(nn.Identity(), DoublingConv2d(channels, channels // 2, 3))
        self.time_conv = CausalConv3d(channels, channels * 2, TIME) if time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        if self.time_conv is not None:
            x = self.double_time(x, memory)
        return frames_together(self.resample(frames_apart(x)), x.shape[0])

    def double_time(self, x: Tensor, memory: Memory) -> Tensor:
        # Frame 0 is neither doubled nor remembered: the published network was trained so.
        parts, x = memory.split_first(self, x)
        if x.shape[2]:
            # the two halves of the channels are the even and the odd frames
            even, odd = self.time_conv(x, memory).chunk(2, dim=1)
            parts.append(channels_last(torch.stack([even, odd], dim=3).flatten(2, 3)))
        return torch.cat(parts, dim=2)


def run(layers, x: Tensor, memory: Memory) -> Tensor:
    """Call the layers in turn; those that look into the past are given the memory."""
    for layer in layers:
        x = layer(x) if isinstance(layer, RMSNorm | SiLU | nn.Dropout) else layer(x, memory)
    return x
