"""VACE: what to keep of a video, what to make anew, and who is in it.

Source: Jiang et al., "VACE: All-in-One Video Creation and Editing", arXiv 2503.07598, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.blocks import Step, plus
from ..models.network import Network
from ..models.vace import VACE
from ..models.vae import normalised
from ..size import FRAMES_PER_LATENT, PIXELS_PER_LATENT, pixel_size
from .image import Encode, as_pixels
from .injection import Canvas, Condition, Injection, misfit


@dataclass(frozen=True, eq=False)
class VACECondition(Condition):
    """Latents are normalised.

    kept, changed  (1, 16, T, h, w): the video without what the mask makes anew, and that alone; grey elsewhere
    mask           (1, 64, T, h, w): 1 where the video is made anew
    references     (1, 16, P, h, w): pictures of who or what is in the video, None without
    strength       of the hints; 1 as trained
    """

    kept: Tensor
    changed: Tensor
    mask: Tensor
    references: Tensor | None = None
    strength: float = 1.0

    @property
    def in_front(self) -> int:
        return 0 if self.references is None else self.references.shape[2]

    def inject(self, network: Network, canvas: Canvas) -> Injection:
        if network.vace is None:
            models = "a VACE model, add a VACE module with Add Wan Module"
            raise misfit(network, "VACE video, mask or reference image", models, "Wan VACE")
        parts = [canvas.take("The VACE video", x) for x in (self.kept, self.changed, self.mask)]
        context, prefix = torch.cat(parts, dim=1), 0  # (1, 96, T, h, w)
        references = self.references
        if references is not None:
            prefix = references.shape[2]
            references = canvas.take("The VACE reference image", references, frames=prefix)
            front = F.pad(references, (0, 0) * 3 + (0, context.shape[1] - references.shape[1]))
            context = torch.cat([front, context], dim=2)  # (1, 96, P+T, h, w)
        residuals = VACEResiduals(network.vace, context, self.strength, network.trunk.layout.layers, prefix)
        return Injection(block_residuals=(residuals,), prefix_frames=references)


def vace_condition(
    video: Tensor | None,
    mask: Tensor | None,
    references: Tensor | None,
    size: tuple[int, int, int],
    encode: Encode,
    strength: float = 1.0,
) -> VACECondition:
    """Prepare a video (4n+1, 8h, 8w, 3) in 0..1, a mask (4n+1, 8h, 8w) in 0..1 (1: made anew) and reference pictures
    (P, 8h, 8w, 3) for a video whose latents have the size (T, h, w). Without a video all is grey, without a mask all
    is made anew.
    """
    frames, height, width = pixel_size(*size)
    pixels = torch.zeros(1, 3, frames, height, width) if video is None else as_pixels(video)
    mask = torch.ones(frames, height, width) if mask is None else mask.float()
    pictures = () if references is None else references.split(1)  # each is a clip of its own
    return VACECondition(
        kept=normalised(encode(pixels * (1 - mask))),
        changed=normalised(encode(pixels * mask)),
        mask=fold_mask(mask),
        references=torch.cat([normalised(encode(as_pixels(x))) for x in pictures], dim=2) if pictures else None,
        strength=strength,
    )


def fold_mask(mask: Tensor) -> Tensor:
    """(4n+1, 8h, 8w) -> (1, 64, n+1, h, w): a channel for each pixel under a latent one, of n+1 frames that lie
    evenly in the clip."""
    frames, side = mask.shape[0], PIXELS_PER_LATENT
    channels = mask.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (F, h, 8, w, 8)
    channels = channels.permute(2, 4, 0, 1, 3).flatten(0, 1)[None]  # (1, 64, F, h, w)
    size = ((frames - 1) // FRAMES_PER_LATENT + 1, *channels.shape[3:])
    return F.interpolate(channels, size, mode="nearest-exact")


@dataclass(frozen=True, eq=False)
class VACEResiduals:
    """`context` (b, 96, P+T, h, w): kept frames, changed frames and the mask, as VACE reads them; P = `prefix`."""

    module: VACE
    context: Tensor
    strength: float
    trunk_layers: int
    prefix: int = 0

    def start(self, x: Tensor, step: Step, around: Callable) -> Callable[[int, Tensor], Tensor]:
        hints = self.hints(x, step, around)
        next(hints)  # its first block reads the trunk's tokens, which the trunk's own blocks write over
        places = self.module.places(self.trunk_layers)

        def add(i: int, x: Tensor) -> Tensor:
            return plus(x, next(hints), self.strength) if i in places else x

        return add

    def hints(self, trunk: Tensor, step: Step, around: Callable):
        """Nothing, then one hint (b, n, dim) after the other, each but the first worked out when it is asked for."""
        x = self.module.vace_patch_embedding(self.context.to(trunk.dtype)).flatten(1, 3)
        x = F.pad(x, (0, 0, step.tokens - x.shape[1], 0))  # zeros for the trunk's reference frames, in front
        x = step.split(x)
        first, *others = self.module.vace_blocks
        x, hint = around(first, x, step, trunk)
        del trunk
        yield
        yield hint
        for block in others:
            del hint
            x, hint = around(block, x, step)
            yield hint

    def rows(self, count: int) -> VACEResiduals:
        b = self.context.shape[0]
        return replace(self, context=self.context.repeat(count // b, 1, 1, 1, 1) if b != count else self.context)

    def frames(self, seen: Tensor) -> VACEResiduals:
        front, rest = self.context.tensor_split([self.prefix], dim=2)
        return replace(self, context=torch.cat([front, rest.index_select(2, seen)], dim=2))

    def beside(self, others: Sequence[VACEResiduals]) -> VACEResiduals:
        return replace(self, context=torch.cat([self.context, *(other.context for other in others)]))
