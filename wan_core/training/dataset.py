"""What to train on: captions and clips, listed in a table (CSV, JSON, JSONL) or lying side by side in a folder."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import FileError, InputError
from ..fit import fit_pictures
from ..size import FRAMES_PER_LATENT, SIDE_MULTIPLE, latent_shape
from ..video import VIDEO_SUFFIXES, read_video

WAN_RATE = 16.0  # frames a second of the videos that Wan 2.1 was trained on
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
DATA_FILE_KEYS = ("image", "video")


@dataclass(frozen=True)
class Item:
    """A clip or picture and its caption; `place` says where it is listed."""

    prompt: str
    file: Path
    place: str


def list_items(
    base: Path, metadata: Path | None = None, data_file_keys: Sequence[str] = DATA_FILE_KEYS
) -> tuple[list[Item], list[str]]:
    """The items, and a sentence for everything that cannot be one.

    A table has a column `prompt`, and the first of `data_file_keys` that a row fills names its file, below `base`.
    Without a table all clips and pictures below `base` are taken, each with the text file of its name as caption.
    """
    if not base.is_dir():
        raise FileError(f"There is no folder {base}. Name the one that holds the clips.")
    if metadata is None:
        return list_folder(base)
    items, problems = [], []
    for number, row in enumerate(read_table(metadata), start=1):
        place = f"row {number} of {metadata.name}"
        name = next((row[key] for key in data_file_keys if row.get(key)), None)
        prompt = row.get("prompt")
        if not isinstance(name, str) or not isinstance(prompt, str):
            lacking = "prompt" if isinstance(name, str) else "file in " + " or ".join(data_file_keys)
            problems.append(f"{place} is left out: it has no {lacking}.")
        elif not (base / name).is_file():
            problems.append(f"{place} is left out: there is no file {base / name}.")
        else:
            items.append(Item(prompt, base / name, place))
    return items, problems


def list_folder(base: Path) -> tuple[list[Item], list[str]]:
    items, problems = [], []
    for file in sorted(base.rglob("*")):
        if file.suffix.lower() not in (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES):
            continue
        place, caption = str(file.relative_to(base)), file.with_suffix(".txt")
        if caption.is_file():
            items.append(Item(caption.read_text(encoding="utf-8-sig").strip(), file, place))
        else:
            problems.append(f"{place} is left out: there is no caption {caption.name} beside it.")
    return items, problems


def read_csv(text: str) -> list[Mapping]:
    return list(csv.DictReader(io.StringIO(text)))


def read_json_lines(text: str) -> list[Mapping]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


TABLES: dict[str, Callable[[str], list[Mapping]]] = {".csv": read_csv, ".json": json.loads, ".jsonl": read_json_lines}


def read_table(file: Path) -> list[Mapping]:
    """The rows of a table. Raises FileError where it is none."""
    read = TABLES.get(file.suffix.lower())
    if read is None:
        raise FileError(f"{file} is no table that can be read. Give a file that ends in {', '.join(TABLES)}.")
    try:
        rows = read(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileError(f"There is no table {file}. Check the path.") from error
    except ValueError as error:
        raise FileError(f"{file} cannot be read ({error}). It has to be a {file.suffix} table in UTF-8.") from error
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise FileError(f'{file} is no list of rows such as {{"video": "a.mp4", "prompt": "a cat"}}.')
    return rows


@dataclass(frozen=True)
class Framing:
    """How clips are cut to train on. Raises InputError for sizes that cannot work.

    num_frames   4n+1; a shorter clip gives as many as it has, down to the next 4n+1
    height, width   of all clips; without both each keeps its shape, at most max_pixels large, on multiples of 16
    frame_rate   to bring clips to; 0 takes the frames as they come, whatever their rate, as DiffSynth-Studio does
    """

    num_frames: int = 81
    height: int | None = None
    width: int | None = None
    max_pixels: int = 921600
    frame_rate: float = WAN_RATE

    def __post_init__(self):
        if (self.height is None) != (self.width is None):
            raise InputError("Only one of height and width is given. Give both, or none to keep each clip's shape.")
        latent_shape(self.width or SIDE_MULTIPLE, self.height or SIDE_MULTIPLE, self.num_frames)
        if self.max_pixels < SIDE_MULTIPLE**2:
            raise InputError(f"max_pixels is {self.max_pixels}, but the smallest picture has {SIDE_MULTIPLE**2}.")
        if self.frame_rate < 0:
            raise InputError(f"frame_rate is {self.frame_rate}. Enter 16, Wan's own, or 0 to leave clips as they are.")

    def read(self, file: Path) -> Tensor:
        """The clip (4n+1, height, width, 3) in 0..1."""
        if is_picture(file):
            picture = read_picture(file)
            return fit_pictures(picture, *self.size(picture.shape[2], picture.shape[1]))
        clip, _ = read_video(file, self.frame_rate, self.num_frames, self.size(*video_size(file)))
        frames = (len(clip) - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1
        return clip[:frames]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that a clip of this size is brought to."""
        if self.width is not None:
            return self.width, self.height
        shrink = min(1.0, math.sqrt(self.max_pixels / (width * height)))
        return tuple(max(1, int(side * shrink) // SIDE_MULTIPLE) * SIDE_MULTIPLE for side in (width, height))


def is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURE_SUFFIXES


def read_picture(file: Path) -> Tensor:
    """(1, H, W, 3) in 0..1."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.float32) / 255
    except (OSError, UnidentifiedImageError) as error:
        raise FileError(f"{file} could not be read as a picture. It may be damaged.") from error
    return torch.from_numpy(pixels)[None]


def video_size(file: Path) -> tuple[int, int]:
    """(width, height) of a clip's frames."""
    if file.suffix.lower() == ".webp":
        return tuple(reversed(read_picture(file).shape[1:3]))
    reader = imageio_ffmpeg.read_frames(file)
    try:
        return next(reader)["size"]
    except (OSError, RuntimeError, IndexError) as error:  # IndexError where ffmpeg finds no video in the file
        raise FileError(f"{file} could not be read as a video. It may be damaged, or not a video at all.") from error
    finally:
        reader.close()
