"""Bringing somebody's pictures to the size and length a model can use, and saying what was done."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

FITS = ("cover", "contain", "stretch")
EXTENSIONS = ("hold", "loop")


def fit_clip(
    images: Tensor, width: int, height: int, num_frames: int, fit: str = "cover", extend: str = "hold"
) -> tuple[Tensor, str | None]:
    """Images (F, H, W, 1, 3 or 4) in 0..1 as a clip (num_frames, height, width, 3), and a sentence on what changed.

    fit: see `fit_pictures`; extend: see `fit_length`.
    """
    clip, note = fit_images(images[:num_frames], width, height, fit)
    notes = [note] if note else []
    frames = len(images)
    if frames > num_frames:
        notes.append(f"Of {frames} frames the first {num_frames} are used.")
    if frames < num_frames:
        how = "are repeated" if extend == "loop" else "are used, and the last of them held,"
        notes.append(f"The {frames} frames {how} to fill {num_frames}.")
    return fit_length(clip, num_frames, extend), " ".join(notes) or None


def fit_images(
    images: Tensor, width: int, height: int, fit: str = "cover", background: float = 0.0
) -> tuple[Tensor, str | None]:
    """Images (F, H, W, 1, 3 or 4) in 0..1 as (F, height, width, 3), and a sentence if their size changed.

    Grey becomes RGB; behind what is transparent lies the background, a grey in 0..1.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or 0 in images.shape:
        raise InputError(
            f"The images have the shape {tuple(images.shape)}, but needed is (frames, height, width, 3). "
            "Connect an IMAGE output."
        )
    old_height, old_width = images.shape[1:3]
    changed = (old_width, old_height) != (width, height)
    notes = [f"The images of {old_width}x{old_height} were fitted to {width}x{height} ({fit})."] if changed else []
    colours = images[..., :3].expand(-1, -1, -1, 3)
    if images.shape[-1] == 4:
        colours = torch.lerp(torch.full_like(colours, background), colours, images[..., 3:])
        if (images[..., 3] < 1).any():
            notes.append(f"What is transparent was made {'white' if background else 'black'}.")
    return fit_pictures(colours, width, height, fit, background), " ".join(notes) or None


def fit_pictures(images: Tensor, width: int, height: int, fit: str = "cover", background: float = 0.0) -> Tensor:
    """Images (F, H, W, 3) as (F, height, width, 3).

    cover: scaled until nothing is empty, the overhang cut off evenly; contain: scaled until all is visible, the
    background (black) around it; stretch: both sides scaled by themselves. Scaling is bicubic, filtered so that
    shrinking does not alias.
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
    planes = F.pad(planes, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=background)
    return planes.movedim(1, -1)


def fit_length(images: Tensor, num_frames: int, extend: str = "hold") -> Tensor:
    """The first `num_frames` of images (F, ...). Where there are fewer, hold the last one, or loop through all."""
    if extend not in EXTENSIONS:
        raise InputError(f"extend is {extend!r}, but only {', '.join(EXTENSIONS)} exist. Choose one of them.")
    if len(images) >= num_frames:
        return images[:num_frames]
    numbers = torch.arange(num_frames, device=images.device)
    return images[numbers % len(images) if extend == "loop" else numbers.clamp(max=len(images) - 1)]
