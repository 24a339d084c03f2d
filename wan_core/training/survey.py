"""A data set looked through before anything is encoded: the pieces to train on, and what is wrong with the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import FileError, InputError, WanError
from .clips import Facts, Library
from .dataset import Item
from .framing import Cut, Framing
from .inputs import INPUTS, Piece, check_inputs, value_conditions

# A mirrored clip would make these captions lie; letters and signs are the user's to know.
SIDED = re.compile(r"\b(left|right|clockwise|counter-?clockwise|anti-?clockwise)|左|右|顺时针|逆时针", re.IGNORECASE)
SHAPE_TOLERANCE = 0.03  # how far two clips' width / height may differ before it is worth a word
VACE_INPUTS = tuple(name for name, facts in INPUTS.items() if facts.condition == "vace")


def survey(
    items: Sequence[Item], framing: Framing, inputs: Sequence[str], library: Library, flip: bool = False
) -> tuple[list[Piece], list[str]]:
    """The pieces of all items, and a sentence for each item that is left out, shortened or cut.

    flip: every clip once more, mirrored, where neither its caption nor a camera's way tells left from right.
    Raises InputError for an extra input that does not exist.
    """
    check_inputs(inputs)
    pieces, notes = [], []
    for item in items:
        try:
            found, about = look_through(item, framing, inputs, library)
        except WanError as error:
            notes.append(f"{item.place} is left out: {error}")
            continue
        pieces += found
        notes += [f"{item.place} {sentence}" for sentence in about]
        if flip and not is_sided(item, inputs):
            pieces += [Piece(piece.item, piece.cut, piece.frame_rate, mirrored=True) for piece in found]
    library.save()
    unused = [name for name in inputs if name not in columns_of(items) and not INPUTS[name].condition == "image"]
    notes += [f"No item has a {name}." for name in unused if pieces and not INPUTS[name].needed]
    return pieces, notes


def columns_of(items: Sequence[Item]) -> set[str]:
    return {name for item in items for name in item.columns}


def is_sided(item: Item, inputs: Sequence[str]) -> bool:
    return bool(SIDED.search(item.prompt)) or any(INPUTS[name].condition == "camera" for name in inputs)


def look_through(
    item: Item, framing: Framing, inputs: Sequence[str], library: Library
) -> tuple[list[Piece], Iterator[str]]:
    """The pieces of one item, and what is to be said of it. Raises WanError for an item that cannot be trained on."""
    for name in missing(item, inputs):
        raise InputError(f"it has no {name}.")
    values = {name: item.columns[name] for name in inputs if INPUTS[name].form == "value" and name in item.columns}
    value_conditions(values, 1)
    most = framing.num_frames if framing.sampling == "head" else 0
    clip = library.facts(item.file, framing.frame_rate, most)
    beside = dict(files_beside(item, inputs, lambda file: library.facts(file, framing.frame_rate, most)))
    for name, facts in beside.items():
        if clip.frames > 1 and facts.frames == 1 and INPUTS[name].form == "clip":
            raise FileError(f"its {name} is a picture, but it has {clip.frames} frames. Give a clip.")
    frames = min([clip.frames, *(facts.frames for facts in beside.values() if facts.frames > 1)])
    pieces = [Piece(item, cut, framing.frame_rate) for cut in framing.cuts(clip.width, clip.height, frames)]
    if not pieces:
        raise FileError(f"it has {frames} frames, fewer than the shortest of the lengths to train on.")
    return pieces, remarks(clip, beside, frames, pieces[0].cut, framing)


def missing(item: Item, inputs: Sequence[str]) -> list[str]:
    absent = [name for name in inputs if INPUTS[name].needed and name not in item.columns]
    wanted = [name for name in inputs if name in VACE_INPUTS]
    if wanted and not any(name in item.columns for name in wanted):
        absent.append(" and no ".join(wanted))
    return absent


def files_beside(item: Item, inputs: Sequence[str], facts_of: Callable[[Path], Facts]) -> Iterator[tuple[str, Facts]]:
    """Of inputs that run along with the clip; the others are looked at too, and raise FileError if they are damaged."""
    for name in inputs:
        for file in item.columns.get(name, ()) if INPUTS[name].form != "value" else ():
            facts = facts_of(file)
            if INPUTS[name].form in ("clip", "mask"):
                yield name, facts


def remarks(clip: Facts, beside: dict[str, Facts], frames: int, taken: Cut, framing: Framing) -> Iterator[str]:
    if frames > 1 and taken.frames < framing.num_frames:
        shortest = "" if frames == clip.frames else " common to its clips"
        yield f"has {frames} frames{shortest}, fewer than {framing.num_frames}; {taken.frames} are trained on."
    for name, facts in beside.items():
        if abs(facts.width / facts.height - clip.width / clip.height) > SHAPE_TOLERANCE:
            yield (
                f"is {clip.width}x{clip.height}, but its {name} {facts.width}x{facts.height}: "
                "its edges are cut off to fit. Check that the two belong together."
            )
    if taken.width > clip.width or taken.height > clip.height:
        yield f"is {clip.width}x{clip.height} and enlarged to {taken.width}x{taken.height}."
