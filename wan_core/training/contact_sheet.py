"""A picture of what will be trained on: some frames of each clip, and its caption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import WanError
from ..fit import fit_pictures
from ..sheet import video_sheet
from .inputs import Piece, read_footage

MOST = 24  # clips, evenly chosen of all
FRAMES = 4
HEIGHT, CAPTION = 96, 320  # pixels: of a frame, and beside it


def contact_sheet(pieces: Sequence[Piece]) -> Tensor:
    """(1, H, W, 3) in 0..1, a row a clip. Clips of other shapes than the first have bars at their sides."""
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
    return video_sheet(cells, captions, [""] * FRAMES, HEIGHT, CAPTION)


def some(clip: Tensor) -> Tensor:
    """FRAMES of them, from the first to the last."""
    return clip[torch.linspace(0, len(clip) - 1, FRAMES).round().long()]
