"""A forecast as a picture: a bar a phase of the card's memory, one of main memory, and how long it takes."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from .forecast import Forecast, Outlook
from .machines import GIB
from .report import KEPT, NAMES, OTHERS, PASSES, STAYS, WORK, duration, headline, shares, size

COLOURS = {OTHERS: "#9aa0a6", STAYS: "#3367d6", PASSES: "#f29900", WORK: "#34a853", KEPT: "#7b61c9"}
INK, PAPER, GRID, ALARM = "#202124", "#ffffff", "#dadce0", "#d93025"
WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 960, 150, 190, 76, 46, 26


def draw(forecast: Forecast, title: str = "Wan Plan") -> Image.Image:
    height = TOP + ROW * len(forecast.outlooks) + 70
    image = Image.new("RGB", (WIDTH, height), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    text = headline(forecast, title)
    while pen.textlength(text, font) > WIDTH - 40:
        text = text.rpartition(" ")[0]
    pen.text((20, 16), text, INK if forecast.fits else ALARM, font)
    scale = scale_of(forecast)
    grid(pen, forecast, scale, height, font)
    for number, outlook in enumerate(forecast.outlooks):
        row(pen, outlook, TOP + ROW * number, scale, font)
    legend(pen, forecast, height - 32, font)
    return image


def whole_of(forecast: Forecast) -> int:
    """What the bars are parts of: the card's memory, main memory where there is none."""
    return forecast.machine.ram if forecast.machine.vram is None else forecast.machine.vram


def scale_of(forecast: Forecast) -> float:
    """Pixels a byte: the machine fills the width, unless more is asked of it."""
    most = max(sum(count for _, count in shares(outlook)) for outlook in forecast.outlooks)
    return (WIDTH - LEFT - RIGHT) / max(whole_of(forecast), most)


def grid(pen: ImageDraw.ImageDraw, forecast: Forecast, scale: float, height: int, font) -> None:
    whole, bottom = whole_of(forecast), height - 46
    step = max(1, round(whole / GIB / 8)) * GIB
    for mark in range(0, int((WIDTH - LEFT - RIGHT) / scale) + 1, step):
        x = LEFT + mark * scale
        pen.line((x, TOP - 8, x, bottom), GRID)
        pen.text((x, TOP - 26), f"{mark // GIB}", INK, font, anchor="ma")
    x = LEFT + whole * scale
    pen.line((x, TOP - 8, x, bottom), ALARM, 2)
    pen.text((20, TOP - 26), "GB of " + ("memory" if forecast.machine.vram is None else "the card"), INK, font)


def row(pen: ImageDraw.ImageDraw, outlook: Outlook, y: int, scale: float, font) -> None:
    pen.text((20, y + BAR / 2), outlook.phase.name, INK, font, anchor="lm")
    x = float(LEFT)
    for kind, count in shares(outlook):
        if count * scale >= 1:
            pen.rectangle((x, y, x + count * scale - 1, y + BAR), COLOURS[kind])
        x += count * scale
    peak = outlook.ram if outlook.machine.vram is None else outlook.vram
    note = f"{size(peak)}, {duration(outlook.seconds)}"
    pen.text((WIDTH - RIGHT + 16, y + BAR / 2), note, INK if outlook.fits else ALARM, font, anchor="lm")


def legend(pen: ImageDraw.ImageDraw, forecast: Forecast, y: int, font) -> None:
    x = 20.0
    for kind in dict.fromkeys(kind for kind, _ in shares(forecast.outlooks[0])):
        pen.rectangle((x, y, x + 14, y + 14), COLOURS[kind])
        pen.text((x + 20, y + 7), NAMES[kind], INK, font, anchor="lm")
        x += 40 + pen.textlength(NAMES[kind], font)
