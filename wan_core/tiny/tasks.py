"""What each kind of Wan model is asked to do, told in the toy world: the conditions of a sample, and how well a video
meets them.

A task makes samples (a scene, its clip, captions, the same condition objects that nodes make) to train and to test on,
and scores videos by plain code. Scores are shares of 0..1, or decibels where the name ends in "dB".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..adapters.camera import CameraCondition
from ..adapters.control import control_condition
from ..adapters.image import image_condition
from ..adapters.injection import Condition
from ..adapters.reference import reference_condition
from ..adapters.speed import HIGHEST_SPEED, SpeedCondition
from ..adapters.vace import vace_condition
from ..model import WanImageEncoder, WanVAE
from ..size import latent_shape
from ..training.examples import SideBySide
from ..trajectory import LENS, PRESETS, trajectory
from . import measure, world
from .train_text import captions

SIDE = 64
FRAMES = 17
SIZE = latent_shape(SIDE, SIDE, FRAMES, 1)[2:]
FACTS = ("color", "shape", "direction", "background")
STILL_SCENES = 0.08
SAME_SHAPE = 0.7  # intersection over union from which on two masks show the same thing


@dataclass(frozen=True, eq=False)
class Sample:
    """`given` is what a task's conditions are made of beside the clip: a mask, a picture, a camera's turn, a number."""

    scene: world.Scene
    captions: tuple[str, ...]  # the plain one, then other wordings
    clip: np.ndarray  # (F, 64, 64, 3) in 0..1: what the caption and the conditions describe
    given: object = None


@dataclass(frozen=True)
class Encoders:
    vae: WanVAE
    image_encoder: WanImageEncoder | None = None

    @property
    def look(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.image_encoder is None else self.image_encoder.encode


class Task:
    """What tasks have in common. `name` is what models of the kind are called after."""

    name: str

    def sample(self, generator: np.random.Generator, facts: tuple) -> Sample:
        scene = world.random_scene(generator, facts)
        return Sample(scene, wordings(scene), world.render(scene, FRAMES))

    def conditions(self, sample: Sample, encoders: Encoders) -> tuple[Condition, ...]:
        return ()

    def scores(self, videos: Sequence[np.ndarray], samples: Sequence[Sample]) -> dict[str, float]:
        return fact_scores(videos, samples)


class TextToVideo(Task):
    """Clips of 9 and of 17 frames; in some the shape stays where it is."""

    name = "T2V"

    def sample(self, generator, facts):
        scene = world.random_scene(generator, facts)
        if generator.random() < STILL_SCENES:
            scene = replace(scene, travel=0.0)
        return Sample(scene, wordings(scene), world.render(scene, (9, FRAMES)[generator.integers(2)]))


class FirstImage(Task):
    name = "I2V"
    last = False

    def conditions(self, sample: Sample, encoders: Encoders) -> tuple[Condition, ...]:
        end = picture(sample.clip[-1]) if self.last else None
        return (image_condition(picture(sample.clip[0]), end, SIZE, encoders.vae.encode, encoders.look),)

    def scores(self, videos, samples):
        kept = {"first frame, dB": decibel(videos, samples, 0)}
        if self.last:
            kept["last frame, dB"] = decibel(videos, samples, -1)
        return kept | fact_scores(videos, samples)


class FirstAndLastImage(FirstImage):
    name = "FLF2V"
    last = True


class InPaint(FirstAndLastImage):
    """Both pictures, or only one of them, as the InP models take them."""

    name = "InP"

    def sample(self, generator, facts):
        return replace(super().sample(generator, facts), given=("start", "end", "both")[generator.integers(3)])

    def conditions(self, sample, encoders):
        start = None if sample.given == "end" else picture(sample.clip[0])
        end = None if sample.given == "start" else picture(sample.clip[-1])
        return (image_condition(start, end, SIZE, encoders.vae.encode, encoders.look),)

    def scores(self, videos, samples):
        pairs = list(zip(videos, samples, strict=True))
        starts = [pair for pair in pairs if pair[1].given != "end"]
        ends = [pair for pair in pairs if pair[1].given != "start"]
        kept = {"first frame, dB": decibel(*zip(*starts, strict=True), 0)}
        kept["last frame, dB"] = decibel(*zip(*ends, strict=True), -1)
        return kept | fact_scores(videos, samples)


class Control(Task):
    """The control video is the shape's outline, white on black."""

    name = "Control"

    def conditions(self, sample, encoders):
        return (control_condition(torch.from_numpy(outlines(sample.clip)), encoders.vae.encode),)

    def scores(self, videos, samples):
        follows = [overlap(video, sample.clip) > SAME_SHAPE for video, sample in zip(videos, samples, strict=True)]
        return {"control followed": float(np.mean(follows))} | fact_scores(videos, samples)


class ControlAndReference(Control):
    """The caption says nothing of the shape's colour: the reference picture does."""

    name = "Control-Reference"

    def sample(self, generator, facts):
        scene = world.random_scene(generator, facts)
        still = replace(scene, travel=0.0, x=0.5, y=0.5)
        captions = (f"a {scene.shape} moves {scene.direction}",)
        return Sample(scene, captions, world.render(scene, FRAMES), world.render(still, 1))

    def conditions(self, sample, encoders):
        reference = torch.from_numpy(sample.given)
        return (
            *super().conditions(sample, encoders),
            reference_condition(reference, encoders.vae.encode, encoders.look),
        )


class Camera(Task):
    """A shape that stands still, seen by a camera that turns into one of eight directions."""

    name = "Control-Camera"
    directions = PRESETS[:8]

    def sample(self, generator, facts):
        turn = self.directions[generator.integers(len(self.directions))], generator.uniform(0.011, 0.022)
        drift = seen_drift(trajectory(*turn, FRAMES).poses)
        scene = world.random_scene(generator, facts)
        x, y = (generator.uniform(low, 1 - low) for low in scene.radius + np.abs(drift) / 2 + 0.02)
        scene = replace(scene, travel=0.0, drift=tuple(drift), x=x, y=y)
        return Sample(scene, wordings(scene), world.render(scene, FRAMES), turn)

    def conditions(self, sample, encoders):
        start = image_condition(picture(sample.clip[0]), None, SIZE, encoders.vae.encode, encoders.look)
        return start, CameraCondition(trajectory(*sample.given, FRAMES))

    def scores(self, videos, samples):
        right = [
            np.abs(measure.displacement(video) - sample.scene.drift).max() < 0.08
            for video, sample in zip(videos, samples, strict=True)
        ]
        kept = {"first frame, dB": decibel(videos, samples, 0)}
        return kept | {"camera followed": float(np.mean(right))} | fact_scores(videos, samples, skip=("direction",))


class Repaint(Task):
    """VACE: a box with the shape, or the later part of the clip, is painted anew after the caption; the rest is kept.
    In half of the samples there is a picture of the shape, whose looks the caption leaves out: alone, or with outlines
    to follow."""

    name = "VACE"

    def sample(self, generator, facts):
        scene = world.random_scene(generator, facts)
        clip, kind = world.render(scene, FRAMES), ("box", "later", "reference", "outlines")[generator.integers(4)]
        mask = np.ones((FRAMES, SIDE, SIDE), np.float32)
        if kind in ("reference", "outlines"):
            alone = replace(scene, travel=0.0, x=0.5, y=0.5, background="black" if scene.color == "white" else "white")
            captions = (f"moves {scene.direction} on a {scene.background} background",)
            return Sample(scene, captions, clip, (kind, mask, world.render(alone, 1)))
        if kind == "later":
            mask[: generator.integers(1, FRAMES // 2)] = 0
        else:
            rows, columns = (np.flatnonzero(measure.shape_mask(clip).any((0, 3 - axis))) for axis in (1, 2))
            mask[:, : max(0, rows[0] - 4)], mask[:, rows[-1] + 5 :] = 0, 0
            mask[:, :, : max(0, columns[0] - 4)], mask[:, :, columns[-1] + 5 :] = 0, 0
        return Sample(scene, wordings(scene), clip, (kind, mask, None))

    def conditions(self, sample, encoders):
        kind, mask, reference = sample.given
        seen = {"reference": None, "outlines": outlines(sample.clip)}
        video = seen.get(kind, np.where(mask[..., None] > 0, np.float32(0.5), sample.clip))
        video, reference = (None if pixels is None else torch.from_numpy(pixels) for pixels in (video, reference))
        return (vace_condition(video, torch.from_numpy(mask), reference, SIZE, encoders.vae.encode),)

    def scores(self, videos, samples):
        pairs = list(zip(videos, samples, strict=True))
        errors = np.concatenate([np.square(video - sample.clip)[sample.given[1] == 0] for video, sample in pairs])
        kept = {"kept, dB": measure.decibel(errors.mean())} if errors.size else {}
        led = [overlap(video, sample.clip) > SAME_SHAPE for video, sample in pairs if sample.given[0] == "outlines"]
        followed = {"control followed": float(np.mean(led))} if led else {}
        return kept | followed | fact_scores(videos, samples)


class Speed(Task):
    """How far the shape goes: from a tenth of the picture to two fifths."""

    name = "Speed"
    nearest, farthest = 0.1, 0.4

    def sample(self, generator, facts):
        bucket = float(generator.uniform(0, HIGHEST_SPEED))
        return self.at(bucket, generator, facts)

    def at(self, bucket: float, generator: np.random.Generator, facts: tuple) -> Sample:
        travel = self.nearest + (self.farthest - self.nearest) * bucket / HIGHEST_SPEED
        scene = world.random_scene(generator, facts, travel)
        return Sample(scene, wordings(scene), world.render(scene, FRAMES), bucket)

    def conditions(self, sample, encoders):
        return (SpeedCondition(sample.given),)

    def scores(self, videos, samples):
        ways = np.array([np.abs(measure.displacement(video)).max() for video in videos])
        buckets = np.array([sample.given for sample in samples])
        apart = np.abs(buckets[:, None] - buckets) > 25
        same = (ways[:, None] > ways) == (buckets[:, None] > buckets)
        return {"further with a higher motion_bucket_id": float(same[apart].mean())} | fact_scores(videos, samples)


KINDS = (TextToVideo, FirstImage, FirstAndLastImage, InPaint, Control, ControlAndReference, Camera, Repaint, Speed)
TASKS = {kind.name: kind() for kind in KINDS}


def wordings(scene: world.Scene) -> tuple[str, ...]:
    return tuple(captions(scene.words)) if scene.travel else (scene.caption,)


def picture(frame: np.ndarray) -> Tensor:
    """(H, W, 3) -> (1, H, W, 3), as nodes hand pictures over."""
    return torch.from_numpy(frame)[None]


def outlines(clip: np.ndarray) -> np.ndarray:
    """(F, H, W, 3): the shape's edge, two pixels wide, white on black."""
    mask = measure.shape_mask(clip)
    inner = mask.copy()
    for axis in (1, 2):
        for step in (-2, 2):
            inner &= np.roll(mask, step, axis)
    return np.repeat((mask & ~inner)[..., None], 3, axis=-1).astype(np.float32)


def seen_drift(poses: Tensor) -> np.ndarray:
    """Where a point straight ahead is seen at the end, less where it was at the beginning, (x, y) in picture heights.

    poses (F, 4, 4) of a `Trajectory` whose lens is the usual one; the picture is a square.
    """
    x, y, z, _ = torch.linalg.inv(poses[-1]) @ torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=poses.dtype)
    return LENS[1] * np.array([x / z, y / z])


def overlap(video: np.ndarray, clip: np.ndarray) -> float:
    """Intersection over union of the shapes' masks, over all frames."""
    return measure.overlap(measure.shape_mask(video), measure.shape_mask(clip))


def decibel(videos: Sequence[np.ndarray], samples: Sequence[Sample], frame: int) -> float:
    pairs = zip(videos, samples, strict=True)
    return measure.decibel(np.mean([np.square(video[frame] - sample.clip[frame]) for video, sample in pairs]))


def fact_scores(videos: Sequence[np.ndarray], samples: Sequence[Sample], skip: Sequence[str] = ()) -> dict[str, float]:
    """The share of videos that show each fact of the scene, whether caption or condition told it.

    They may show the colours and shapes of the training, and those that some of the samples ask for.
    """
    asked = [facts_of(sample.scene) for sample in samples]
    colors = (*world.COLORS, *(name for name in world.OTHER_COLORS if any(facts["color"] == name for facts in asked)))
    kinds = (*world.SHAPES, *(name for name in world.OTHER_SHAPES if any(facts["shape"] == name for facts in asked)))
    pairs = [(measure.read(video, colors, kinds), facts) for video, facts in zip(videos, asked, strict=True)]
    return {
        name: float(np.mean([getattr(reading, name) == facts[name] for reading, facts in pairs]))
        for name in FACTS
        if name not in skip
    }


def facts_of(scene: world.Scene) -> dict[str, str | None]:
    """What a reading of the scene should find."""
    facts = dict(zip(FACTS, scene.words, strict=True))
    return facts if scene.travel else facts | {"direction": None}


def samples(task: Task, count: int, seed: int, held_out: bool) -> list[Sample]:
    """Samples of combinations that are trained, or of those that never are."""
    generator = np.random.default_rng(seed)
    facts = [f for f in world.all_facts() if world.is_held_out(f) == held_out]
    return [task.sample(generator, facts[generator.integers(len(facts))]) for _ in range(count)]


def shapes(condition: Condition) -> tuple:
    """Conditions with equal ones can be `stacked`."""
    tensors = {name: value for name, value in vars(condition).items() if isinstance(value, Tensor)}
    return type(condition), *((name, *value.shape) for name, value in tensors.items())


def stacked(conditions: Sequence[Condition]) -> Condition:
    """Conditions of one kind, a row each, as one: their tensors side by side where they are made of such."""
    values = {name: [getattr(condition, name) for condition in conditions] for name in vars(conditions[0])}
    if not any(isinstance(column[0], Tensor) for column in values.values()):
        return SideBySide(tuple((condition,) for condition in conditions))
    joined = {name: torch.cat(column) for name, column in values.items() if isinstance(column[0], Tensor)}
    return replace(conditions[0], **joined)
