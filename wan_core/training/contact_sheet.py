"""A picture of what will be trained on: some frames of each clip, and its caption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import WanError
from ..fit import fit_pictures
from ..sheet import video_sheet
from .inputs import Piece, read_footage

MOST = 24  # clips, evenly chosen of all
COLUMN = 8  # of them below each other
FRAMES = 4
HEIGHT, CAPTION = 96, 240  # pixels: of a frame, and beside it


def contact_sheet(pieces: Sequence[Piece]) -> Tensor:
    """(1, H, W, 3) in 0..1. Clips of other shapes than the first have bars at their sides."""
    rows, captions = [], []
    for number in torch.linspace(0, len(pieces) - 1, min(MOST, len(pieces))).round().long().tolist():
        try:
            rows.append(read_footage(pieces[number], ()).clip)
        except WanError as error:  # the training will leave it out, and say so
            captions.append(str(error))
            rows.append(torch.zeros(1, 16, 16, 3))
        else:
            captions.append(pieces[number].item.prompt)
    if not rows:
        rows, captions = [torch.zeros(1, HEIGHT, HEIGHT, 3)], ["There is nothing to train on."]
    _, height, width, _ = rows[0].shape
    cells = [[fit_pictures(frame[None], width, height, "contain") for frame in some(clip)] for clip in rows]
    columns = [
        video_sheet(cells[first : first + COLUMN], captions[first : first + COLUMN], [""] * FRAMES, HEIGHT, CAPTION)
        for first in range(0, len(cells), COLUMN)
    ]
    tallest = columns[0].shape[1]
    return torch.cat([F.pad(column, (0, 0, 0, 0, 0, tallest - column.shape[1])) for column in columns], dim=2)


def some(clip: Tensor) -> Tensor:
    """FRAMES of them, from the first to the last."""
    return clip[torch.linspace(0, len(clip) - 1, FRAMES).round().long()]
