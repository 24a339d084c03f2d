"""A forecast as a page of text, with a bar chart in plain characters."""

from __future__ import annotations

from .forecast import Forecast, Outlook
from .machines import GIB

ROUGH = "Times are rough: computing at usual rates, without reading the files for the first time."
WIDTH = 40  # characters of a full bar
OTHERS, STAYS, PASSES, WORK, KEPT = "o#=+-"
NAMES = {OTHERS: "driver, program", STAYS: "weights that stay", PASSES: "weights in passing", WORK: "working memory",
         KEPT: "results"}  # fmt: skip


def page(forecast: Forecast, title: str) -> str:
    parts = [headline(forecast, title), "", *table(forecast), "", *filter(None, map(sentence, forecast.outlooks))]
    parts += ["", *files(forecast), ROUGH]
    return "\n".join(parts).replace("\n\n\n", "\n\n")


def headline(forecast: Forecast, title: str) -> str:
    machine = forecast.machine
    card = "" if machine.vram is None else f" ({size(machine.vram)})"
    where = f"{title} on {machine.name}{card} with {size(machine.ram)} of main memory"
    if forecast.fits:
        return f"{where}: it fits. About {duration(forecast.seconds)} in all."
    return f"{where}: IT DOES NOT FIT. {advice(forecast)}"


def advice(forecast: Forecast) -> str:
    """What is missing, and what would help."""
    worst = next(outlook for outlook in forecast.outlooks if not outlook.fits)
    if worst.vram > (worst.machine.vram or 0):
        lack, where = worst.vram - worst.machine.vram, "on the card"
        help = "Take a smaller or shorter video, or Wan Sliding Window."
    else:
        lack, where = worst.ram - worst.machine.ram, "of main memory"
        help = "Take a smaller or shorter video."
    return f"{worst.phase.name.capitalize()} lacks {size(lack)} {where}. {help}"


def table(forecast: Forecast) -> list[str]:
    """A line a phase: a bar of the card's memory (of main memory where there is no card), and numbers."""
    on_card = forecast.machine.vram is not None
    whole = forecast.machine.vram if on_card else forecast.machine.ram
    head = " ".join(f"{text:>8}" for text in ("card", "memory", "files", "time"))
    lines = [f"{'':16} {'card' if on_card else 'memory':{WIDTH + 2}} {head}"]
    for outlook in forecast.outlooks:
        card = size(outlook.vram) if on_card else "-"
        numbers = (card, size(outlook.ram), size(outlook.mapped), duration(outlook.seconds))
        lines.append(f"{outlook.phase.name:16} |{bar(outlook, whole)}| {' '.join(f'{text:>8}' for text in numbers)}")
    return [*lines, f"{'':16} {legend(forecast)}"]


def legend(forecast: Forecast) -> str:
    return "  ".join(f"{kind} {NAMES[kind]}" for kind, _ in shares(forecast.outlooks[0]))


def shares(outlook: Outlook) -> list[tuple[str, int]]:
    """What fills the memory that the bars show, from the left: (kind, bytes)."""
    if outlook.machine.vram is None:
        weights = min(outlook.mapped, max(0, outlook.machine.ram - outlook.ram))
        return [
            (OTHERS, outlook.machine.base), (STAYS, weights), (KEPT, outlook.phase.kept), (WORK, outlook.room),
        ]  # fmt: skip
    return [
        (OTHERS, outlook.machine.taken), (STAYS, outlook.resident), (PASSES, outlook.passing),
        (WORK, outlook.room),
    ]  # fmt: skip


def bar(outlook: Outlook, whole: int) -> str:
    """WIDTH characters; what would not fit is cut off, and shown by a ! at the end."""
    drawn, total = "", 0
    for kind, count in shares(outlook):
        total += count
        drawn += kind * (round(WIDTH * total / whole) - len(drawn))
    return drawn[: WIDTH - 1] + "!" if total > whole else f"{drawn:{WIDTH}}"


def sentence(outlook: Outlook) -> str:
    """What of the weights travels, and whether that costs time; "" for phases of which there is nothing to say."""
    phase, found = outlook.phase, []
    if phase.detail:
        found.append(f"{phase.detail}.")
    if outlook.streamed:
        stay, count = outlook.blocks
        found.append(
            f"{stay} of {count} blocks stay on the card, {size(outlook.streamed)} travel in each of {phase.passes} "
            f"passes: {duration(outlook.transfer_seconds)} of transfer against {duration(outlook.compute_seconds)} of "
            f"computing, {outlook.hidden:.0%} hidden behind it."
        )
    if outlook.reread:
        found.append(
            f"At least {size(outlook.reread)} of the files do not stay in main memory and are read from the disk in "
            "each pass: take a file in bf16 or fp8, or more memory."
        )
    return f"{phase.name}: {' '.join(found)}" if found else ""


def files(forecast: Forecast) -> list[str]:
    lines = [f"On the disk: {size(forecast.disk)}."] if forecast.files else []
    for file in forecast.files:
        missing = "  not on this machine: planned from the catalogue" if file.missing else ""
        lines.append(f"  {size(file.bytes):>8}  {file.name}{missing}")
    return lines


def size(count: int) -> str:
    if count < GIB / 10:
        return f"{count / 2**20:.0f} MB"
    return f"{count / GIB:.1f} GB" if count % GIB else f"{count // GIB} GB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
