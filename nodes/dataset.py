"""Menu WanFlow/training: the clips and captions to train on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..wan_core.errors import FileError
from ..wan_core.training.clips import Library
from ..wan_core.training.contact_sheet import contact_sheet
from ..wan_core.training.dataset import Item, list_items
from ..wan_core.training.framing import SAMPLINGS, WAN_RATE, Framing
from ..wan_core.training.inputs import INPUTS, columns
from ..wan_core.training.survey import survey
from ..wan_core.video import parse_size
from .host import host, io
from .wires import WanDataset, names

CACHE = "training/cache"  # below the output folder: trainings share what was found out and encoded
BESIDE = columns(INPUTS)  # that a table may have, by whether they name files


@dataclass(frozen=True)
class TrainingData:
    """Items to train on, and how.

    said      sentences on what is left out or shortened, which the user has read
    largest   (height, width) of the largest clip
    options   those of `prepare`
    """

    items: tuple[Item, ...]
    said: tuple[str, ...]
    framing: Framing
    largest: tuple[int, int]
    repeat: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


class Dataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowDataset",
            display_name="Wan Training Data",
            category="WanFlow/training",
            description="Lists clips and pictures with their captions, and shows what will be trained on and what not.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "folder", default="", tooltip="A folder in ComfyUI's input folder, or the path of one anywhere."
                ),
                io.String.Input(
                    "metadata",
                    default="",
                    tooltip="A .csv, .json or .jsonl in the folder (or its path) with a column prompt. Empty: each "
                    "file has its caption in a .txt of its name.",
                ),
                io.String.Input(
                    "data_file_keys",
                    default="video,image",
                    tooltip="Columns of the table that name the file; the first that is filled counts.",
                ),
                io.String.Input(
                    "size",
                    default="832x480",
                    tooltip="Width x height of all clips; the overhang is cut off. original keeps each clip's shape.",
                ),
                io.Int.Input(
                    "num_frames",
                    default=81,
                    min=1,
                    max=4097,
                    step=4,
                    tooltip="Frames of a clip, 4n+1. Shorter clips give as many as they have.",
                ),
                io.Float.Input(
                    "frame_rate",
                    default=WAN_RATE,
                    min=0.0,
                    max=240.0,
                    step=0.01,
                    tooltip="Clips are brought to this rate: Wan's own is 16. 0 takes frames as they come.",
                ),
                io.Int.Input("repeat", default=1, min=1, max=100_000, tooltip="How often an epoch shows each clip."),
                io.String.Input(
                    "caption_prefix", default="", tooltip="Put in front of every caption, such as a word for the style."
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="In this share of the cases the caption is left out, which keeps cfg working well: 0.1.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=False,
                    tooltip="Every clip once more, mirrored, unless its caption tells left from right.",
                ),
                io.Combo.Input(
                    "sampling",
                    options=list(SAMPLINGS),
                    default="head",
                    tooltip="Of longer clips: head takes the first frames, uniform pieces spread over it, chunk all.",
                ),
                io.Int.Input("samples", default=1, min=1, max=1000, tooltip="Pieces of each clip, of uniform."),
                io.Boolean.Input(
                    "buckets",
                    default=False,
                    tooltip="Each clip in its own shape, of as many pixels as size; like shapes train in one batch.",
                ),
            ],
            outputs=[
                WanDataset.Output(display_name="dataset", tooltip="For Wan Train."),
                io.Image.Output(display_name="preview", tooltip="A contact sheet of what will be trained on."),
                io.String.Output(display_name="report", tooltip="What is left out or shortened, and why."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder):
        try:
            host.input_folder(folder)
        except FileError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder=None, metadata=None, **_):
        """Of all files there: a caption that was mended counts."""
        whole = hashlib.sha256()
        places = [host.input_folder(folder)] if folder else []
        if metadata and Path(metadata).is_file():
            places.append(Path(metadata))
        for place in places:
            for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
                facts = file.stat()
                whole.update(f"{file} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        return whole.hexdigest()

    @classmethod
    def execute(
        cls, folder, metadata, data_file_keys, size, num_frames, frame_rate, repeat, caption_prefix, caption_dropout,
        flip, sampling, samples, buckets,
    ):  # fmt: skip
        base, keys = host.input_folder(folder), names(data_file_keys)
        table = next((path for path in (base / metadata, Path(metadata)) if path.is_file()), base / metadata)
        items, problems = list_items(base, table if metadata.strip() else None, keys, BESIDE, caption_prefix)
        width, height = parse_size(size) or (None, None)
        framing = Framing(
            num_frames, height, width, frame_rate=frame_rate, buckets=buckets, sampling=sampling, samples=samples
        )
        library = Library(host.output_dir() / CACHE / "files.json")
        pieces, notes = survey(items, framing, (), library, flip)
        report = "\n".join([f"{len(pieces)} clips of {len(items)} files.", *problems, *notes])
        host.say(report)
        largest = max(((piece.cut.height, piece.cut.width) for piece in pieces), default=(16, 16), key=math.prod)
        options = {"flip": flip, "caption_dropout": caption_dropout}
        dataset = TrainingData(tuple(items), (*problems, *notes), framing, largest, repeat, options)
        preview = contact_sheet(pieces).to(host.intermediate_device())
        return io.NodeOutput(dataset, preview, report, ui=shown(preview, report))


def shown(pictures: torch.Tensor, text: str) -> dict[str, Any]:
    """What the node shows: pictures (n, H, W, 3), and the text below its name."""
    entries = []
    for picture in pictures:
        target = host.output_path("WanFlow_training_data", "png", temporary=True)
        Image.fromarray((picture.cpu().numpy() * 255).round().astype("uint8")).save(target.path)
        entries.append({"filename": target.filename, "subfolder": target.subfolder, "type": "temp"})
    return {"images": entries, "text": [text]}


NODES = [Dataset]
