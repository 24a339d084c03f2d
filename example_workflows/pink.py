"""A small data set for the example train_and_use: shapes in a colour that WanTiny never saw, and others that it knows.

The known ones keep the model from forgetting: without them everything would turn pink.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator

import numpy as np

from ..wan_core.tiny import world

FOLDER, TABLE = "toy_pink", "metadata.csv"
CONCEPT = "pink"
FRAMES, SIZE, COUNT = 17, 64, 12

Facts = tuple[str, str, str, str]


def concept_facts() -> tuple[list[Facts], list[Facts]]:
    """(to train on, never shown): all combinations of the new colour; a (shape, background) is held out whole."""
    trained, unseen = [], []
    for shape, direction, background in itertools.product(world.SHAPES, world.DIRECTIONS, world.COLORS):
        held_out = (list(world.COLORS).index(background) + 3 * world.SHAPES.index(shape)) % 5 == 2
        (unseen if held_out else trained).append((CONCEPT, shape, direction, background))
    return trained, unseen


def clips(count: int = COUNT, seed: int = 0) -> Iterator[tuple[str, np.ndarray, str]]:
    """(name, frames, caption) of `count` clips of the new colour and as many of the old ones."""
    generator = np.random.default_rng(seed)
    known = [facts for facts in world.all_facts() if not world.is_held_out(facts)]
    for name, facts in ((CONCEPT, concept_facts()[0]), ("known", known)):
        for number, index in enumerate(generator.permutation(len(facts))[:count]):
            scene = world.random_scene(generator, facts[index])
            yield f"{name}_{number:02}.mp4", world.render(scene, FRAMES), scene.caption


def table(rows: Iterator[tuple[str, np.ndarray, str]]) -> str:
    """The clips as a table with the columns video and prompt."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["video", "prompt"])
    writer.writerows((name, caption) for name, _, caption in rows)
    return text.getvalue()
