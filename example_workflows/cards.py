"""Draws a card for each example, its picture among ComfyUI's templates: what goes in, what comes out, the prompt."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN = (512, 288), 20
TILE, TILES_TOP, GAP = (138, 80), 62, 29
PAPER, INK, FAINT, EDGE = (28, 30, 36), (236, 236, 236), (150, 153, 162), (84, 88, 100)


def card(name: str, workflow: dict[str, Any], pictures: dict[str, np.ndarray]) -> Image.Image:
    """The card of a workflow in API format; pictures: (F, H, W, 3) in 0..1 of every file that it may load."""
    paper = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(paper)
    draw.text((MARGIN, MARGIN), name, INK, font(20))
    left = MARGIN
    for node in workflow.values():
        file = node["inputs"].get("image", node["inputs"].get("video"))
        if isinstance(file, str):
            tile(paper, left, node["_meta"]["title"].partition(":")[0], pictures[file])
            left += TILE[0] + GAP
    if left > MARGIN:
        draw_arrow(draw, left - GAP, left, TILES_TOP + TILE[1] / 2)
    canvas = next(node["inputs"] for node in workflow.values() if node["class_type"] == "WanFlowEmptyLatent")
    size = f"{canvas['width']} x {canvas['height']}\n{canvas['num_frames']} frames"
    corner = left + TILE[0], TILES_TOP + TILE[1]
    draw.rectangle((left, TILES_TOP, *corner), outline=EDGE, width=2)
    draw.text((left + TILE[0] / 2, TILES_TOP + TILE[1] / 2), size, FAINT, font(14), "mm", align="center")
    prompt = next(node["inputs"]["text"] for node in workflow.values() if node["class_type"] == "WanFlowTextEncode")
    draw.text((MARGIN, 188), textwrap.fill(prompt, 62), INK, font(15), spacing=5)
    return paper


def tile(paper: Image.Image, left: int, label: str, frames: np.ndarray) -> None:
    """A small picture of the clip's middle with its name below."""
    picture = Image.fromarray((frames[len(frames) // 2] * 255).round().astype(np.uint8))
    paper.paste(picture.resize(TILE, Image.Resampling.LANCZOS), (left, TILES_TOP))
    ImageDraw.Draw(paper).text((left, TILES_TOP + TILE[1] + 5), label, FAINT, font(13))


def draw_arrow(draw: ImageDraw.ImageDraw, start: int, end: int, height: float) -> None:
    """From the last tile to the video, in the gap between them."""
    tip = end - 6
    draw.line((start + 6, height, tip, height), FAINT, 2)
    draw.polygon(((tip, height), (tip - 7, height - 5), (tip - 7, height + 5)), FAINT)


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
