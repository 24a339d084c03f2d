"""Draws the pictures and clips that the example workflows begin with, into `input/`: scenes of the toy world.

They stand where the user's own files go, and keep every example runnable until then.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..wan_core.tiny.world import Scene, render
from ..wan_core.video import save_video
from . import pink

FOLDER = Path(__file__).parent / "input"
PICTURE = (480, 832)  # height, width
CLIP, NUM_FRAMES, FRAME_RATE, QUALITY = (240, 416), 41, 8, 3  # five seconds in a few kB

FIRST_IMAGE, LAST_IMAGE, REFERENCE_IMAGE = "toy_first_image.png", "toy_last_image.png", "toy_reference_image.png"
VIDEO, DEPTH_VIDEO, MASK = "toy_video.mp4", "toy_depth_video.mp4", "toy_mask.png"

BALL = Scene("red", "circle", "left", "blue")
NEARNESS = replace(BALL, color="white", background="black")  # what depth videos show: near is bright, far is dark
AROUND = Scene("white", "square", "left", "black", radius=0.48, travel=0)  # wide enough for the whole way of the ball
PYRAMID = Scene("green", "triangle", "left", "white", radius=0.3, travel=0)


def inputs() -> dict[str, np.ndarray]:
    """Every file by name, as frames (F, height, width, 3) in 0..1; pictures have one."""
    pictures = render(BALL, NUM_FRAMES, *PICTURE)
    return {
        FIRST_IMAGE: pictures[:1],
        LAST_IMAGE: pictures[-1:],
        REFERENCE_IMAGE: render(PYRAMID, 1, *PICTURE),
        MASK: render(AROUND, 1, *PICTURE).round(),
        VIDEO: render(BALL, NUM_FRAMES, *CLIP),
        DEPTH_VIDEO: render(NEARNESS, NUM_FRAMES, *CLIP),
    }


def training_clips() -> dict[str, np.ndarray]:
    """The clips to train on, by the names of their files."""
    return {f"{pink.FOLDER}/{name}": frames for name, frames, _ in pink.clips()}


def write_inputs() -> list[Path]:
    """Write all of them; the paths."""
    (FOLDER / pink.FOLDER).mkdir(parents=True, exist_ok=True)
    for name, frames in inputs().items():
        if name.endswith(".png"):
            Image.fromarray((frames[0] * 255).round().astype(np.uint8)).save(FOLDER / name, optimize=True)
        else:
            save_video(torch.from_numpy(frames), FOLDER / name, FRAME_RATE, QUALITY)
    for name, frames in training_clips().items():
        save_video(torch.from_numpy(frames), FOLDER / name, FRAME_RATE, quality=10)
    (FOLDER / pink.FOLDER / pink.TABLE).write_text(pink.table(pink.clips()), encoding="utf-8")
    return sorted(path for path in FOLDER.rglob("*") if path.is_file())
