"""Scores as tables of a page: in bold where they miss what is asked of every model."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..compute import processor
from ..errors import InputError
from .tasks import FACTS

LEAST_SHARE, LEAST_DECIBEL = 0.9, 25.0
EQUAL = 100.0  # decibels that only rounding leaves


@dataclass(frozen=True, eq=False)
class Row:
    """What was measured of videos that were made in one way.

    scores: shares of 0..1, or decibels where the name ends in "dB"; those of `FACTS` have columns of their own.
    """

    name: str
    given: str
    scores: Mapping[str, float]
    videos: Sequence[np.ndarray] = field(default=(), repr=False)

    def __str__(self) -> str:
        others = [f"{name.removesuffix(', dB')} {told(name, score)}" for name, score in self.scores.items()
                  if name not in FACTS]  # fmt: skip
        facts = [told(name, self.scores[name]) if name in self.scores else "" for name in FACTS]
        return f"| {' | '.join([self.name, self.given, ', '.join(others), *facts])} |"


def told(name: str, score: float) -> str:
    if name.endswith("dB"):
        text = "equal" if score > EQUAL else f"{score:.1f} dB"
        return text if score >= LEAST_DECIBEL else f"**{text}**"
    return f"{score:.0%}" if score >= LEAST_SHARE else f"**{score:.0%}**"


def table(heads: Sequence[str], rows: Sequence[Row]) -> str:
    """heads: of the columns before those of the facts."""
    head = [*heads, *FACTS]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(str, rows)])


def origin() -> str:
    """When, where and of what something was measured, in a line."""
    folder = Path(__file__).parent
    changed = git("status", "--porcelain", "--untracked-files=no", "--", folder.parent)
    commit = git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    return f"Measured on {datetime.date.today()} at {commit}, torch {torch.__version__}, {processor()}."


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *map(str, arguments)], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands in the page between the marks of this name. Raises InputError where there are none."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise InputError(
            f"{page} has no section to put the table into. Add the lines {begin.strip()} and {end.strip()}."
        )
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def sheet(videos: Sequence[np.ndarray], columns: int = 6) -> np.ndarray:
    """Videos (F, H, W, 3) -> one uint8 picture: a row a video, `columns` of its frames side by side."""
    rows = []
    for video in videos:
        chosen = np.linspace(0, len(video) - 1, columns).round().astype(int)
        rows.append(np.concatenate(list(video[chosen]), axis=1))
    return (np.concatenate(rows) * 255).round().astype(np.uint8)
