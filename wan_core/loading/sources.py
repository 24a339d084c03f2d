"""From what a user names to files: a path, the parts of a checkpoint, a folder, a catalogued model, a model id."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import FileError
from . import catalog
from .catalog import Source
from .checkpoint import open_checkpoint
from .download import PLAIN, Library, fetch
from .identify import KINDS, identify
from .shards import INDEX_SUFFIX, WEIGHT_SUFFIXES, group

# Where a Diffusers folder keeps its models.
SUBFOLDERS = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae", "image_encoder": "image_encoder"}
MODEL_ID = re.compile(r"^(?P<model_id>[\w.-]+/[\w.-]+):(?P<pattern>[^:\\]*)$")


def resolve(source: str | os.PathLike | Iterable, kind: str, library: Library = PLAIN) -> list[Path]:
    """The files of this kind (see identify.KINDS) that `source` names.

    A text may hold several paths, one a line. `library` is where published models lie or come to.
    """
    if isinstance(source, str):
        parts = [line.strip().strip("\"'") for line in source.splitlines() if line.strip()]
    else:
        parts = [source] if isinstance(source, os.PathLike) else list(source)
    if not parts:
        raise FileError(f"No file was named. '{KINDS[kind].node}' needs {KINDS[kind].noun}.")
    if len(parts) > 1:
        return [Path(part) for part in parts]
    return _resolve_one(parts[0], kind, library)


def tokenizer_folder(
    source: str | os.PathLike | Iterable, files: list[Path], library: Library = PLAIN, named: str = ""
) -> Path:
    """The tokenizer of a text encoder: the `named` one (a folder, its file, or a model id and pattern), if any is; else
    one beside the encoder's files; else the one of its catalogue row.

    Encoders from elsewhere get the published tokenizer, which all of them share.
    """
    if named:
        path = Path(named)
        if (match := MODEL_ID.match(named)) and not path.exists():
            path = fetch(Source(match["model_id"], match["pattern"]), library)[0]
        return path
    parent = files[0].parent
    for folder in (parent / "google" / "umt5-xxl", parent / "umt5-xxl", parent, parent.parent / "tokenizer"):
        if (folder / "tokenizer.json").is_file() or (folder / "spiece.model").is_file():
            return folder
    row = catalog.BY_NAME.get(source) if isinstance(source, str) else None
    published = (row or catalog.BY_NAME["Wan2.1-T2V-1.3B"]).files["tokenizer"]
    return fetch(published, library)[0]


def _resolve_one(part: str | os.PathLike, kind: str, library: Library) -> list[Path]:
    path = Path(part)
    if path.is_dir():
        return _pick(path, kind)
    if path.exists():
        return [path]
    if match := MODEL_ID.match(str(part)):
        found = fetch(Source(match["model_id"], match["pattern"]), library)
        return _pick(found[0], kind) if found[0].is_dir() else found
    if path.suffix in WEIGHT_SUFFIXES or path.name.endswith(INDEX_SUFFIX) or len(path.parts) > 1:
        raise FileError(f"There is no file {path}. Check the path, or download the file again.")
    return fetch(catalog.source_of(str(part), kind), library)


def _pick(folder: Path, kind: str) -> list[Path]:
    """The one checkpoint of this kind in a folder, or in the part of a Diffusers folder that is for this kind."""
    if (folder / "model_index.json").is_file() and kind in SUBFOLDERS:
        folder = folder / SUBFOLDERS[kind]
        if not folder.is_dir():
            noun = KINDS[kind].noun.removeprefix("a ")
            raise FileError(f"The Diffusers folder {folder.parent} has no {noun}: its {folder.name} is missing.")
    fitting, problems = [], []
    for files in group(folder):
        try:
            if identify(open_checkpoint(files, kind).shapes).kind == kind:
                fitting.append(files)
        except FileError as error:  # told only if nothing else fits: the broken file may be of another kind
            problems.append(error)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(files[0].name for files in fitting)
        raise FileError(f"{folder} holds {len(fitting)} files that fit ({names}). Give the path of one of them.")
    if problems:
        raise problems[0]
    raise FileError(f"{folder} holds no {KINDS[kind].noun.removeprefix('a ')}, such as {KINDS[kind].example}.")
