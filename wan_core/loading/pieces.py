"""Writes a SentencePiece model from its tables, so that the library reads a vocabulary that came in another form.

The file is one protobuf message (`sentencepiece_model.proto` in github.com/google/sentencepiece); of protobuf it needs
so little that this writes the bytes itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

BYTE = 6  # the kind of a piece that stands for one byte of an unknown character
UNIGRAM = 1


class Piece(NamedTuple):
    text: str
    score: float
    kind: int  # 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte


def spiece_model(pieces: Iterable[Piece], normalisation: bytes, space_in_front: bool, single_spaces: bool) -> bytes:
    """The bytes of a `spiece.model`; `normalisation` is its table of replaced characters, may be empty."""
    pieces = list(pieces)
    numbers = {piece.text: number for number, piece in enumerate(pieces) if piece.kind in (2, 3)}
    training = _number(3, UNIGRAM) + _number(4, len(pieces)) + _number(35, any(p.kind == BYTE for p in pieces))
    for field, text in ((40, "<unk>"), (41, "<s>"), (42, "</s>"), (43, "<pad>")):
        training += _number(field, numbers.get(text, -1))
    writing = _text(2, normalisation) + _number(3, space_in_front) + _number(4, single_spaces) + _number(5, True)
    return b"".join(map(_piece, pieces)) + _text(2, training) + _text(3, writing)


def _piece(piece: Piece) -> bytes:
    score = bytes([2 << 3 | 5]) + struct.pack("<f", piece.score)
    return _text(1, _text(1, piece.text.encode()) + score + _number(3, piece.kind))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value % 2**64)


def _text(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first, the eighth set while more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
