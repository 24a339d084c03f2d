"""Many videos as one, side by side, with words that tell them apart."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

PAPER, INK = (28, 30, 36), (236, 236, 236)
GAP, MARGIN, FONT = 4, 8, 14
LINE, LETTER = 18, 7  # height and about the width of a letter
HEADING = 28  # height of the columns' titles


def video_sheet(
    videos: Sequence[Sequence[Tensor]], rows: Sequence[str], columns: Sequence[str], height: int, label: int = 160
) -> Tensor:
    """Rows of videos (F, H, W, 3) in 0..1, all of one size and length, as one video (F, H', W', 3) with titles.

    Each is shrunk to at most `height` pixels; the rows' titles are `label` pixels wide. The sides of the result are
    even, as video files want them.
    """
    small = [[shrunk(video, height) for video in row] for row in videos]
    frames, cell_height, cell_width, _ = small[0][0].shape
    top = HEADING if any(columns) else 0
    tops = [top + number * (cell_height + GAP) for number in range(len(rows))]
    lefts = [label + number * (cell_width + GAP) for number in range(len(columns))]
    paper = Image.new("RGB", (even(lefts[-1] + cell_width), even(tops[-1] + cell_height)), PAPER)
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(FONT)
    for y, text in zip(tops, rows, strict=True):
        lines = textwrap.wrap(text, (label - 2 * MARGIN) // LETTER, max_lines=cell_height // LINE, placeholder=" …")
        draw.text((MARGIN, y + cell_height / 2), "\n".join(lines), INK, font, "lm")
    for x, text in zip(lefts, columns, strict=True):
        draw.text((x + cell_width / 2, top / 2), text, INK, font, "mm")
    sheet = torch.from_numpy(np.asarray(paper, np.float32) / 255).repeat(frames, 1, 1, 1)
    for y, row in zip(tops, small, strict=True):
        for x, video in zip(lefts, row, strict=True):
            sheet[:, y : y + cell_height, x : x + cell_width] = video
    return sheet


def shrunk(video: Tensor, height: int) -> Tensor:
    if video.shape[1] <= height:
        return video
    size = height, max(1, round(video.shape[2] * height / video.shape[1]))
    planes = F.interpolate(video.movedim(-1, 1), size, mode="bilinear", antialias=True, align_corners=False)
    return planes.movedim(1, -1)


def even(side: int) -> int:
    return side + side % 2
