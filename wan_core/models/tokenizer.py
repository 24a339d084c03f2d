"""Prompts become token numbers, exactly as for UMT5, and nothing is cut silently."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ftfy
import sentencepiece
import tokenizers
import torch
from torch import Tensor

from ..errors import FileError

MAX_TOKENS = 512  # what the published models were trained with, the end mark included
PADDING = 0
END = 1  # </s>


@dataclass(frozen=True)
class Tokens:
    """A batch of tokenised texts, padded to the longest of them.

    ids, mask: (n, L) int64, mask 1 at real tokens. lengths: real tokens per text, with the end mark.
    cut: what did not fit in MAX_TOKENS, per text ("" if all of it did). cut_counts: the same in tokens.
    """

    ids: Tensor
    mask: Tensor
    lengths: tuple[int, ...]
    cut: tuple[str, ...]
    cut_counts: tuple[int, ...]


def clean(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities (twice: they come doubly escaped), collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Vocabulary(Protocol):
    """What turns clean text into token numbers, without the end mark, and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class JsonVocabulary:
    """A `tokenizer.json`, read by the `tokenizers` library."""

    def __init__(self, path: Path):
        try:
            self.library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file that it cannot read
            raise FileError(f"{path} is not a readable tokenizer file ({error}). Download it again.") from error
        self.library.no_truncation()
        self.library.no_padding()

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids)


class PieceVocabulary:
    """The content of a `spiece.model`, read by the `sentencepiece` library. `origin` names it in messages."""

    def __init__(self, model: bytes, origin: str | Path):
        try:
            self.library = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise FileError(f"{origin} is not a readable SentencePiece model ({error}). Download it again.") from error

    def encode(self, text: str) -> list[int]:
        return self.library.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids)


class Tokenizer:
    """`tokenizer(texts)` cleans, tokenises, cuts at MAX_TOKENS, ends with </s> and pads."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Open a folder with a tokenizer.json or a spiece.model (`google/umt5-xxl`), or one of these files."""
        path = Path(path)
        for file in (path,) if path.is_file() else (path / "tokenizer.json", path / "spiece.model"):
            if file.is_file():
                pieces = file.suffix == ".model"
                return cls(PieceVocabulary(file.read_bytes(), file) if pieces else JsonVocabulary(file))
        raise FileError(
            f"There is no tokenizer in {path}: it needs a tokenizer.json or a spiece.model. "
            "Download the folder google/umt5-xxl of Wan-AI/Wan2.1-T2V-1.3B and keep it beside the text encoder."
        )

    def __call__(self, texts: list[str]) -> Tokens:
        room = MAX_TOKENS - 1
        encoded = [self.vocabulary.encode(clean(text)) for text in texts]
        kept = [[*ids[:room], END] for ids in encoded]
        lengths = tuple(len(ids) for ids in kept)
        ids = torch.full((len(kept), max(lengths)), PADDING)
        for row, tokens in zip(ids, kept, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        cut = tuple(self.vocabulary.decode(ids[room:]) if len(ids) > room else "" for ids in encoded)
        return Tokens(ids, mask, lengths, cut, tuple(max(0, len(ids) - room) for ids in encoded))
