"""Checkpoints without their numbers: shapes and types alone, for plans that are made before anything is read.

Of a file they are in its header. Of a catalogued model that is not on this machine they follow from what is published
of it, so that one can ask before downloading.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..errors import FileError
from ..models.dit import DiT
from ..models.embedders import MotionController
from ..models.image_encoder import ImageEncoder, ImageEncoderLayout
from ..models.layout import DiTLayout
from ..models.text_encoder import UMT5Encoder, UMT5Layout
from ..models.vace import VACE, VACELayout
from ..models.vae import VideoVAE
from . import catalog
from .catalog import Row
from .checkpoint import Checkpoint, open_checkpoint
from .download import PLAIN, Library, find
from .mapped import Entry
from .sources import resolve

# The two sizes of published trunks, and the blocks of their VACE modules.
TRUNKS = {
    "1.3B": {"dim": 1536, "ffn_dim": 8960, "layers": 30, "heads": 12},
    "14B": {"dim": 5120, "ffn_dim": 13824, "layers": 40, "heads": 40},
}
VACE_LAYERS = {"1.3B": 15, "14B": 8}
POSITIONS = 514  # two pictures of 257 tokens, which FLF2V tells apart
RAYS = 24  # channels of the cameras' rays
TEXT_TOWER = 2_260_000_000  # bytes of the published image encoder's file that Wan leaves unread


class Outline(Checkpoint):
    """A checkpoint whose tensors lie on torch's meta device. `bytes` is the size of its files, `missing` tells that
    they are not on this machine."""

    bytes: int
    missing: bool


def open_outline(source: str | os.PathLike | Iterable, kind: str, library: Library = PLAIN) -> Outline:
    """The outline of what `source` names (see sources.resolve). Downloads nothing.

    Raises FileError as opening does; a published model that is not on this machine is no error.
    """
    row = catalog.BY_NAME.get(source) if isinstance(source, str) else None
    published = catalog.source_of(row.name, kind) if row else None
    if published and published.model_id and not find(published, library):
        return published_outline(row, kind)
    checkpoint = open_checkpoint(resolve(source, kind, library), kind)
    outline = Outline.__new__(Outline)
    vars(outline).update(vars(checkpoint))
    outline._entries = {name: _without_numbers(entry) for name, entry in checkpoint._entries.items()}
    outline.bytes, outline.missing = sum(file.stat().st_size for file in checkpoint.files), False
    return outline


def published_outline(row: Row, kind: str) -> Outline:
    """Of a catalogued model's files, whether they are on this machine or not."""
    network, dtype = published_network(row, kind)
    entries = {name: _entry(tuple(x.shape), dtype) for name, x in network.state_dict().items()}
    outline = Outline(entries, {}, [Path(row.files[kind].pattern)])
    size = sum(entry.dtype.itemsize * math.prod(entry.shape) for entry in entries.values())
    outline.bytes, outline.missing = size + (TEXT_TOWER if kind == "image_encoder" else 0), True
    return outline


def published_network(row: Row, kind: str) -> tuple[nn.Module, torch.dtype]:
    """What the published files of a catalogued model hold, on the meta device, and the type they are stored in.

    Wan-AI's own files are fp32 (those of T2V-1.3B by their size, the others by their like), the others bf16.
    """
    size = "14B" if "14B" in row.name else "1.3B"
    makers = {
        "dit": lambda: _trunk(row, size),
        "motion_controller": lambda: MotionController(256, TRUNKS[size]["dim"]),
        "text_encoder": lambda: UMT5Encoder(UMT5Layout()),
        "vae": VideoVAE,
        "image_encoder": lambda: ImageEncoder(ImageEncoderLayout()),
    }
    if kind not in makers:
        raise FileError(f"{row.name} is not on this machine, and nothing is known of its {kind.replace('_', ' ')}.")
    wide = kind in ("vae", "image_encoder") or (kind == "dit" and row.files["dit"].model_id.startswith("Wan-AI/"))
    with torch.device("meta"):
        return makers[kind](), torch.float32 if wide else torch.bfloat16


def _trunk(row: Row, size: str) -> nn.Module:
    trunk = DiT(published_layout(row))
    if "vace" in row.adapters:
        heads = {name: TRUNKS[size][name] for name in ("dim", "ffn_dim", "heads")}
        vace = VACE(VACELayout(layers=VACE_LAYERS[size], **heads))
        for name, child in vace.named_children():
            trunk.add_module(name, child)
    return trunk


def published_layout(row: Row) -> DiTLayout:
    """Of the trunk of a catalogued model."""
    has = set(row.adapters)
    in_dim = 48 if "control" in has else 32 if "camera" in has else 36 if "image" in has else 16
    return DiTLayout(
        **TRUNKS["14B" if "14B" in row.name else "1.3B"],
        in_dim=in_dim,
        image_tokens="image" in has,
        image_positions=POSITIONS if "FLF2V" in row.name else 0,
        reference="reference" in has,
        camera_channels=RAYS if "camera" in has else 0,
    )


def _entry(shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
    return Entry(shape, dtype, partial(torch.empty, shape, dtype=dtype, device="meta"))


def _without_numbers(entry: Entry) -> Entry:
    return entry if entry.packing else _entry(entry.shape, entry.dtype)
