"""What becomes of a long video: `python benchmarks/long.py [--count N] [--frames N]`.

WanTiny, which was trained on 9 and 17 frames, makes videos several times as long, of shapes that stay where they are,
at once and in sliding windows of each kind. Plain code reads from each part of them whether it shows what the caption
says, and how far the video strays from its own beginning (tiny/drift.py). Writes results/long.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.sampling.windows import Windows
from comfyui_wanflow.wan_core.tiny import measure
from comfyui_wanflow.wan_core.tiny.drift import SPAN, drift, parts
from comfyui_wanflow.wan_core.tiny.perform import Studio
from comfyui_wanflow.wan_core.tiny.tasks import TASKS, Sample, samples
from measure import HERE, git, processor

SIZE, STRIDE = 5, 2  # latent frames: a window of the length that WanTiny was trained on
SLOWED = 4  # the frequency of positions that turns round once in 23 latent frames
SHOWN = ("color", "shape", "background")

WAYS: dict[str, Callable[[WanModel], WanModel]] = {
    "all frames at once": lambda model: model,
    "all frames at once, RIFLEx": lambda model: model.with_riflex(SLOWED),
    "windows, DiffSynth": lambda model: model.with_windows(Windows(SIZE, STRIDE)),
    "windows, standard_uniform": lambda model: model.with_windows(Windows(SIZE, STRIDE, "standard_uniform")),
    "windows, standard_uniform, pyramid": lambda model: model.with_windows(
        Windows(SIZE, STRIDE, "standard_uniform", "pyramid")
    ),
    "windows, standard_uniform, FreeNoise": lambda model: model.with_windows(
        Windows(SIZE, STRIDE, "standard_uniform", freenoise=True)
    ),
}


def still(count: int) -> list[Sample]:
    """Held-out samples of which a part shows the same as the whole."""
    scenes = [replace(sample.scene, travel=0.0) for sample in samples(TASKS["I2V"], count, seed=5, held_out=True)]
    return [Sample(scene, (scene.caption,), np.empty(0)) for scene in scenes]


def shown(video: np.ndarray, sample: Sample) -> float:
    """The share of facts that the parts of a video show right."""
    readings = [measure.read(part) for part in parts(video, SPAN) if len(part) == SPAN]
    right = [getattr(reading, name) == getattr(sample.scene, name) for reading in readings for name in SHOWN]
    return float(np.mean(right))


def measured(studio: Studio, given: list[Sample], frames: int) -> dict[str, float]:
    videos = studio.videos([sample.captions[0] for sample in given], frames=frames)
    strays = [asdict(drift(video)) for video in videos]
    facts = np.mean([shown(video, sample) for video, sample in zip(videos, given, strict=True)])
    return {"facts": float(facts)} | {name: float(np.mean([one[name] for one in strays])) for name in strays[0]}


def markdown(facts: dict, rows: dict[str, dict[str, float]]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()) + ".", ""]
    lines += ["| way | facts right in each part | colour strays | background strays | size strays | largest jump |"]
    lines += ["|---" * 6 + "|"]
    for name, row in rows.items():
        cells = [f"{row['facts']:.0%}", *(f"{row[key]:.3f}" for key in ("color", "background", "size", "jump"))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=16, help="videos of each way")
    parser.add_argument("--frames", type=int, default=97)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    studio, given, rows = Studio.of("T2V"), still(options.count), {}
    for name, changed in WAYS.items():
        rows[name] = measured(replace(studio, model=changed(studio.model)), given, options.frames)
        print(name, rows[name], flush=True)
    facts = {"date": date.today().isoformat(), "commit": git("rev-parse", "--short", "HEAD"), "processor": processor(),
             "torch": torch.__version__, "videos": options.count, "frames": options.frames,
             "window": f"{SIZE} latent frames, every {STRIDE}"}  # fmt: skip
    (options.results / "long.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    (options.results / "long.md").write_text(markdown(facts, rows))


if __name__ == "__main__":
    main()
