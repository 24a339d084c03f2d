"""Shows what the toys make of every example: `python -m comfyui_wanflow.example_workflows.gallery`.

Runs the examples' twins (`wanflow run --tiny`) and draws `docs/examples.jpg`, a contact sheet of all of them, and
`docs/examples.webp`, the moving picture of the front pages. Takes some minutes on two cores.
"""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..nodes.headless.cli import all_nodes_runner
from ..nodes.headless.toys import PRESET
from ..nodes.headless.twin import FILE_INPUTS, twin
from ..nodes.host.standalone import host
from .build import workflows
from .cards import FAINT, INK, PAPER, draw_arrow, font
from .inputs import tiny_inputs

DOCS = Path(__file__).resolve().parents[1] / "docs"
SHEET, FRONT_PAGE = DOCS / "examples.jpg", DOCS / "examples.webp"
SHOWN = {"WanFlowCamera": "direction", "WanFlowMotionSpeed": "motion_bucket_id", "WanFlowTrain": "max_steps"}
MARGIN, GAP = 12, 6  # pixels
TEXT, TILE, LABEL, FRAMES = 380, 92, 18, 6  # of the sheet: width of the words, side of a picture, its label, frames
COLUMNS, ROWS, SIDE, WORDS = 6, 2, 132, 64  # of the moving picture; height of the words


@dataclass(frozen=True, eq=False)
class Exhibit:
    """The examples that have one twin, and the video (F, H, W, 3) in 0..1 that it makes."""

    names: list[str]
    workflow: dict[str, Any]
    video: np.ndarray

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """By the titles of the nodes that load them."""
        drawn = tiny_inputs()
        loaders = [node for node in self.workflow.values() if node["class_type"] in FILE_INPUTS]
        return {short(node): drawn[node["inputs"][FILE_INPUTS[node["class_type"]]]] for node in loaders}

    @property
    def facts(self) -> list[str]:
        """What else is given."""
        nodes = [node for node in self.workflow.values() if node["class_type"] in SHOWN]
        return [f"{short(node)}: {node['inputs'][SHOWN[node['class_type']]]}" for node in nodes]

    @property
    def caption(self) -> str:
        prompts = (node for node in self.workflow.values() if node["class_type"] == "WanFlowTextEncode")
        return next(prompts)["inputs"]["text"]


def short(node: dict[str, Any]) -> str:
    return node["_meta"]["title"].partition(":")[0].removeprefix("Wan ")


def exhibits() -> list[Exhibit]:
    """One for each different twin: that of examples for several sizes of a model is the same."""
    names: dict[str, list[str]] = {}
    for name, workflow in workflows().items():
        made = twin(workflow)
        made["9"]["inputs"]["filename_prefix"] = "twin"
        names.setdefault(json.dumps(made), []).append(name)
    runner, found = all_nodes_runner(), []
    for text, alike in names.items():
        print(", ".join(alike), flush=True)
        workflow = json.loads(text)
        id, slot = workflow["9"]["inputs"]["images"]
        found.append(Exhibit(alike, workflow, runner.run(workflow).outputs[id][slot].numpy()))
    return found


def contact_sheet(shown: Sequence[Exhibit]) -> Image.Image:
    """A row for each: its names and words, what goes in, and some frames of what comes out."""
    step = TILE + GAP
    most = max(len(exhibit.pictures) for exhibit in shown)
    start, height = MARGIN + TEXT + most * step, TILE + LABEL + GAP
    paper = Image.new("RGB", (start + 4 * GAP + FRAMES * step + MARGIN, 2 * MARGIN + len(shown) * height), PAPER)
    draw = ImageDraw.Draw(paper)
    for number, exhibit in enumerate(shown):
        top = MARGIN + number * height
        names = textwrap.wrap(", ".join(exhibit.names), 60)
        words = textwrap.wrap(f"“{exhibit.caption}”", 60) + exhibit.facts
        draw.text((MARGIN, top), "\n".join(names), INK, font(12))
        draw.text((MARGIN, top + 16 * len(names)), "\n".join(words), FAINT, font(12))
        for column, (label, frames) in enumerate(exhibit.pictures.items()):
            left = MARGIN + TEXT + column * step
            paper.paste(picture(frames[len(frames) // 2], TILE), (left, top))
            draw.text((left, top + TILE + 1), label, FAINT, font(10))
        draw_arrow(draw, start - GAP, start + 3 * GAP, top + TILE / 2)
        chosen = exhibit.video[np.linspace(0, len(exhibit.video) - 1, FRAMES).round().astype(int)]
        for column, frame in enumerate(chosen):
            paper.paste(picture(frame, TILE), (start + 4 * GAP + column * step, top))
    return paper


def moving_picture(shown: Sequence[Exhibit]) -> list[Image.Image]:
    """The first results side by side, each above what it was made of."""
    width, height = SIDE + GAP, SIDE + WORDS
    paper = Image.new("RGB", (COLUMNS * width + GAP, ROWS * height + GAP), PAPER)
    draw = ImageDraw.Draw(paper)
    places = [(GAP + column * width, GAP + row * height) for row in range(ROWS) for column in range(COLUMNS)]
    for (left, top), exhibit in zip(places, shown, strict=False):
        given = textwrap.wrap(", ".join([*exhibit.pictures, *exhibit.facts]) or "Prompt", 24)
        draw.text((left, top + SIDE + 2), "\n".join(given), INK, font(11))
        told = textwrap.fill(exhibit.caption, 24)
        draw.text((left, top + SIDE + 2 + 14 * len(given)), told, FAINT, font(11))
    stills = []
    for number in range(PRESET.num_frames):
        stills.append(paper.copy())
        for place, exhibit in zip(places, shown, strict=False):
            stills[-1].paste(picture(exhibit.video[number], SIDE), place)
    return stills


def picture(frame: np.ndarray, side: int) -> Image.Image:
    """(H, W, 3 or more) in 0..1 as a square."""
    pixels = (frame[..., :3] * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    host.quiet = True
    with tempfile.TemporaryDirectory() as folder:  # the files that the twins save
        host.output_directory = Path(folder)
        found = exhibits()
    contact_sheet(found).save(SHEET, quality=80)
    first, *rest = moving_picture(found)
    first.save(FRONT_PAGE, save_all=True, append_images=rest, duration=1000 // PRESET.fps, loop=0, quality=75, method=6)
    print(SHEET, FRONT_PAGE, sep="\n")
