"""The toy world: short clips of one coloured shape that moves over a coloured background.

Every clip follows from a `Scene`, every scene has one caption, and plain code can read the caption's
facts back from pixels (`measure.py`). So a model trained on this world can be tested on a laptop.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 75, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 50, 190),
    "orange": (240, 135, 30),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
OTHER_SHAPES = ("star",)  # in no caption of WanTiny's training: something that a LoRA can teach it
OTHER_COLORS = {"pink": (250, 130, 190), "cyan": (60, 210, 220)}  # likewise
ALL_COLORS = COLORS | OTHER_COLORS
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down


@dataclass(frozen=True)
class Scene:
    """What the caption says (color, shape, direction, background) and what it leaves open (the rest).

    `x`, `y` are the shape's centre in the middle of the clip, `radius` its half size, all in units of the
    picture's height; `travel` is the way it goes during the clip, in the same units. `drift` (x, y) is the way that
    everything goes beside that, as where a camera moves.
    """

    color: str
    shape: str
    direction: str
    background: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.18
    travel: float = 0.4
    drift: tuple[float, float] = (0.0, 0.0)

    @property
    def caption(self) -> str:
        if self.travel == 0:
            return f"a {self.color} {self.shape} on a {self.background} background"
        return f"a {self.color} {self.shape} moves {self.direction} on a {self.background} background"

    @property
    def words(self) -> tuple[str, str, str, str]:
        return self.color, self.shape, self.direction, self.background


def all_facts() -> list[tuple[str, str, str, str]]:
    """Every (color, shape, direction, background) with two different colours, in a fixed order."""
    return [f for f in itertools.product(COLORS, SHAPES, DIRECTIONS, COLORS) if f[0] != f[3]]


def is_held_out(facts: tuple[str, str, str, str]) -> bool:
    """A fixed tenth of all combinations, never shown in training: a (color, background, shape) triple is
    held out with all four directions, so that no half-seen neighbour gives the answer away."""
    color, shape, _, background = facts
    colors = list(COLORS)
    code = colors.index(color) * 8 + colors.index(background) + 3 * SHAPES.index(shape)
    return code % 10 == 7


def random_scene(
    generator: np.random.Generator, facts: tuple[str, str, str, str], travel: float | None = None
) -> Scene:
    """A scene for these facts whose shape stays whole inside a square picture all the time."""
    radius = generator.uniform(0.19, 0.27)
    travel = generator.uniform(0.25, 0.4) if travel is None else travel
    dx, dy = DIRECTIONS[facts[2]]
    reach_x, reach_y = radius + abs(dx) * travel / 2 + 0.02, radius + abs(dy) * travel / 2 + 0.02
    x = generator.uniform(reach_x, 1 - reach_x)
    y = generator.uniform(reach_y, 1 - reach_y)
    return Scene(*facts, x=x, y=y, radius=radius, travel=travel)


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float, pixel: float) -> np.ndarray:
    """How much of each pixel the shape covers, 0..1: its signed distance, softened over one pixel."""
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - radius * 0.88
    elif shape == "star":  # five points, one up: distance from the edge beside the nearest point
        around = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        reach = np.hypot(x, y)
        distance = 0.309 * (reach * np.cos(around) - radius) + 0.951 * reach * np.sin(around)
    else:  # a triangle, point up
        distance = np.maximum(abs(x) * 0.894 - y * 0.447 - radius * 0.447, y - radius * 0.8)
    return np.clip(0.5 - distance / pixel, 0, 1)


def render(scene: Scene, num_frames: int = 9, height: int = 64, width: int = 64) -> np.ndarray:
    """The clip as (frames, height, width, 3) float32 in 0..1."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    rows, columns = (rows + 0.5) / height, (columns + 0.5) / height
    shape_color, background = (np.array(ALL_COLORS[name], np.float32) / 255 for name in (scene.color, scene.background))
    dx, dy = DIRECTIONS[scene.direction]
    frames = []
    for progress in np.linspace(-0.5, 0.5, num_frames):
        x = scene.x * width / height + (dx * scene.travel + scene.drift[0]) * progress
        y = scene.y + (dy * scene.travel + scene.drift[1]) * progress
        cover = coverage(scene.shape, columns - x, rows - y, scene.radius, 1.5 / height)[..., None]
        frames.append(cover * shape_color + (1 - cover) * background)
    return np.stack(frames).astype(np.float32)
