"""Which picture sizes and clip lengths Wan 2.1 can make, and the shape of their latents.

The VAE makes one latent pixel of 8x8 pixels, the DiT one token of 2x2 latent pixels: sides are multiples of 16.
Frame 0 becomes latent frame 0 and every further four frames one more: lengths are 4n+1.
"""

from __future__ import annotations

from .errors import InputError

LATENT_CHANNELS = 16
SIDE_MULTIPLE = 16
PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4


def snap_size(width: int, height: int, num_frames: int) -> tuple[int, int, int, str | None]:
    """The nearest possible size that is not smaller: (width, height, num_frames, note).

    Sizes are in pixels. The note is None if nothing changed, else a sentence for the user.
    Raises InputError for anything below 1.
    """
    for name, value in (("width", width), ("height", height), ("num_frames", num_frames)):
        if value < 1:
            raise InputError(f"{name} is {value}, but a video needs at least 1. Enter a positive {name}.")
    snapped_width, snapped_height = round_up(width, SIDE_MULTIPLE), round_up(height, SIDE_MULTIPLE)
    snapped_frames = round_up(num_frames - 1, FRAMES_PER_LATENT) + 1
    changes = []
    if (snapped_width, snapped_height) != (width, height):
        changes.append(
            f"The size {width}x{height} was rounded up to {snapped_width}x{snapped_height} "
            f"(Wan needs multiples of {SIDE_MULTIPLE})."
        )
    if snapped_frames != num_frames:
        changes.append(f"The length of {num_frames} frames was rounded up to {snapped_frames} (Wan needs 4n+1).")
    return snapped_width, snapped_height, snapped_frames, " ".join(changes) or None


def latent_shape(width: int, height: int, num_frames: int, batch_size: int = 1) -> tuple[int, int, int, int, int]:
    """(b, 16, T, h, w) of the latents of such a video; the size must be one that `snap_size` returns."""
    snapped = snap_size(width, height, num_frames)
    if snapped[:3] != (width, height, num_frames):
        raise InputError(
            f"A video of {width}x{height} with {num_frames} frames has no latent; "
            f"use {snapped[0]}x{snapped[1]} with {snapped[2]} frames."
        )
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, but at least 1 video has to be made. Enter 1 or more.")
    frames = (num_frames - 1) // FRAMES_PER_LATENT + 1
    return batch_size, LATENT_CHANNELS, frames, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


def pixel_size(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(num_frames, height, width) in pixels, of a video whose latents are (frames, height, width)."""
    return (frames - 1) * FRAMES_PER_LATENT + 1, height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
