"""What a training needs to go on exactly where it stopped, in one file that is always whole.

Random numbers and the order of the data follow from the seed and the step's number, so the step is all there is to
keep of them, and of the schedule.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..errors import FileError, InputError
from ..saving import write_whole

FILE = "training.pt"


@dataclass
class Progress:
    """Steps done, and the loss of each. `recipe` names all that the steps follow from."""

    recipe: str
    step: int = 0
    losses: list[float] = field(default_factory=list)


def save_checkpoint(
    folder: Path, progress: Progress, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Replaces the checkpoint in `folder`; whenever the process dies, either the old or the new one is there."""
    state = {
        **vars(progress),
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": optimizer.state_dict(),
    }
    write_whole({folder / FILE: lambda file: torch.save(state, file)})


def resume(
    folder: Path, recipe: str, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Progress:
    """Put parameters and optimizer into the state of the checkpoint in `folder`; a new beginning if there is none.

    Raises InputError where the checkpoint belongs to another training, FileError where it is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return Progress(recipe)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise FileError(f"{file} is damaged. Delete it to begin this training again.") from error
    if state["recipe"] != recipe:
        raise InputError(
            f"{folder} holds a training that was begun with other settings, data or weights. Choose another "
            f"output_path, take the old settings to go on with it, or delete {FILE} there to begin again."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(recipe, state["step"], state["losses"])
