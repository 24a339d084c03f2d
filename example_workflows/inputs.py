"""Draws the pictures and clips that the example workflows begin with, into `input/`: scenes of the toy world.

They stand where the user's own files go, and keep every example runnable until then. Those in `tiny` are for
`wanflow run --tiny`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..nodes.headless import toys
from ..wan_core.tiny.measure import shape_mask
from ..wan_core.tiny.tasks import outlines
from ..wan_core.tiny.world import Scene, render
from ..wan_core.video import save_video
from . import pink

FOLDER = Path(__file__).parent / "input"
PICTURE = (480, 832)  # height, width
CLIP, NUM_FRAMES, FRAME_RATE, QUALITY = (240, 416), 41, 8, 3  # five seconds in a few kB
MARGIN = 4  # pixels, around what VACE paints anew

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


def tiny_inputs() -> dict[str, np.ndarray]:
    """Likewise for the twins, of their size; (F, height, width, 4) where there is transparency."""
    ball, block, hidden = (draw(scene) for scene in (toys.BALL, toys.BLOCK, toys.HIDDEN))
    box = np.zeros((*hidden.shape[1:3], 1), np.float32)
    rows, columns = (np.flatnonzero(shape_mask(hidden).any((0, axis))) for axis in (2, 1))
    box[rows[0] - MARGIN : rows[-1] + 1 + MARGIN, columns[0] - MARGIN : columns[-1] + 1 + MARGIN] = 1
    return {
        "tiny/first.webp": ball[:1],
        "tiny/last.webp": ball[-1:],
        "tiny/still.webp": draw(toys.STILL)[:1],
        "tiny/clip.webp": ball,
        "tiny/outlines.webp": outlines(block),
        "tiny/subject.webp": draw(toys.SUBJECT)[:1],
        "tiny/hole.webp": np.where(box > 0, 0.5, hidden)[:1],  # nothing else in it moves
        "tiny/mask.webp": np.concatenate([box, box, box, 1 - box], -1)[None],  # in its colours and in its alpha
    }


def draw(scene: Scene) -> np.ndarray:
    return render(scene, toys.PRESET.num_frames, toys.PRESET.height, toys.PRESET.width)


def training_clips() -> dict[str, np.ndarray]:
    """The clips to train on, by the names of their files."""
    return {f"{pink.FOLDER}/{name}": frames for name, frames, _ in pink.clips()}


def write_inputs() -> list[Path]:
    """Write all of them; the paths."""
    for folder in (pink.FOLDER, "tiny"):
        (FOLDER / folder).mkdir(parents=True, exist_ok=True)
    for name, frames in inputs().items():
        if name.endswith(".png"):
            Image.fromarray((frames[0] * 255).round().astype(np.uint8)).save(FOLDER / name, optimize=True)
        else:
            save_video(torch.from_numpy(frames), FOLDER / name, FRAME_RATE, QUALITY)
    for name, frames in training_clips().items():
        save_video(torch.from_numpy(frames), FOLDER / name, FRAME_RATE, quality=10)
    for name, frames in tiny_inputs().items():
        first, *rest = (Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in frames)
        more = {"save_all": True, "append_images": rest, "duration": 1000 // toys.PRESET.fps} if rest else {}
        first.save(FOLDER / name, lossless=True, exact=True, method=6, **more)
    (FOLDER / pink.FOLDER / pink.TABLE).write_text(pink.table(pink.clips()), encoding="utf-8")
    return sorted(path for path in FOLDER.rglob("*") if path.is_file())
