"""What a training tells while it runs: tables in its folder, and a log for TensorBoard beside them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import InputError
from ..saving import write_whole

LOSSES, VALIDATION, TENSORBOARD = "losses.csv", "validation.csv", "tensorboard"
LOSS_COLUMNS = ("step", "epoch", "loss", "learning_rate", "gradient_norm", "seconds")
VALIDATION_COLUMNS = ("step", "low", "high", "loss")


class Log:
    """Goes on with the tables in `folder` after its first `done` steps; what was written beyond them is taken out.

    Raises InputError where a log for TensorBoard is wanted but cannot be written.
    """

    def __init__(self, folder: Path, done: int, tensorboard: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for name, columns in ((LOSSES, LOSS_COLUMNS), (VALIDATION, VALIDATION_COLUMNS)):
            shorten(folder / name, columns, done)
        self.board = open_board(folder / TENSORBOARD, done) if tensorboard else None

    def step(self, facts: Mapping[str, float]) -> None:
        """A step is done: a number for each of LOSS_COLUMNS."""
        write(self.folder / LOSSES, [[facts[column] for column in LOSS_COLUMNS]], "a")
        self._show(facts["step"], {f"train/{name}": facts[name] for name in LOSS_COLUMNS[2:]})

    def validation(self, step: int, losses: Mapping[tuple[float, float], float]) -> None:
        """The loss on held-out clips for each range of noise levels."""
        rows = [[step, low, high, loss] for (low, high), loss in losses.items()]
        write(self.folder / VALIDATION, rows, "a")
        self._show(step, {f"validation/{low:g}-{high:g}": loss for (low, high), loss in losses.items()})

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def _show(self, step: float, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items() if self.board is not None else ():
            self.board.add_scalar(name, number, int(step))


def open_board(folder: Path, done: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"TensorBoard cannot be imported ({error}). Run 'pip install tensorboard', or train without its log; "
            f"{LOSSES} holds the same numbers."
        ) from error
    return SummaryWriter(str(folder), purge_step=done + 1)


def read_losses(folder: Path) -> list[float]:
    """The loss of each step of the training in `folder` so far."""
    return [float(row["loss"]) for row in read(folder / LOSSES)]


def read(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if None not in row.values()]  # a last row may be half written


def shorten(file: Path, columns: Sequence[str], done: int) -> None:
    rows = [[row[column] for column in columns] for row in read(file) if int(row["step"]) <= done]
    write_whole({file: lambda path: write(path, [columns, *rows], "w")})


def write(file: Path, rows: Sequence[Sequence[object]], mode: str) -> None:
    with file.open(mode, newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
