"""Quantised weights and the scales beside them become one packed entry.

Three generations of files name them differently: `scale_weight` (ComfyUI until 2025, musubi-tuner), `weight_scale`
with a `comfy_quant` note for each layer or one for the file (ComfyUI since). What a weight's packing is follows from
the types and shapes; the notes tell only whether it was rotated, and what WanFlow does not know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FileError
from ..models.packed import Packed, Unpack
from ..models.packings import (
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    rows_of_tiles,
    unpack_mxfp8,
    unpack_nvfp4,
    unpack_rotated,
    unpack_scaled,
)
from .mapped import Entry, type_name

NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise")
# Scales of a layer's input, for programs that multiply in eight bits, and the note on the layer.
UNUSED = (".scale_input", ".input_scale", ".comfy_quant")


class Note(NamedTuple):
    """What a file says of a layer: the format, and how many neighbours were rotated together (0: none)."""

    format: str | None
    group: int = 0


def fold_scales(
    entries: Mapping[str, Entry], stored_names: Mapping[str, str], metadata: Mapping[str, str], description: str
) -> dict[str, Entry]:
    """The same entries (published names), each weight that has scales packed together with them.

    `stored_names` tells the name in the file for each published one. Raises FileError for a quantisation that WanFlow
    does not know.
    """
    notes = _notes(entries, stored_names, metadata, description)
    for note in notes.values():
        if note.format not in FORMATS or (note.group and note.format != "int8_tensorwise"):
            raise _refusal(description, f"{note.format}{', rotated' if note.group else ''}")
    folded = {name: entry for name, entry in entries.items() if not name.endswith(UNUSED)}
    for name, weight in entries.items():
        layer = name.removesuffix("weight")
        scale = next((s for s in (f"{layer}scale_weight", f"{layer}weight_scale") if s in entries), None)
        if layer != name and scale:
            parts = {"weight": weight, "scale": folded.pop(scale)}
            if scale == f"{layer}scale_weight":
                folded.pop(f"{layer}weight_scale", None)  # a file for both generations of ComfyUI says it twice
            if second := folded.pop(f"{layer}weight_scale_2", None):
                parts = {"weight": weight, "block_scale": parts["scale"], "scale": second}
            group = notes[layer].group if layer in notes else 0
            folded[name] = _packed_entry(parts, group, f"{description}: '{name}'")
    return folded


def _notes(
    entries: Mapping[str, Entry], stored_names: Mapping[str, str], metadata: Mapping[str, str], description: str
) -> dict[str, Note]:
    """What the file says about the quantisation of its layers, by their published names with a dot at the end."""
    try:
        by_stored = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        notes = {
            name.removesuffix("weight"): _note(by_stored[layer])
            for name, stored in stored_names.items()
            if (layer := stored.removesuffix(".weight")) in by_stored
        }
        for name, entry in entries.items():
            if name.endswith(".comfy_quant"):
                notes[name.removesuffix("comfy_quant")] = _note(json.loads(bytes(entry.read().tolist())))
        return notes
    except (ValueError, AttributeError, TypeError) as error:
        raise FileError(f"{description} has a damaged note on its quantisation. Download it again.") from error


def _note(content: dict) -> Note:
    options = {**(content.get("params") or {}), **content}
    return Note(options.get("format"), int(options.get("convrot_groupsize", 256)) if options.get("convrot") else 0)


def _packed_entry(parts: Mapping[str, Entry], group: int, what: str) -> Entry:
    weight, scale = parts["weight"], parts["scale"]
    rows, columns = (*weight.shape, 0)[:2]
    if weight.dtype == torch.uint8 and _in_tiles(parts.get("block_scale"), rows, columns * 2 // NVFP4_BLOCK):
        shape, unpack, packing = (rows, columns * 2), unpack_nvfp4, "nvfp4"
        arrange = {"block_scale": partial(_fp8_tiles, rows=rows, columns=columns * 2 // NVFP4_BLOCK)}
    elif weight.dtype in NARROW[:2] and scale.dtype == torch.uint8 and _in_tiles(scale, rows, columns // MXFP8_BLOCK):
        shape, unpack, packing = weight.shape, unpack_mxfp8, "mxfp8"
        arrange = {"scale": partial(rows_of_tiles, rows=rows, columns=columns // MXFP8_BLOCK)}
    elif weight.dtype in NARROW and scale.dtype.is_floating_point and _fits(scale.shape, rows, columns):
        shape, unpack, packing = weight.shape, unpack_scaled, f"{type_name(weight.dtype)} with scales"
        single = scale.shape in ((), (1,))
        arrange = {} if single else {"scale": lambda scale: scale.reshape(rows, -1)}
        if group and (columns % group or not math.log(group, 4).is_integer()):
            raise _refusal(what, f"rotated by {group} of {columns} columns")
        if group:
            unpack, packing = partial(unpack_rotated, group), f"{packing}, rotated"
    else:
        stored, scales = (f"{type_name(part.dtype)} {list(part.shape)}" for part in (weight, scale))
        raise _refusal(what, f"{stored} with scales {scales}")
    return Entry(shape, weight.dtype, lambda: _read(shape, parts, unpack, arrange), packing)


def _fits(scale: tuple[int, ...], rows: int, columns: int) -> bool:
    """Whether these are one scale, one for each row, or (rows, blocks) with or without a last side of one."""
    if scale in ((), (1,), (rows,)):
        return True
    if len(scale) not in (2, 3) or scale[0] != rows or scale[2:] not in ((), (1,)):
        return False
    return scale[1] > 0 and columns % scale[1] == 0


def _in_tiles(scale: Entry | None, rows: int, columns: int) -> bool:
    """Whether these are scales for so many rows and columns, padded to cuBLAS's tiles."""
    return scale is not None and math.prod(scale.shape) == math.ceil(rows / 128) * math.ceil(columns / 4) * 512


def _read(shape: tuple[int, ...], parts: Mapping[str, Entry], unpack: Unpack, arrange: Mapping) -> Packed:
    tensors = {name: entry.read() for name, entry in parts.items()}
    tensors |= {name: function(tensors[name]) for name, function in arrange.items()}
    if tensors["scale"].numel() == 1:
        tensors["scale"] = tensors["scale"].reshape(())
    return Packed(shape, tensors, unpack)


def _fp8_tiles(tiled: Tensor, rows: int, columns: int) -> Tensor:
    return rows_of_tiles(tiled.view(torch.uint8), rows, columns).view(torch.float8_e4m3fn)


def _refusal(what: str, how: str) -> FileError:
    return FileError(
        f"{what} is quantised in a way that WanFlow cannot read ({how}). "
        "Take the bf16, fp16, fp8 or GGUF file of the same model."
    )
