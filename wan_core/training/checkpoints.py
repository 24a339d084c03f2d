"""What a training needs to go on exactly where it stopped, in one file that is always whole.

Random numbers, the order of the data and the schedule follow from the seed and the step's number, so that the step is
all there is to keep of them.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError, InputError
from ..saving import write_whole

FILE = "training.pt"


@dataclass
class Progress:
    """Steps done, and the loss of each. `recipe` names all that the steps follow from."""

    recipe: str
    step: int = 0
    losses: list[float] = field(default_factory=list)


def save_checkpoint(folder: Path, progress: Progress, state: Mapping[str, Any]) -> None:
    """Replaces the checkpoint in `folder`; whenever the process dies, either the old or the new one is there."""
    write_whole({folder / FILE: lambda file: torch.save({**vars(progress), **state}, file)})


def load_checkpoint(folder: Path, recipe: str) -> tuple[Progress, dict[str, Any]] | None:
    """The progress and state of the checkpoint in `folder`, None where there is none.

    Raises InputError where the checkpoint belongs to another training, FileError where it is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise FileError(f"{file} is damaged. Delete it to begin this training again.") from error
    if state["recipe"] != recipe:
        raise InputError(
            f"{folder} holds a training that was begun with other settings, data or weights. Choose another output "
            f"folder, take the old settings to go on with it, or delete {FILE} there to begin again."
        )
    return Progress(*(state.pop(name) for name in ("recipe", "step", "losses"))), state
