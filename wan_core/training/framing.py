"""How clips are cut to train on: their size, their length, and which of their frames."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import InputError
from ..size import FRAMES_PER_LATENT, SIDE_MULTIPLE, latent_shape

WAN_RATE = 16.0  # frames a second of the videos that Wan 2.1 was trained on
SAMPLINGS = ("head", "uniform", "chunk")
BUCKET_MULTIPLE = 32  # of the sides of buckets: coarse, so that many clips share one


@dataclass(frozen=True)
class Cut:
    """A piece of a clip: `frames` frames from `start` on, brought to width x height."""

    width: int
    height: int
    frames: int
    start: int = 0


@dataclass(frozen=True)
class Framing:
    """How to cut. Raises InputError for sizes that cannot work.

    num_frames   4n+1; a shorter clip gives as many as it has, down to the next 4n+1, or to the next of `lengths`
    height, width   of all clips; without both each keeps its shape, at most max_pixels large, on multiples of 16
    frame_rate   to bring clips to; 0 takes the frames as they come, whatever their rate, as DiffSynth-Studio does
    buckets      give clips the size, of height x width or max_pixels, that is nearest to their own shape, so that clips
                 of about one shape can be trained on together; smaller ones are enlarged
    sampling     of a longer clip: head takes the first frames, uniform `samples` pieces evenly spread over it (one: its
                 middle), chunk all pieces that follow each other
    """

    num_frames: int = 81
    height: int | None = None
    width: int | None = None
    max_pixels: int = 921600
    frame_rate: float = WAN_RATE
    buckets: bool = False
    lengths: tuple[int, ...] = ()
    sampling: str = "head"
    samples: int = 1

    def __post_init__(self):
        if (self.height is None) != (self.width is None):
            raise InputError("Only one of height and width is given. Give both, or none to keep each clip's shape.")
        for frames in (self.num_frames, *self.lengths):
            latent_shape(self.width or SIDE_MULTIPLE, self.height or SIDE_MULTIPLE, frames)
        if self.max_pixels < SIDE_MULTIPLE**2:
            raise InputError(f"max_pixels is {self.max_pixels}, but the smallest picture has {SIDE_MULTIPLE**2}.")
        if not 0 <= self.frame_rate < math.inf:
            raise InputError(f"frame_rate is {self.frame_rate}. Enter 16, Wan's own, or 0 to leave clips as they are.")
        if self.sampling not in SAMPLINGS:
            raise InputError(f"There is no frame_sampling {self.sampling!r}. Choose one of {', '.join(SAMPLINGS)}.")
        if self.samples < 1:
            raise InputError(f"frame_samples is {self.samples}, but each clip gives at least 1 piece.")

    def cuts(self, width: int, height: int, frames: int) -> Iterator[Cut]:
        """The pieces of a clip of this size and length (at the framing's rate); none where it is too short."""
        taken = self.length(frames)
        size = self.size(width, height)
        for start in self.starts(frames, taken) if taken else ():
            yield Cut(*size, taken, start)

    def length(self, frames: int) -> int:
        """How many frames to take of so many, 0 for none."""
        if frames >= self.num_frames or frames == 1:
            return min(frames, self.num_frames)
        if self.lengths:
            return max((length for length in self.lengths if length <= frames), default=0)
        return (frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1

    def starts(self, frames: int, taken: int) -> list[int]:
        rest = frames - taken
        if self.sampling == "head":
            return [0]
        if self.sampling == "chunk":
            return list(range(0, rest + 1, taken))
        if self.samples == 1:
            return [rest // 2]
        return sorted({round(rest * i / (self.samples - 1)) for i in range(self.samples)})

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that a clip of this size is brought to."""
        if self.buckets:
            return bucket(width / height, self.width * self.height if self.width else self.max_pixels)
        if self.width is not None:
            return self.width, self.height
        shrink = min(1.0, math.sqrt(self.max_pixels / (width * height)))
        return tuple(max(1, int(side * shrink) // SIDE_MULTIPLE) * SIDE_MULTIPLE for side in (width, height))


def bucket(aspect: float, area: int) -> tuple[int, int]:
    """The (width, height) of at most `area` pixels, on a coarse grid, whose shape is nearest to width / height."""
    step = BUCKET_MULTIPLE if area >= BUCKET_MULTIPLE**2 else SIDE_MULTIPLE
    sizes = [(width, area // width // step * step) for width in range(step, area // step + 1, step)]
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1] / aspect)), -size[0] * size[1]))
