"""What the blocks read beside the video, keys and values of the prompts and the image, worked out once a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .. import compute
from ..adapters.injection import IMAGE_TOKENS
from ..compute import device_memory
from ..model import WanModel
from ..models.dit import TEXT_ROWS


class Contexts:
    """For each of the texts (b, L, text width) of a run a place to keep what follows from it; for `Run.kept`.

    Nothing is kept where weights travel, because the memory serves them better; where there is not enough of it beside
    `room()` bytes for the rest of the run; nor for compiled blocks, which are one program for all.
    """

    def __init__(self, model: WanModel, texts: Sequence[Tensor], room: Callable[[], int]):
        memory = device_memory(model.device)
        fits = memory is None or (
            model.resident_bytes() == model.total_bytes() and room() + contexts_room(model, texts) <= memory[1]
        )
        keeps = fits and model.compile is None and not compute.PLAIN
        self.kept: list[dict | None] = [{} if keeps else None for _ in texts]

    def drop(self) -> bool:
        """Keep nothing any more. False where nothing was kept."""
        held = any(self.kept)
        self.kept = [None] * len(self.kept)
        return held


def contexts_room(model: WanModel, texts: Sequence[Tensor]) -> int:
    """Bytes of all that is kept for these texts: padded, but on a processor with one row for all the padding."""
    layout, vace = model.layout, model.module.vace
    blocks = layout.layers + (0 if vace is None else vace.layout.layers)
    lengths = [text.shape[1] + 1 if model.device.type == "cpu" else max(TEXT_ROWS, text.shape[1]) for text in texts]
    rows = sum(text.shape[0] * length for text, length in zip(texts, lengths, strict=True)) * blocks
    if layout.image_tokens:
        rows += sum(text.shape[0] for text in texts) * max(IMAGE_TOKENS, layout.image_positions) * layout.layers
    return 2 * rows * layout.dim * model.compute_dtype.itemsize
