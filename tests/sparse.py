"""Checkpoints of true size that take no room: a header, and zeros that no disk holds."""

import json
import math
import struct
from pathlib import Path

MANIFEST = json.loads((Path(__file__).parent / "data" / "wan21_key_manifest.json").read_text())
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}


def published_shapes(row):
    """Every tensor of a published model; `{N}` in a name stands for the numbers of its blocks."""
    return {
        name.replace("{N}", str(i)): tuple(shape)
        for name, (shape, count) in MANIFEST[row]["keys"].items()
        for i in range(count if "{N}" in name else 1)
    }


def write_sparse(path, shapes, dtype="F32", metadata=None):
    """`dtype` is one type for all, or a function from a name to its type. Returns the path."""
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        kind = dtype(name) if callable(dtype) else dtype
        end = offset + WIDTHS[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path
