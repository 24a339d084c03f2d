"""Groups of bars as an SVG picture."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, TOP, BAR, GAP, TITLE = 860, 190, 70, 64, 13, 14, 18
COLOURS = {"WanFlow": "#1a73e8", "diffusers": "#f9ab00", "DiffSynth-Studio": "#7b61c9", "ComfyUI": "#34a853"}
OTHER, INK, FAINT, GRID, FLOOR = "#9aa0a6", "#202124", "#5f6368", "#dadce0", "#d93025"
LONGEST = 2.5  # longer bars are cut, and tell so


@dataclass(frozen=True)
class Group:
    name: str
    bars: list[tuple[str, float]]  # whose, and how long
    mark: float | None = None  # a length to compare with

    @property
    def height(self) -> int:
        return TITLE + BAR * len(self.bars) + GAP


def bars(title: str, groups: list[Group]) -> str:
    height = TOP + sum(group.height for group in groups) + 10
    scale = (WIDTH - LEFT - RIGHT) / LONGEST
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        text(16, 24, title, INK, 'font-size="15"'),
        text(LEFT + scale, TOP - 10, "1", FAINT, 'text-anchor="middle"'),
    ]
    if any(group.mark is not None for group in groups):
        parts += [line(WIDTH - 250, 36, 48, FLOOR, 2), text(WIDTH - 242, 46, "what the arithmetic alone takes", FAINT)]
    y = TOP
    for group in groups:
        parts.append(text(16, y + 12, group.name, INK, 'font-weight="bold"'))
        y += TITLE
        bottom = y + BAR * len(group.bars)
        parts.append(line(LEFT + scale, y, bottom, GRID, 1))
        for number, (name, length) in enumerate(group.bars):
            parts += bar(name, length, y + BAR * number, scale)
        if group.mark is not None:
            parts.append(line(LEFT + scale * min(group.mark, LONGEST), y, bottom, FLOOR, 2))
        y = bottom + GAP
    return "\n".join([*parts, "</svg>"]) + "\n"


def bar(name: str, length: float, y: int, scale: float) -> list[str]:
    width = scale * min(length, LONGEST)
    colour = COLOURS.get(name.split(",")[0].split(" ")[0], OTHER)
    return [
        text(LEFT - 8, y + BAR - 3, name, INK, 'text-anchor="end"'),
        f'<rect x="{LEFT}" y="{y + 1}" width="{width:.1f}" height="{BAR - 2}" fill="{colour}"/>',
        text(LEFT + width + 5, y + BAR - 3, f"{length:.2f}" + (" →" if length > LONGEST else ""), INK),
    ]


def text(x: float, y: float, words: str, colour: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" {more}>{escape(words)}</text>'


def line(x: float, top: float, bottom: float, colour: str, width: int) -> str:
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{colour}" stroke-width="{width}"/>'
