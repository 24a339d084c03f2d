"""GGUF files: a header read by the `gguf` package, and tensors in blocks that stay mapped and packed.

The names are those of the published model (diffusion models, made by city96's ComfyUI-GGUF) or of llama.cpp (UMT5),
sides are stored in the reverse order, and a text encoder brings its vocabulary along.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ..errors import FileError
from ..models import ggml
from ..models.packed import Packed
from .mapped import Entry, map_file, view
from .pieces import Piece, spiece_model

# Types that are no blocks.
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}  # fmt: skip
# A side order that the format cannot hold (it ends at four sides) is noted under this key.
SHAPE_KEY = "comfy.gguf.orig_shape."
TOKENIZER = "tokenizer.ggml."


def open_gguf(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a file. Raises FileError if it is truncated, damaged or of an unknown type."""
    try:
        import gguf
    except ImportError:
        raise FileError(f"{path} is a GGUF file, and reading it needs the package gguf: 'pip install gguf'.") from None
    with _telling_damage(path):
        reader = _reader_class(gguf)(path)
        mapped = map_file(path)
        entries = {tensor.name: _entry(path, reader, tensor, mapped) for tensor in reader.tensors}
        if _value(reader, TOKENIZER + "model") == "t5":
            # Under the name that ComfyUI's files give the same thing
            entries["spiece_model"] = Entry((0,), torch.uint8, partial(_vocabulary, path, reader))
        metadata = {name: _value(reader, name) for name in ("general.architecture", "general.name")}
    return entries, {name: str(value) for name, value in metadata.items() if value is not None}


@contextmanager
def _telling_damage(path: Path) -> Iterator[None]:
    """What the reader stumbles over, in words."""
    try:
        yield
    except FileError:
        raise
    except (ValueError, LookupError, OverflowError, TypeError, struct.error) as error:
        raise FileError(f"{path} is damaged or incomplete and cannot be read as GGUF. Download it again.") from error


def _reader_class(gguf) -> type:
    """The package's reader, which takes lists in one piece.

    Its own way, element by element, needs 16 seconds and 0.9 GB for the vocabulary of UMT5.
    """

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, offset: int, kind: int):
            if kind != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(offset, kind)
            (item, count), begin = struct.unpack_from("<IQ", self.data, offset), offset + 12
            if item == gguf.GGUFValueType.STRING:
                parts, end = _texts(memoryview(self.data), begin, count)
            else:
                parts = [self._get(begin, self.gguf_scalar_to_np[item], count)]
                end = begin + parts[0].nbytes
            return end - offset, parts, range(len(parts)), [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(item)]

    return Reader


def _texts(data: memoryview, begin: int, count: int) -> tuple[list[memoryview], int]:
    """`count` texts, each behind its length, and where they end."""
    texts = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", data, begin)
        texts.append(data[begin + 8 : begin + 8 + length])
        begin += 8 + length
    return texts, begin


def _entry(path: Path, reader, tensor, mapped: mmap.mmap) -> Entry:
    stored = tuple(int(side) for side in reversed(tensor.shape))
    shape = tuple(_value(reader, SHAPE_KEY + tensor.name) or stored)
    if math.prod(shape) != math.prod(stored):
        raise ValueError(f"{tensor.name} cannot have the sides {shape}")
    kind, begin = tensor.tensor_type.name, int(tensor.data_offset)
    if dtype := PLAIN.get(kind):
        return Entry(shape, dtype, partial(view, mapped, begin, shape, dtype))
    if kind not in ggml.TYPES:
        raise FileError(
            f"{path} stores '{tensor.name}' as {kind}, which WanFlow cannot read. Take a file with another "
            f"quantisation of the same model ({', '.join(ggml.TYPES)}); Q4_K and more bits look well."
        )
    packing = ggml.TYPES[kind]
    packed_shape = (*stored[:-1], stored[-1] // packing.numbers * packing.bytes)
    return Entry(
        shape,
        torch.uint8,
        lambda: Packed(shape, {"weight": view(mapped, begin, packed_shape, torch.uint8)}, packing),
        kind,
    )


def _value(reader, name: str):
    """A number, a text or a list of them; None where the file does not have it."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _vocabulary(path: Path, reader) -> torch.Tensor:
    """The tokenizer's tables as the file of SentencePiece that they were made from."""
    with _telling_damage(path):
        tokens, scores, kinds = (_value(reader, TOKENIZER + name) for name in ("tokens", "scores", "token_type"))
        model = spiece_model(
            [Piece(*row) for row in zip(tokens, scores, kinds, strict=True)],
            normalisation=bytes(_value(reader, TOKENIZER + "precompiled_charsmap") or b""),
            space_in_front=bool(_value(reader, TOKENIZER + "add_space_prefix")),
            single_spaces=bool(_value(reader, TOKENIZER + "remove_extra_whitespaces")),
        )
    return torch.frombuffer(bytearray(model), dtype=torch.uint8)
