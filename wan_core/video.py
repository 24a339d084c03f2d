"""Reading and writing clips: mp4, webm, animated webp and png frames, through imageio-ffmpeg's ffmpeg and Pillow.

The workflow travels in the file, in the form each of ComfyUI's front ends reads when the file is dropped on it: the
tags `prompt` and `workflow` in mp4 and webm, EXIF 0x0110 and 0x010F in webp, text chunks in png.
"""

from __future__ import annotations

import errno
import json
import math
import re
import subprocess
import tempfile
import wave
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .errors import FileError, InputError
from .fit import fit_pictures
from .saving import write_whole

FORMATS = ("mp4", "webm", "webp", "png")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".wmv", ".flv", ".gif", ".webp")
PICTURE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")  # what Pillow reads, moving or not
FAR, RUN_UP = 10, 2  # seconds: from where on a file is not read from its beginning, and how much earlier then
EXIF_PROMPT, EXIF_FIRST_OTHER = 0x0110, 0x010F  # ComfyUI counts down from the second for `workflow` and the like


# ---------------------------------------------------------------- reading


def read_video(
    path: Path, frame_rate: float = 0, num_frames: int = 0, size: tuple[int, int] | None = None, start: int = 0
) -> tuple[Tensor, float]:
    """Frames (F, H, W, 3) in 0..1 and their rate per second.

    frame_rate resamples in time (0: the file's own), num_frames takes so many (0: all) from frame `start` of those on,
    size (width, height) scales each frame until it covers that size and cuts the overhang.
    """
    if frame_rate < 0 or num_frames < 0:
        raise InputError(f"frame_rate {frame_rate} and num_frames {num_frames} must not be negative; 0 means as it is.")
    if not path.is_file():
        raise FileError(f"There is no video {path}. Check the name, or upload it again.")
    read = _read_pictures if path.suffix.lower() == ".webp" else _read_with_ffmpeg
    try:
        frames, frame_rate = read(path, frame_rate, num_frames, size, start)
    except (OSError, RuntimeError, IndexError, UnidentifiedImageError) as error:
        # imageio-ffmpeg raises IndexError for files in which ffmpeg finds no video stream
        raise FileError(f"{path} could not be read as a video. It may be damaged, or not a video at all.") from error
    if not frames:
        raise FileError(f"{path} contains no frames. Choose another video.")
    return torch.stack(frames), frame_rate


def parse_size(text: str) -> tuple[int, int] | None:
    """(width, height) of a text such as "832x480"; None for "original"."""
    if text.strip().lower() in ("", "original"):
        return None
    match = re.fullmatch(r"\s*([1-9]\d*)\s*[x×,]\s*([1-9]\d*)\s*", text.lower())
    if not match:
        raise InputError(f'The size "{text}" is not understood. Write width x height, such as 832x480, or "original".')
    return int(match[1]), int(match[2])


def video_facts(path: Path, frame_rate: float = 0, most: int = 0) -> tuple[int, int, int]:
    """(width, height, frames) that `read_video` finds in a file at this rate. It is decoded: all of it, or `most`
    frames, which then is what longer files are said to have."""
    try:
        if path.suffix.lower() == ".webp":
            frames, _ = _read_pictures(path, frame_rate, most, None)
            return frames[0].shape[1], frames[0].shape[0], len(frames)
        reader = imageio_ffmpeg.read_frames(path)
        width, height = next(reader)["size"]
        reader.close()
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-i", str(path), "-map", "0:v:0"]
        command += [*_filters(frame_rate), *(["-frames:v", str(most)] if most else []), "-f", "null", "-"]
        done = subprocess.run(command, capture_output=True, check=True)
        frames = int(re.findall(rb"frame=\s*(\d+)", done.stderr)[-1])
        if not frames:
            raise FileError(f"{path} contains no frames. Choose another video.")
        return width, height, frames
    except (OSError, RuntimeError, IndexError, subprocess.CalledProcessError) as error:
        raise FileError(f"{path} could not be read as a video. It may be damaged, or not a video at all.") from error


def _filters(frame_rate: float, trim: str = "") -> list[str]:
    """ffmpeg's options for a rate, and for a part of what has that rate."""
    filters = [f"fps={_fraction(frame_rate)}"] if frame_rate else []
    filters += [f"trim=start{trim}", "setpts=PTS-STARTPTS"] if trim else []
    return ["-vf", ",".join(filters)] if filters else []


def _fraction(frame_rate: float) -> Fraction:
    return Fraction(frame_rate).limit_denominator(1001)


def _read_with_ffmpeg(path: Path, frame_rate: float, num_frames: int, size, start) -> tuple[list[Tensor], float]:
    seek, options = [], _filters(frame_rate, f"_frame={start}" if start else "")
    if frame_rate and start / frame_rate > FAR:  # jump there, and count from a little earlier: frames stay the same
        skipped = start - math.ceil(RUN_UP * frame_rate)
        seek = ["-ss", f"{float(skipped / _fraction(frame_rate)):.6f}"]
        options = _filters(frame_rate, f"={float((start - skipped - Fraction(1, 2)) / _fraction(frame_rate)):.6f}")
    if num_frames:
        options += ["-frames:v", str(num_frames)]
    reader = imageio_ffmpeg.read_frames(path, input_params=seek, output_params=options)
    facts = next(reader)
    width, height = facts["size"]
    pictures = (np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader)
    return [_frame(picture, size) for picture in pictures], frame_rate or facts["fps"]


def _read_pictures(path: Path, frame_rate: float, num_frames: int, size, start=0) -> tuple[list[Tensor], float]:
    """An animated webp, which ffmpeg does not decode."""
    frames, ends, time = [], [], 0.0
    with Image.open(path) as image:
        for picture in ImageSequence.Iterator(image):
            frames.append(_frame(np.asarray(ImageOps.exif_transpose(picture).convert("RGB")), size))
            time += picture.info.get("duration", 0) / 1000
            ends.append(time)
    own_rate = len(frames) / time if time else 1.0
    if frame_rate:
        # The picture on screen in the middle of each new frame's time.
        middles = (np.arange(max(1, round(ends[-1] * frame_rate))) + 0.5) / frame_rate
        frames = [frames[i] for i in np.searchsorted(ends, middles).clip(max=len(frames) - 1)]
    return frames[start : start + num_frames if num_frames else None], frame_rate or own_rate


def _frame(picture: np.ndarray, size: tuple[int, int] | None) -> Tensor:
    """(H, W, 3) bytes -> (H, W, 3) in 0..1 of the wanted size."""
    frame = torch.from_numpy(picture.astype(np.float32) / 255)
    return fit_pictures(frame[None], *size)[0] if size else frame


def read_graphs(path: Path) -> dict[str, dict]:
    """The workflow that a video or picture was made by: `prompt` is for the API, `workflow` for the editor. What it
    does not carry is left out."""
    if not path.is_file():
        raise FileError(f"There is no file {path}. Check the path.")
    read = _picture_tags if path.suffix.lower() in PICTURE_SUFFIXES else _video_tags
    try:
        tags = read(path)
        graphs = {name: json.loads(tags.get(name, "null")) for name in ("prompt", "workflow")}
    except (OSError, ValueError) as error:
        raise FileError(f"{path} could not be read. It may be damaged, or not a video or picture at all.") from error
    return {name: graph for name, graph in graphs.items() if isinstance(graph, dict)}


def _picture_tags(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        exif = (value.partition(":") for value in image.getexif().values() if isinstance(value, str))
        return {name: value for name, _, value in exif} | getattr(image, "text", {})


def _video_tags(path: Path) -> dict[str, str]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace"))
    tags = re.findall(r"(?ms)^(\w+)=((?:\\.|[^\\\n])*)", done.stdout.decode())
    return {name.lower(): re.sub(r"(?s)\\(.)", r"\1", value) for name, value in tags}


# ---------------------------------------------------------------- writing


@dataclass
class Stream:
    """Frames that are made while they are written, in the place of a tensor of this shape (F, H, W, 3).

    pictures: each (H, W, 3) in 0..1; read once.
    """

    shape: tuple[int, int, int, int]
    pictures: Iterator[Tensor]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return self.pictures


def save_video(
    images: Tensor | Stream,
    path: Path,
    frame_rate: float = 16,
    quality: int = 5,
    metadata: Mapping[str, object] | None = None,
    audio: Mapping[str, object] | None = None,
) -> list[Path]:
    """Write images (F, H, W, 3) in 0..1 in the format of the path's suffix; returns the files written.

    quality goes from 1 (small) to 10 (best). metadata holds `prompt` and `workflow`, audio ComfyUI's AUDIO
    ({"waveform": (b, channels, samples) in -1..1, "sample_rate": per second}; mp4 and webm only). A png path becomes
    one file a frame. Files appear under their names when they are complete; if anything fails, none is left.
    """
    suffix = path.suffix.lower().lstrip(".")
    _check(images, suffix, frame_rate, quality, audio)
    tags = {name: json.dumps(value, allow_nan=False) for name, value in (metadata or {}).items()}
    if suffix == "png":
        text = PngImagePlugin.PngInfo()
        for name, value in tags.items():
            text.add_text(name, value)
        stem = path.stem.rstrip("_")  # ComfyUI's names end in the counter and an underscore
        pictures = _bytes(images)  # which the writers take in turn
        names = [path.with_name(f"{stem}_{number:04d}.png") for number in range(len(images))]
        writers = {name: partial(_write_png, pictures, text) for name in names}
    elif suffix == "webp":
        writers = {path: partial(_write_webp, images, frame_rate, quality, tags)}
    else:
        writers = {path: partial(_write_with_ffmpeg, images, frame_rate, quality, tags, audio)}
    write_whole(writers)
    return list(writers)


def _check(images: Tensor | Stream, suffix: str, frame_rate: float, quality: int, audio) -> None:
    if suffix not in FORMATS:
        raise InputError(f"Videos can be saved as {', '.join(FORMATS)}, not as {suffix!r}. Choose one of these.")
    if len(images.shape) != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
        raise InputError(f"There is nothing to save: the images have the shape {tuple(images.shape)}.")
    if not frame_rate > 0:
        raise InputError(f"frame_rate is {frame_rate}, but a video needs a rate above 0; Wan's own is 16.")
    if not 1 <= quality <= 10:
        raise InputError(f"quality is {quality}; choose 1 (small files) to 10 (best).")
    if audio is not None and suffix not in ("mp4", "webm"):
        raise InputError(f"A {suffix} file cannot hold sound. Choose mp4 or webm, or disconnect audio.")


def _bytes(images: Tensor | Stream) -> Iterator[np.ndarray]:
    """Each of images (F, H, W, 3 or 4) in 0..1 as (H, W, 3) bytes, rounded; one at a time, for the memory's sake."""
    for image in images:
        yield (image[..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous().numpy()


def _write_png(pictures: Iterator[np.ndarray], text: PngImagePlugin.PngInfo, file: Path) -> None:
    Image.fromarray(next(pictures)).save(file, pnginfo=text)


def _write_webp(images: Tensor | Stream, frame_rate: float, quality: int, tags: Mapping[str, str], file: Path) -> None:
    exif = Image.Exif()
    others = [name for name in tags if name != "prompt"]
    for name, value in tags.items():
        exif[EXIF_PROMPT if name == "prompt" else EXIF_FIRST_OTHER - others.index(name)] = f"{name}:{value}"
    ends = [round(1000 * (number + 1) / frame_rate) for number in range(len(images))]  # whole milliseconds, no drift
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    first, *rest = (Image.fromarray(picture) for picture in _bytes(images))
    options = {"duration": durations, "loop": 0, "quality": 50 + 5 * quality, "method": 4, "exif": exif}
    first.save(file, save_all=True, append_images=rest, **options)


def _write_with_ffmpeg(images: Tensor | Stream, frame_rate: float, quality: int, tags, audio, file: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="wanflow-") as folder:
        notes = Path(folder, "tags.txt")
        notes.write_text(_ffmetadata(tags), encoding="utf-8")
        sound = _write_wave(audio, Path(folder, "sound.wav")) if audio is not None else None
        inputs = _ffmpeg_inputs(images.shape[2], images.shape[1], frame_rate, notes, sound)
        process = subprocess.Popen(
            [*inputs, *_ffmpeg_output(file.suffix, quality), str(file)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # ctrl-C is for the runner, which then stops between two nodes
        )
        try:
            for picture in _bytes(images):
                process.stdin.write(picture)
            _, complaint = process.communicate()
        except BrokenPipeError:  # ffmpeg gave up; what it says is better than that its pipe is gone
            process.stdin = None
            _, complaint = process.communicate()
        finally:
            process.kill()
    if process.returncode:
        complaint = complaint.decode(errors="replace").strip() or f"nothing (exit code {process.returncode})"
        full = "No space left" in complaint or "File too large" in complaint
        raise OSError(errno.ENOSPC if full else errno.EIO, f"ffmpeg says {complaint.splitlines()[-1]}")


def _ffmpeg_inputs(width: int, height: int, frame_rate: float, notes: Path, sound: Path | None) -> list[str]:
    """Input 0 is the picture bytes on the standard input, 1 the tags, 2 the sound if there is any."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(Fraction(frame_rate).limit_denominator(1001)), "-i", "-", "-i", str(notes)]
    command += ["-i", str(sound), "-map", "2:a", "-af", "apad", "-shortest"] if sound else []
    return [*command, "-map", "0:v", "-map_metadata", "1"]


def _ffmpeg_output(suffix: str, quality: int) -> list[str]:
    """H.264 or VP9 in the colours of HD video."""
    # 4:2:0 colour needs even sides; odd ones get one more row or column.
    command = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2,scale=out_color_matrix=bt709:out_range=tv", "-pix_fmt", "yuv420p"]
    command += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    if suffix == ".webm":
        return [*command, "-c:v", "libvpx-vp9", "-b:v", "0", "-crf", str(45 - 4 * quality), "-c:a", "libopus"]
    command += ["-c:v", "libx264", "-crf", str(33 - 3 * quality), "-c:a", "aac"]
    return [*command, "-movflags", "+faststart+use_metadata_tags"]


def _ffmetadata(tags: Mapping[str, str]) -> str:
    """ffmpeg's metadata file, in which = ; # backslash and newline are escaped."""
    escaped = {name: re.sub(r"([=;#\\\n])", r"\\\1", value) for name, value in tags.items()}
    return "\n".join([";FFMETADATA1", *(f"{name}={value}" for name, value in escaped.items()), ""])


def _write_wave(audio: Mapping[str, object], file: Path) -> Path:
    samples = audio["waveform"][0].float().clamp(-1, 1).cpu()  # (channels, samples)
    with wave.open(str(file), "wb") as out:
        out.setnchannels(samples.shape[0])
        out.setsampwidth(2)
        out.setframerate(int(audio["sample_rate"]))
        out.writeframes((samples.T * 32767).round().to(torch.int16).contiguous().numpy().tobytes())
    return file
