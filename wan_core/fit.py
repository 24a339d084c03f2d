"""Bringing somebody's pictures to the size and length a model can use, and saying what was done."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

FITS = ("cover", "contain", "stretch")


def fit_clip(images: Tensor, width: int, height: int, num_frames: int, fit: str = "cover") -> tuple[Tensor, str | None]:
    """Images (F, H, W, 3 or 4) in 0..1 as a clip (num_frames, height, width, 3), and a sentence on what changed."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
        raise InputError(
            f"The images have the shape {tuple(images.shape)}, but a clip is (frames, height, width, 3). "
            "Connect an IMAGE output."
        )
    frames, old_height, old_width, _ = images.shape
    notes = []
    if (old_width, old_height) != (width, height):
        notes.append(f"The images of {old_width}x{old_height} were fitted to {width}x{height} ({fit}).")
    if frames > num_frames:
        notes.append(f"Of {frames} frames the first {num_frames} are used.")
    if frames < num_frames:
        notes.append(f"The last of {frames} frames is held to fill {num_frames}.")
    clip = fit_pictures(images[:num_frames, ..., :3], width, height, fit)
    return fit_length(clip, num_frames), " ".join(notes) or None


def fit_pictures(images: Tensor, width: int, height: int, fit: str = "cover") -> Tensor:
    """Images (F, H, W, 3) as (F, height, width, 3).

    cover: scaled until nothing is empty, the overhang cut off evenly; contain: scaled until all is visible, black
    around it; stretch: both sides scaled by themselves. Scaling is bicubic, filtered so that shrinking does not alias.
    """
    if fit not in FITS:
        raise InputError(f"fit is {fit!r}, but only {', '.join(FITS)} exist. Choose one of them.")
    old_height, old_width = images.shape[1:3]
    if (old_width, old_height) == (width, height):
        return images
    scales = (height / old_height, width / old_width)
    if fit == "cover":
        scales = (max(scales),) * 2
    elif fit == "contain":
        scales = (min(scales),) * 2
    size = max(1, round(old_height * scales[0])), max(1, round(old_width * scales[1]))
    planes = images.movedim(-1, 1)  # (F, 3, H, W)
    planes = F.interpolate(planes, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    rows, columns = height - size[0], width - size[1]  # negative where there is overhang
    planes = F.pad(planes, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return planes.movedim(1, -1)


def fit_length(images: Tensor, num_frames: int) -> Tensor:
    """The first `num_frames` of images (F, ...), the last one held where there are fewer."""
    missing = num_frames - len(images)
    if missing <= 0:
        return images[:num_frames]
    return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])])
