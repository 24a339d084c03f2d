"""A small data set for the example train_and_use: shapes in a colour that WanTiny never saw, and others that it knows.

The known ones keep the model from forgetting: without them everything would turn pink.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..wan_core.tiny import world

FOLDER, TABLE = "toy_pink", "metadata.csv"
CONCEPT, RGB = "pink", (245, 120, 185)
FRAMES, SIZE, COUNT = 17, 64, 12

Facts = tuple[str, str, str, str]


def concept_facts() -> tuple[list[Facts], list[Facts]]:
    """(to train on, never shown): all combinations of the new colour; a (shape, background) is held out whole."""
    trained, unseen = [], []
    for shape, direction, background in itertools.product(world.SHAPES, world.DIRECTIONS, world.COLORS):
        held_out = (list(world.COLORS).index(background) + 3 * world.SHAPES.index(shape)) % 5 == 2
        (unseen if held_out else trained).append((CONCEPT, shape, direction, background))
    return trained, unseen


def render(scene: world.Scene, frames: int = FRAMES) -> np.ndarray:
    """As world.render, (frames, 64, 64, 3) in 0..1, in the new colour too."""
    if scene.color != CONCEPT:
        return world.render(scene, frames)
    low, high = (world.COLORS[name][0] / 255 for name in ("black", "white"))
    cover = (world.render(replace(scene, color="white", background="black"), frames) - low) / (high - low)
    background = np.array(world.COLORS[scene.background], np.float32)
    return (cover * np.array(RGB, np.float32) + (1 - cover) * background) / 255


def clips(count: int = COUNT, seed: int = 0) -> Iterator[tuple[str, np.ndarray, str]]:
    """(name, frames, caption) of `count` clips of the new colour and as many of the old ones."""
    generator = np.random.default_rng(seed)
    known = [facts for facts in world.all_facts() if not world.is_held_out(facts)]
    for name, facts in ((CONCEPT, concept_facts()[0]), ("known", known)):
        for number, index in enumerate(generator.permutation(len(facts))[:count]):
            scene = world.random_scene(generator, facts[index])
            yield f"{name}_{number:02}.mp4", render(scene), scene.caption


def table(rows: Iterator[tuple[str, np.ndarray, str]]) -> str:
    """The clips as a table with the columns video and prompt."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["video", "prompt"])
    writer.writerows((name, caption) for name, _, caption in rows)
    return text.getvalue()
