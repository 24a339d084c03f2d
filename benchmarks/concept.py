"""Teach WanTiny a colour it never saw, and measure what it then shows: `python benchmarks/concept.py --out FOLDER`.

For each task a data set is written as a user would bring it: clips, what lies beside them (outlines, masks, pictures,
a camera's turn, a speed) and a table. Some clips show a pink shape, some the colours that WanTiny knows, so that it
keeps them. A LoRA is trained on all. Then videos of what was not in the data set are made with and without it, and
plain code reads from them, by the task's own measures, how well pink ones are done, and what became of the others.
Writes results/concept.json and .md; a task that is in FOLDER already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfyui_wanflow.example_workflows.pink import CONCEPT, FRAMES, SIZE, Facts, concept_facts
from comfyui_wanflow.wan_core.loading.lora_files import load_lora
from comfyui_wanflow.wan_core.tiny import world
from comfyui_wanflow.wan_core.tiny.perform import MODELS, Studio
from comfyui_wanflow.wan_core.tiny.table import told
from comfyui_wanflow.wan_core.tiny.tasks import TASKS, Sample, outlines
from comfyui_wanflow.wan_core.training.cache import Cache
from comfyui_wanflow.wan_core.training.dataset import list_items
from comfyui_wanflow.wan_core.training.examples import Encoders, Examples, prepare
from comfyui_wanflow.wan_core.training.framing import Framing
from comfyui_wanflow.wan_core.training.inputs import columns
from comfyui_wanflow.wan_core.training.loop import Settings, train
from comfyui_wanflow.wan_core.training.trainee import new_lora
from comfyui_wanflow.wan_core.video import save_video
from measure import HERE, git, processor
from PIL import Image

Columns = dict[str, Any]  # of a row beside its clip and caption; frames (F, H, W, 3) in 0..1 become files
TABLE = "metadata.json"


def vace_columns(sample: Sample) -> Columns:
    kind, mask, picture = sample.given
    mask = np.repeat(mask[..., None], 3, axis=-1)
    if kind == "reference":
        return {"vace_reference_image": picture}
    if kind == "outlines":
        return {"vace_video": outlines(sample.clip), "vace_reference_image": picture}
    return {"vace_video": np.where(mask > 0, np.float32(0.5), sample.clip), "vace_video_mask": mask}


@dataclass(frozen=True)
class Lesson:
    """How a task is taught: what is taken from the clip itself, what lies beside it, and which part gets the LoRA."""

    from_clip: tuple[str, ...] = ()
    beside: Callable[[Sample], Columns] = lambda sample: {}
    part: str = "dit"


LESSONS = {
    "T2V": Lesson(),
    "I2V": Lesson(("input_image",)),
    "FLF2V": Lesson(("input_image", "end_image")),
    "Control": Lesson(beside=lambda sample: {"control_video": outlines(sample.clip)}),
    "Control-Reference": Lesson(
        beside=lambda sample: {"control_video": outlines(sample.clip), "reference_image": sample.given}
    ),
    "Control-Camera": Lesson(
        ("input_image",),
        lambda sample: dict(zip(("camera_control_direction", "camera_control_speed"), sample.given, strict=True)),
    ),
    "VACE": Lesson(beside=vace_columns, part="vace"),
    "Speed": Lesson(beside=lambda sample: {"motion_bucket_id": sample.given}),
}


def drawn(name: str, facts: Sequence[Facts], count: int, seed: int) -> list[Sample]:
    task = TASKS["I2V" if name == "T2V" else name]  # whose own clips are of two lengths
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(facts))
    return [task.sample(generator, facts[order[n % len(facts)]]) for n in range(count)]


def known_facts(held_out: bool) -> list[Facts]:
    return [facts for facts in world.all_facts() if world.is_held_out(facts) == held_out]


# ---------------------------------------------------------------- the data set


def write_data(folder: Path, name: str, samples: Sequence[Sample]) -> None:
    """Clips, what lies beside them, and the table."""
    folder.mkdir(parents=True)
    rows = []
    for number, sample in enumerate(samples):
        given = {"video": sample.clip} | LESSONS[name].beside(sample)
        row = {key: written(value, folder / f"{number:03}_{key}") for key, value in given.items()}
        rows.append(row | {"prompt": sample.captions[0]})
    (folder / TABLE).write_text(json.dumps(rows, indent=1))


def written(value: Any, path: Path) -> Any:
    """What stands in the table for a value: frames are saved, and named."""
    if not isinstance(value, np.ndarray):
        return value
    file = path.with_suffix(".mp4" if len(value) > 1 else ".png")
    if len(value) > 1:
        save_video(torch.from_numpy(value), file, quality=10)
    else:
        Image.fromarray((value[0] * 255).round().astype(np.uint8)).save(file)
    return file.name


def examples_of(folder: Path, name: str, studio: Studio) -> Examples:
    """The data set, listed and encoded as for any training."""
    given = {key for row in json.loads((folder / "data" / TABLE).read_text()) for key in row} - {"video", "prompt"}
    inputs = sorted({*LESSONS[name].from_clip, *given})
    items, problems = list_items(folder / "data", folder / "data" / TABLE, ("video",), columns(inputs))
    encoders = Encoders(studio.encoders.vae, studio.text_encoder, studio.encoders.image_encoder)
    examples, notes = prepare(items, Framing(FRAMES, SIZE, SIZE), encoders, Cache(folder / "cache"), inputs)
    for sentence in (*problems, *notes):
        print(sentence, flush=True)
    return examples


# ---------------------------------------------------------------- what it teaches


def taught(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a task's LoRA, or find it trained; what the videos show without and with it."""
    folder, studio = options.out / name, Studio.of(name)
    if (folder / "results.json").exists():
        return json.loads((folder / "results.json").read_text())
    if not (folder / "data" / TABLE).exists():
        pink = drawn(name, concept_facts()[0], options.clips, 0)
        known = drawn(name, known_facts(held_out=False), options.known or options.clips, 0)
        write_data(folder / "data", name, [*pink, *known])
    examples = examples_of(folder, name, studio)
    settings = Settings(
        learning_rate=options.rate,
        lr_scheduler="cosine",
        warmup_steps=10,
        num_epochs=options.epochs,
        batch_size=options.batch,
        shift=3.0,
        save_steps=100,
    )
    begin = time.monotonic()
    trainee = new_lora(studio.model, options.rank, parts=(LESSONS[name].part,))
    losses = train(trainee, examples, settings, folder / "training", say_step)
    seconds = time.monotonic() - begin
    lora = load_lora(folder / "training" / f"epoch-{options.epochs - 1}.safetensors")
    found: dict[str, Any] = {"clips": f"{options.clips} + {options.known or options.clips}", "steps": len(losses),
                             "seconds": round(seconds), "part": LESSONS[name].part}  # fmt: skip
    for what, model in (("before", studio.model), ("after", studio.model.with_lora(lora))):
        found[what] = measured(name, replace(studio, model=model), options.count)
    (folder / "results.json").write_text(json.dumps(found, indent=1))
    return found


def measured(name: str, studio: Studio, count: int) -> dict[str, dict[str, float]]:
    """The task's scores, of pink shapes that were not in the data set, and of others that no training showed."""
    scores = {}
    for what, facts in ((CONCEPT, concept_facts()[1]), ("others", known_facts(held_out=True))):
        asked = drawn(name, facts, count, 1)
        scores[what] = TASKS[name].scores(studio.perform(TASKS[name], asked), asked)
    return scores


def say_step(done: int, total: int, loss: float) -> None:
    if done % 20 == 0 or done == total:
        print(f"step {done}/{total}  loss {loss:.4f}", flush=True)


# ---------------------------------------------------------------- the table


def markdown(facts: Mapping[str, Any], found: Mapping[str, Mapping]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()) + ".", ""]
    lines += [f"| model | LoRA on | clips | steps | measure | {CONCEPT}, before | after | others, before | after |"]
    lines += ["|---" * 9 + "|"]
    for name, row in found.items():
        shown = [row[when][what] for what in (CONCEPT, "others") for when in ("before", "after")]
        for measure in row["before"][CONCEPT]:
            cells = [told(measure, scores[measure]) if measure in scores else "" for scores in shown]
            lead = [MODELS[name], row["part"], row["clips"], f"{row['steps']} in {row['seconds']} s"]
            lines.append(f"| {' | '.join([*lead, measure.removesuffix(', dB'), *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(LESSONS)}; without any: all of them")
    parser.add_argument("--out", type=Path, required=True, help="a folder for data sets, caches and checkpoints")
    parser.add_argument("--clips", type=int, default=96, help="of the new colour")
    parser.add_argument("--known", type=int, help="of the others (as many)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--count", type=int, default=64, help="videos of each kind")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    found = {name: taught(name, options) for name in options.tasks or LESSONS}
    facts = {"date": date.today().isoformat(), "commit": git("rev-parse", "--short", "HEAD"), "processor": processor(),
             "torch": torch.__version__, "rank": options.rank,
             "videos of each kind": options.count}  # fmt: skip
    text = markdown(facts, found)
    print(text)
    (options.results / "concept.json").write_text(json.dumps({"facts": facts, "rows": found}, indent=1) + "\n")
    (options.results / "concept.md").write_text(text)


if __name__ == "__main__":
    main()
