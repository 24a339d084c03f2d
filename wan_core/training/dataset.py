"""What to train on: captions and clips, listed in a table (CSV, JSON, JSONL) or lying side by side in a folder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FileError
from .clips import MEDIA_SUFFIXES

DATA_FILE_KEYS = ("image", "video")


@dataclass(frozen=True)
class Item:
    """A clip or picture and its caption; `place` says where it is listed.

    columns: what else the row gives, by its name; the names of files have become their paths.
    """

    prompt: str
    file: Path
    place: str
    columns: Mapping[str, Any] = field(default_factory=dict)


def list_items(
    base: Path,
    metadata: Path | None = None,
    data_file_keys: Sequence[str] = DATA_FILE_KEYS,
    beside: Mapping[str, bool] | None = None,
    caption_prefix: str = "",
) -> tuple[list[Item], list[str]]:
    """The items, and a sentence for everything that cannot be one.

    A table has a column `prompt`, and the first of `data_file_keys` that a row fills names its file, below `base`;
    `beside` are other columns to take along, by whether they are files too. Without a table all clips and pictures
    below `base` are taken, each with the text file of its name as caption. Every caption begins with the prefix.
    """
    if not base.is_dir():
        raise FileError(f"There is no folder {base}. Name the one that holds the clips.")
    beside = beside or {}
    own = [key for key in data_file_keys if key not in beside]
    rows = folder_rows(base, own[0]) if metadata is None else table_rows(metadata)
    items, problems = [], []
    for place, row in rows:
        try:
            items.append(item_of(row, place, base, own, beside, caption_prefix))
        except FileError as error:
            problems.append(f"{place} is left out: {error}")
    return items, problems


def item_of(
    row: Mapping, place: str, base: Path, own: Sequence[str], beside: Mapping[str, bool], caption_prefix: str
) -> Item:
    name = next((row[key] for key in own if row.get(key)), None)
    prompt = row.get("prompt")
    if not isinstance(name, str):
        raise FileError(f"it has no file in {' or '.join(own)}.")
    if not isinstance(prompt, str):
        raise FileError(row.get("lacking", "it has no prompt."))
    columns = {}
    for key, is_file in beside.items():
        value = row.get(key)
        if value is not None and value != "":
            columns[key] = files_below(base, value) if is_file else value
    return Item(caption_prefix + prompt, files_below(base, name)[0], place, columns)


def files_below(base: Path, value: Any) -> tuple[Path, ...]:
    """The files that a cell names, one or a list."""
    files = tuple(base / str(name) for name in (value if isinstance(value, list) else [value]))
    for file in files:
        if not file.is_file():
            raise FileError(f"there is no file {file}.")
    return files


def folder_rows(base: Path, key: str) -> list[tuple[str, Mapping]]:
    """(place, row) of every clip and picture, as a table with its file in column `key` would have them."""
    found = []
    for file in sorted(base.rglob("*")):
        if file.suffix.lower() in MEDIA_SUFFIXES:
            name, caption = str(file.relative_to(base)), file.with_suffix(".txt")
            if caption.is_file():
                row = {key: name, "prompt": caption.read_text(encoding="utf-8-sig").strip()}
            else:
                row = {key: name, "lacking": f"there is no caption {caption.name} beside it."}
            found.append((name, row))
    return found


def table_rows(file: Path) -> list[tuple[str, Mapping]]:
    return [(f"row {number} of {file.name}", row) for number, row in enumerate(read_table(file), start=1)]


def read_csv(text: str) -> list[Mapping]:
    return list(csv.DictReader(io.StringIO(text)))


def read_json_lines(text: str) -> list[Mapping]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


TABLES: dict[str, Callable[[str], list[Mapping]]] = {".csv": read_csv, ".json": json.loads, ".jsonl": read_json_lines}


def read_table(file: Path) -> list[Mapping]:
    """The rows of a table. Raises FileError where it is none."""
    read = TABLES.get(file.suffix.lower())
    if read is None:
        raise FileError(f"{file} is no table that can be read. Give a file that ends in {', '.join(TABLES)}.")
    try:
        rows = read(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileError(f"There is no table {file}. Check the path.") from error
    except ValueError as error:
        raise FileError(f"{file} cannot be read ({error}). It has to be a {file.suffix} table in UTF-8.") from error
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise FileError(f'{file} is no list of rows such as {{"video": "a.mp4", "prompt": "a cat"}}.')
    return rows
