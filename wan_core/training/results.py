"""What a training leaves in its folder, and what its files say they were trained on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import FileError
from .trainee import Trainee

NAME = re.compile(r"(epoch|step)-\d+\.safetensors")
STEPS = "steps"  # among the metadata: how many were done


def results(folder: Path) -> list[tuple[int, Path]]:
    """(steps done, file) of all that a training has saved so far, in this order. Raises FileError if it is nothing."""
    files = [file for file in folder.glob("*.safetensors") if NAME.fullmatch(file.name)]
    if not files:
        raise FileError(f"No training has saved anything in {folder} yet. Name the folder of one.")
    return sorted((steps_of(file), file) for file in files)


def latest(folder: Path, steps: int) -> Path:
    """What was saved last after so many steps. Files of an earlier training may lie there too."""
    files = [file for done, file in results(folder) if done == steps]
    if not files:
        raise FileError(f"Nothing in {folder} was saved after {steps} steps. Was a file moved away? Train once more.")
    return max(files, key=lambda file: file.stat().st_mtime_ns)


def steps_of(file: Path) -> int:
    try:
        with safe_open(file, "pt") as stored:
            return int((stored.metadata() or {}).get(STEPS, 0))
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{file} could not be read ({error}). It may be damaged; delete it.") from error


def captioned(trainee: Trainee, captions: Iterable[str]) -> Trainee:
    """The same, but its files tell how often each tag, or sentence, is in the captions, as kohya's do."""
    counts = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    facts = {"ss_tag_frequency": json.dumps({"captions": dict(counts.most_common())}, ensure_ascii=False)}

    def write(path: Path, texts: Mapping[str, str], **options) -> None:
        trainee.write(path, {**facts, **texts}, **options)

    return replace(trainee, write=write)
