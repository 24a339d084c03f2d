"""Clips and pictures on disk: what is in them, found out once, and reading a piece of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import FileError
from ..fit import fit_pictures
from ..saving import write_whole
from ..video import VIDEO_SUFFIXES, read_video, video_facts
from .cache import file_digest

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
MEDIA_SUFFIXES = (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES)


@dataclass(frozen=True)
class Facts:
    """Of a file: its size in pixels, and its length at the frame rate that was asked for."""

    width: int
    height: int
    frames: int


class Library:
    """What was found out about files, kept in a file of its own: a data set is looked through once, not at every start.

    A file that has changed since, in size or time, is looked at again.
    """

    def __init__(self, file: Path):
        self.file = file
        self.known: dict[str, dict] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.is_saved = True

    def facts(self, path: Path, frame_rate: float, most: int = 0) -> Facts:
        """Of a clip at this rate (0: its own), or a picture. Where `most` is given, longer clips count as so long.

        Raises FileError for what is neither.
        """
        return Facts(*self._known(path, f"{frame_rate:g} {most}", lambda: measure(path, frame_rate, most)))

    def content(self, path: Path) -> str:
        """A name for what is in the file."""
        return self._known(path, "content", lambda: file_digest(path))

    def _known(self, path: Path, what: str, find: Callable[[], Any]) -> Any:
        state = path.stat()
        about = self.known.setdefault(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}", {})
        if what not in about:
            about[what] = find()
            self.is_saved = False
        return about[what]

    def save(self) -> None:
        """Only where there is something new: other processes may read the same file."""
        if not self.is_saved:
            text = json.dumps(self.known)
            write_whole({self.file: lambda file: file.write_text(text, encoding="utf-8")})
            self.is_saved = True


def measure(path: Path, frame_rate: float, most: int) -> tuple[int, int, int]:
    """(width, height, frames)."""
    if is_picture(path):
        _, height, width, _ = read_picture(path).shape
        return width, height, 1
    return video_facts(path, frame_rate, most)


def is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_SUFFIXES


def read_clip(file: Path, frame_rate: float, start: int, frames: int, size: tuple[int, int] | None = None) -> Tensor:
    """(frames, height, width, 3) in 0..1 of a clip from a frame on; of a picture, itself. `size` is (width, height).

    Raises FileError where the clip ends before.
    """
    if is_picture(file):
        return fit_pictures(read_picture(file), *size) if size else read_picture(file)
    clip, _ = read_video(file, frame_rate, frames, size, start)
    if len(clip) < frames:
        raise FileError(f"{file} ends after {start + len(clip)} frames, before the {start + frames} that it announces.")
    return clip


def read_picture(file: Path) -> Tensor:
    """(1, H, W, 3) in 0..1."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.float32) / 255
    except (OSError, UnidentifiedImageError) as error:
        raise FileError(f"{file} could not be read as a picture. It may be damaged.") from error
    return torch.from_numpy(pixels)[None]
