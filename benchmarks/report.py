"""What the suite found, as tables and charts: `python benchmarks/report.py` writes them anew from results/*.json."""

from __future__ import annotations

import json
from collections.abc import Iterator

import chart
from measure import HERE, Result, Workload

RESULTS, ROOT = HERE / "results", HERE.parent
KINDS = {"cpu": "On a processor", "gpu": "On a graphics card"}
PAGES = (ROOT / "docs" / "speed.md", ROOT / "README.md")
IN_BRIEF = ("date", "processor", "card", "torch", "diffusers", "diffsynth", "comfyui")
NAMES = {"wanflow": "WanFlow", "diffusers": "diffusers", "diffsynth": "DiffSynth-Studio", "comfyui": "ComfyUI"}

Rows = dict[str, dict]  # by row: facts and workloads, as in the files


def keep(suite: str, row: str, found: dict) -> None:
    path = RESULTS / f"{suite}.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[row] = found
    path.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    publish()


def publish() -> None:
    """The tables beside the results, the charts, and the parts of the pages that show them."""
    pages = {path: path.read_text() for path in PAGES}
    for suite, title in KINDS.items():
        path = RESULTS / f"{suite}.json"
        if not path.exists():
            continue
        rows = json.loads(path.read_text())
        (RESULTS / f"{suite}.md").write_text(f"{told(rows)}\n\n{table(rows)}")
        for measure, subject in (("time", "time"), ("peak_mb", "peak memory")):
            picture = chart.bars(f"{title}: {subject}, the fastest other library's is 1", list(groups(rows, measure)))
            (ROOT / "docs" / f"speed_{suite}_{measure}.svg").write_text(picture)
        for page in pages:
            pages[page] = put(pages[page], suite, f"{summary(rows)}\n{told(rows)}\n")
            pages[page] = put(pages[page], f"{suite} in brief", f"{brief(rows)}\n{told(rows, IN_BRIEF)}\n")
    for path, text in pages.items():
        path.write_text(text)


def put(text: str, name: str, part: str) -> str:
    """`text` with `part` between the marks of this name."""
    begin, end = f"<!-- {name}: written by benchmarks/report.py -->\n", f"<!-- end of {name} -->"
    if begin not in text:
        return text
    head, _, rest = text.partition(begin)
    return head + begin + part + end + rest.partition(end)[2]


def workloads(rows: Rows) -> Iterator[tuple[str, Workload]]:
    for row, found in rows.items():
        for kept in found["workloads"]:
            yield row, Workload(**kept | {"results": [Result(**result) for result in kept["results"]]})


def told(rows: Rows, names: tuple[str, ...] = ()) -> str:
    """The facts (of these names, or all), each once where it is the same for all rows."""
    parts = []
    for name in {name: None for found in rows.values() for name in found["facts"] if not names or name in names}:
        values: dict[str, list[str]] = {}
        for row, found in rows.items():
            values.setdefault(found["facts"].get(name, "none"), []).append(row)
        alike = len(values) == 1
        parts.append(f"{name} " + "; ".join(v if alike else f"{v} ({', '.join(of)})" for v, of in values.items()))
    return ", ".join(parts) + "."


def table(rows: Rows) -> str:
    """A line a contestant: medians, and ratios to the fastest (for memory: the smallest) other."""
    lines = [
        "| row | workload | library | CPU s | ratio | wall s | peak memory MB | ratio | relative difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, workload in workloads(rows):
        for result in workload.results:
            lines.append(
                f"| {row} | {workload.name} | {result.library} | {result.cpu_seconds:.4g} "
                f"| {number(workload.ratio(result, workload.time))} | {result.seconds:.4g} | {result.peak_mb:.0f} "
                f"| {number(workload.ratio(result, 'peak_mb'))} | {result.error:.0e} |"
            )
        if workload.floor:
            ratio = number(workload.floor / getattr(workload.best(workload.time) or workload.ours, workload.time))
            lines.append(f"| {row} | {workload.name} | *floor* | {workload.floor:.4g} | {ratio} | | | | |")
    return "\n".join(lines) + "\n"


def summary(rows: Rows) -> str:
    """A line a workload."""
    lines = [
        "| | workload | WanFlow | fastest other | ratio | wanted, hoped for | memory, ratio | floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, workload in workloads(rows):
        ours, best = getattr(workload.ours, workload.time), workload.best(workload.time)
        other = "" if best is None else f"{getattr(best, workload.time):.3g} s, {NAMES.get(best.library, best.library)}"
        found = f"{workload.found:.2f}" if not workload.unit else f"{workload.found:.0f} {workload.unit}"
        wanted = ", ".join(f"{value:g}" for value in (workload.target, workload.aim) if value is not None)
        lines.append(
            f"| {row} | {workload.name} | {ours:.3g} s | {other} | **{found}** | {wanted} "
            f"| {number(workload.ratio(workload.ours, 'peak_mb'))} "
            f"| {f'{workload.floor:.3g} s' if workload.floor else ''} |"
        )
    return "\n".join(lines) + "\n"


def brief(rows: Rows) -> str:
    """A line a workload that others do too, and only the ratios."""
    lines = ["| | time | memory | fastest other |", "|---|---|---|---|"]
    for _, workload in workloads(rows):
        if not workload.unit:
            best = workload.best(workload.time).library
            memory = number(workload.ratio(workload.ours, "peak_mb"))
            lines.append(f"| {workload.name} | **{workload.found:.2f}** | {memory} | {NAMES.get(best, best)} |")
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def groups(rows: Rows, measure: str) -> Iterator[chart.Group]:
    """What the chart shows: each contestant's share of the best other's, and the floor's."""
    for row, workload in workloads(rows):
        field = workload.time if measure == "time" else measure
        best = workload.best(field)
        if best is None or workload.unit or getattr(best, field) <= 0:
            continue
        bars = [(NAMES.get(r.library, r.library), getattr(r, field) / getattr(best, field)) for r in workload.results]
        floor = workload.floor / getattr(best, field) if workload.floor and measure == "time" else None
        yield chart.Group(f"{row}  {workload.name}", bars, floor)


if __name__ == "__main__":
    publish()
