"""Pictures that a video begins and ends with: Image to Video, First-Last-Frame, Fun InP, Control and Control-Camera."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, ModelError
from ..models.layout import DiTLayout
from ..models.network import Network
from ..models.vae import normalised
from ..size import FRAMES_PER_LATENT, LATENT_CHANNELS, pixel_size
from .injection import Canvas, Condition, Injection, Rank, misfit

Encode = Callable[[Tensor], Tensor]  # pixels (1, 3, F, H, W) in -1..1 -> raw latents (1, 16, T, h, w)
Look = Callable[[Tensor], Tensor]  # a picture (1, H, W, 3) in 0..1 -> its CLIP features (1, 257, 1280)

NODE = "Wan First / Last Image"


@dataclass(frozen=True, eq=False)
class ImageCondition(Condition):
    """What all families need of such pictures; each takes its part.

    latents     (1, 16, T, h, w) normalised: the whole clip, grey where there is no picture
    known       (1, 4, T, h, w): 1 where a picture is given, a channel for each of the four frames of a latent one
    start, end  CLIP features (1, n, 1280) of the first and the last picture, None where there is none
    """

    latents: Tensor
    known: Tensor
    start: Tensor | None = None
    end: Tensor | None = None

    def inject(self, network: Network, canvas: Canvas) -> Injection:
        read = network.trunk.layout.concat
        if "image" not in read:
            models = "an Image to Video, First-Last-Frame or Fun model"
            raise misfit(network, "first or last image", models, NODE)
        latents, known = (canvas.take("The first / last image", x) for x in (self.latents, self.known))
        if set(read) == {"image"}:
            latents = beginning(latents, known)
        given = {"mask": known, "image": latents}
        return Injection(
            concat={name: given[name] for name in read if name in given},
            context_prefix=self.tokens(network, canvas),
            context_rank=Rank.IMAGE,
        )

    def tokens(self, network: Network, canvas: Canvas) -> Tensor | None:
        features = self.features(network.trunk.layout)
        return None if features is None else network.trunk.img_emb(features.to(canvas.device, canvas.dtype))

    def features(self, layout: DiTLayout) -> Tensor | None:
        """What the model looks at: both pictures if it tells them apart by position, else one."""
        if self.end is None or not layout.image_positions:
            return self.end if self.start is None else self.start
        start = torch.zeros_like(self.end) if self.start is None else self.start
        return torch.cat([start, self.end], dim=1)


def beginning(latents: Tensor, known: Tensor) -> Tensor:
    """The first frame and zeros, as camera models read a picture. Raises ModelError if there is more than that."""
    if known[:, :, 1:].any():
        raise ModelError(
            "A Control-Camera model begins with one picture and takes no other. "
            f"Remove the end image, and further frames of the start image, from {NODE}."
        )
    first = latents[:, :, :1] * known[:, :1, :1]
    return torch.cat([first, torch.zeros_like(latents[:, :, 1:])], dim=2)


def image_condition(
    start: Tensor | None, end: Tensor | None, size: tuple[int, int, int], encode: Encode, look: Look | None = None
) -> ImageCondition:
    """Prepare pictures (n, 8h, 8w, 3) in 0..1 to begin and to end a video whose latents have the size (T, h, w).

    Usually n is 1; more are the first or the last frames of the video. Without any picture the condition says that
    nothing is known. Raises InputError if there are more pictures than frames.
    """
    frames, height, width = pixel_size(*size)
    first, last = (0 if pictures is None else len(pictures) for pictures in (start, end))
    if first + last > frames:
        raise InputError(
            f"start_image and end_image have {first} + {last} frames, but the video only {frames}. "
            "Give fewer pictures, or make the video longer."
        )
    known = known_frames(first, last, frames).expand(1, -1, -1, *size[1:])
    if not first + last:
        return ImageCondition(torch.zeros(1, LATENT_CHANNELS, *size), known)
    pixels = torch.zeros(1, 3, frames, height, width)
    if start is not None:
        pixels[:, :, :first] = as_pixels(start)
    if end is not None:
        pixels[:, :, frames - last :] = as_pixels(end)
    return ImageCondition(
        latents=normalised(encode(pixels)),
        known=known,
        start=None if look is None or start is None else look(start[:1]),
        end=None if look is None or end is None else look(end[-1:]),
    )


def known_frames(first: int, last: int, frames: int) -> Tensor:
    """(1, 4, T, 1, 1): 1 for the first and the last so many of the frames; frame 0 fills its latent frame alone."""
    known = torch.zeros(frames)
    known[:first] = 1
    known[frames - last :] = 1
    known = torch.cat([known[:1].expand(FRAMES_PER_LATENT - 1), known])  # (4T,)
    return known.view(-1, FRAMES_PER_LATENT).T[None, :, :, None, None]


def as_pixels(pictures: Tensor) -> Tensor:
    """(F, H, W, 3) in 0..1 -> (1, 3, F, H, W) in -1..1, what the VAE takes."""
    return pictures.float().movedim(-1, 0)[None] * 2 - 1
