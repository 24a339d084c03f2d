"""What leaving steps out costs: `python benchmarks/skipping.py [--out FOLDER] [--count N] [--steps N]`.

WanTiny makes the same videos of held-out captions with each cache at several thresholds. How near they stay to the
videos of the run that skips nothing (PSNR, of the mean squared error of all), and how many of the facts that the
captions tell they still show, stands against the steps that were left out. Writes results/skipping.json, .md and .svg.

A step that is left out takes next to nothing with each of them, so equal speed is an equal number of steps left out;
between measured thresholds a straight line is drawn. TeaCache's polynomials and MagCache's published curve are those of
the T2V-1.3B model, the nearest; the curve that MagCache measures, and EasyCache, are of WanTiny itself.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from comfyui_wanflow.wan_core.sampling.easycache import EasyCache
from comfyui_wanflow.wan_core.sampling.magcache import MagCache
from comfyui_wanflow.wan_core.sampling.teacache import METHODS, TeaCache
from comfyui_wanflow.wan_core.tiny.measure import decibel
from comfyui_wanflow.wan_core.tiny.perform import Studio
from comfyui_wanflow.wan_core.tiny.tasks import TASKS, Sample, fact_scores, samples
from measure import HERE, git, processor

STEPS = 30
COUNT = 24
LONGEST_ROW = 8  # steps that MagCache may skip one after the other, at its largest thresholds
COLOURS = ("#3367d6", "#34a853", "#7b61c9", "#f29900", "#d93025", "#9aa0a6")
WIDTH, HEIGHT, EDGE, TICK = 760, 420, 56, 5


@dataclass(frozen=True)
class Method:
    name: str
    cache: Callable[[float], EasyCache | MagCache | TeaCache]
    thresholds: tuple[float, ...]
    ours: bool = False  # whether it learns from the model that runs, and needs no table


TRIED = (
    Method(
        "EasyCache",
        lambda threshold: EasyCache(threshold, start=0.1),
        (0.11, 0.13, 0.15, 0.2, 0.3, 0.45, 0.7, 0.9, 1.5, 2.0, 3.0),
        ours=True,
    ),
    Method(
        "MagCache, measured",
        lambda threshold: MagCache(threshold, LONGEST_ROW, "measured"),
        (0.015, 0.02, 0.04, 0.08, 0.16, 0.4, 1.0),
        ours=True,
    ),
    Method(
        "MagCache, published",
        lambda threshold: MagCache(threshold, LONGEST_ROW),
        (0.01, 0.02, 0.04, 0.08, 0.16, 0.4, 1.0),
    ),
    *(
        Method(
            f"TeaCache, {way}",
            lambda threshold, way=way: TeaCache(threshold, way),
            (0.03, 0.06, 0.1, 0.15, 0.2, 0.4, 0.8),
        )
        for way in METHODS
    ),
)


@dataclass(frozen=True)
class Row:
    method: str
    threshold: float
    skipped: float  # steps of each video, in the mean
    decibel: float  # against the run that skips nothing
    facts: float  # the share that is shown right, of all four in the mean


def measured(studio: Studio, given: list[Sample]) -> Iterator[Row]:
    task = TASKS["T2V"]
    whole = studio.perform(task, given)
    yield Row("all steps", 0.0, 0.0, np.inf, facts(whole, given))
    for method in TRIED:
        for threshold in method.thresholds:
            heard: list[str] = []
            model = studio.model.with_cache(method.cache(threshold))
            acting = replace(studio, model=model, say=heard.append)
            videos = acting.perform(task, given)
            if any("measured this model" in sentence for sentence in heard):
                heard.clear()
                videos = acting.perform(task, given)
            counts = [int(re.search(r"skipped (\d+) of", sentence)[1]) for sentence in heard]
            error = np.mean([np.square(video - other).mean() for video, other in zip(videos, whole, strict=True)])
            yield Row(method.name, threshold, float(np.mean(counts)), decibel(error), facts(videos, given))


def facts(videos: list[np.ndarray], given: list[Sample]) -> float:
    return float(np.mean(list(fact_scores(videos, given).values())))


def at_speed(rows: list[Row], method: str, skipped: float) -> float | None:
    """The decibels of a method with so many steps left out; None beyond what was measured of it."""
    own = sorted((row.skipped, row.decibel) for row in rows if row.method == method and row.skipped)
    if not own or not own[0][0] <= skipped <= own[-1][0]:
        return None
    return float(np.interp(skipped, *zip(*own, strict=True)))


def ahead(rows: list[Row], ours: str, theirs: str) -> str:
    """By how much one method is nearer to the whole run than another, wherever both were measured."""
    pairs = [(row, at_speed(rows, ours, row.skipped)) for row in rows if row.method == theirs and row.skipped]
    gains = [level - row.decibel for row, level in pairs if level is not None]
    return f"{min(gains):+.1f} to {max(gains):+.1f} dB" if gains else ""


def markdown(facts: dict, rows: list[Row]) -> str:
    ours = [method.name for method in TRIED if method.ours]
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()) + ".", ""]
    lines += [f"| nearer with as many steps skipped | {' | '.join(ours)} |", "|---" * (len(ours) + 1) + "|"]
    for method in TRIED:
        if not method.ours:
            gains = (ahead(rows, name, method.name) for name in ours)
            lines.append(f"| than {method.name} | {' | '.join(gains)} |")
    lines += [
        "",
        "| method | threshold | steps skipped | PSNR to the whole run | facts right |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        near = f"{row.decibel:.1f} dB" if row.skipped else "equal"
        lines.append(f"| {row.method} | {row.threshold:g} | {row.skipped:.1f} | {near} | {row.facts:.0%} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], steps: int) -> str:
    """PSNR over the steps left out, a line a method, as SVG."""
    rows = [row for row in rows if row.skipped]
    levels = [row.decibel for row in rows]
    bottom, top = TICK * int(np.floor(min(levels) / TICK)), TICK * int(np.ceil(max(levels) / TICK))

    def place(skipped: float, level: float) -> str:
        x = EDGE + skipped / steps * (WIDTH - 2 * EDGE)
        return f"{x:.1f},{HEIGHT - EDGE - (level - bottom) / (top - bottom) * (HEIGHT - 2 * EDGE):.1f}"

    def text(at: str, words: str, colour: str = "#202124", anchor: str = "middle") -> str:
        x, y = at.split(",")
        return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{words}</text>'

    def line(points: list[str], colour: str, width: float) -> str:
        return f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             'font-size="13">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']  # fmt: skip
    for level in range(bottom, top + 1, TICK):
        parts.append(line([place(0, level), place(steps, level)], "#dadce0", 1))
        parts.append(text(place(-0.4, level), f"{level} dB", anchor="end"))
    for count in range(0, steps + 1, TICK):
        parts.append(text(place(count, bottom - (top - bottom) * 0.06), str(count)))
    parts.append(text(place(steps / 2, bottom - (top - bottom) * 0.13), f"steps skipped of {steps}"))
    for number, (method, colour) in enumerate(zip(TRIED, COLOURS, strict=True)):
        points = [place(row.skipped, row.decibel) for row in rows if row.method == method.name]
        parts.append(line(points, colour, 2.5))
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in (at.split(",") for at in points)]
        parts.append(text(f"{WIDTH - EDGE},{EDGE + 18 * number}", method.name, colour, "end"))
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder that was trained into, instead of the bundled weights")
    parser.add_argument("--count", type=int, default=COUNT, help="videos")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    studio = Studio.of("T2V", options.out)
    studio = replace(studio, settings=replace(studio.settings, steps=options.steps))
    rows = []
    for row in measured(studio, samples(TASKS["T2V"], options.count, seed=1, held_out=True)):
        print(row, flush=True)
        rows.append(row)
    facts = {"date": date.today().isoformat(), "commit": git("rev-parse", "--short", "HEAD"), "processor": processor(),
             "torch": torch.__version__, "videos": options.count, "steps": options.steps}  # fmt: skip
    found = {"facts": facts, "rows": [asdict(row) for row in rows[1:]]}
    (options.results / "skipping.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.results / "skipping.md").write_text(markdown(facts, rows), encoding="utf-8")
    (options.results / "skipping.svg").write_text(plot(rows, options.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
