"""Measure the WanTiny models: `python -m comfyui_wanflow.wan_core.tiny.evaluate [TASK ...]`.

Every model makes videos for 64 samples of its task, of combinations that training never saw, and plain code reads from
the pixels how well they do what captions and conditions say. Then the options of sampling and loading are tried: what
they do to these scores. `--write docs/wantiny.md` puts both tables into that page.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..loading.download import BUNDLED
from ..loading.load import load_model
from ..loading.lora_files import load_lora
from ..model import WanVAE
from ..offload.options import Offload
from ..sampling.easycache import EasyCache
from ..sampling.teacache import TeaCache
from . import measure, world
from .distil import NAME, STUDENT
from .perform import MODELS, WEIGHTS, Studio, pixels, to_frames
from .table import Row, origin, sheet, table, write_section
from .tasks import TASKS, Sample, fact_scores, samples

MOTION = (0, 33, 67, 100)
DENOISE = (0.3, 0.6, 0.9)
GIVEN = {
    "T2V": "a caption",
    "I2V": "the first frame",
    "FLF2V": "the first and the last frame",
    "InP": "the first frame, the last one, or both",
    "Control": "outlines",
    "Control-Reference": "outlines, and a picture of the shape",
    "Control-Camera": "the first frame, a camera that turns",
    "Speed": "a motion_bucket_id",
}
KEPT = {
    "box": "all but a box around the shape",
    "later": "the first frames",
    "reference": "a picture of the shape",
    "outlines": "outlines, and a picture of the shape",
}


def family(tasks: Sequence[str], count: int, folder: Path | None) -> Iterator[Row]:
    """What the models do, task by task."""
    for name in tasks:
        studio = Studio.of(name, folder)
        yield from performed(name, studio, count)
        if name == "T2V":
            yield changed(studio, count)
            yield coded(studio.encoders.vae, count // 4)
        if name == "Speed":
            yield faster(studio, count)


def performed(name: str, studio: Studio, count: int) -> list[Row]:
    """A task's rows, one for each kind of what is given."""
    kinds = even(name, count)
    videos = iter(studio.perform(TASKS[name], [sample for some in kinds.values() for sample in some]))
    rows = []
    for kind, some in kinds.items():
        made = [next(videos) for _ in some]
        rows.append(Row(MODELS[name], kind, TASKS[name].scores(made, some), made))
    return rows


def even(name: str, count: int) -> dict[str, list[Sample]]:
    """At least `count` held-out samples of a task by what is given, as many of each kind."""
    kinds: dict[str, list[Sample]] = {}
    for sample in samples(TASKS[name], 5 * count, seed=1, held_out=True):
        kinds.setdefault(given(name, sample), []).append(sample)
    return {kind: some[: -(-count // len(kinds))] for kind, some in sorted(kinds.items())}


def given(name: str, sample: Sample) -> str:
    if name == "VACE":
        return KEPT[sample.given[0]]
    return f"{GIVEN[name]} {heading(sample.scene)}" if name == "Control-Camera" else GIVEN[name]


def heading(scene: world.Scene) -> str:
    """Where a camera turns that lets the scene drift so: the other way."""
    x, y = np.sign(np.round(scene.drift, 3)).astype(int)
    return " ".join(word for word in (("", "left", "right")[x], ("", "up", "down")[y]) if word)


def faster(studio: Studio, count: int) -> Row:
    """Whether the same caption and noise go further with each higher motion_bucket_id."""
    task = TASKS["Speed"]
    scenes = samples(task, count // len(MOTION), seed=2, held_out=True)
    made = [studio.perform(task, [replace(scene, given=float(bucket)) for scene in scenes]) for bucket in MOTION]
    ways = [[np.abs(measure.displacement(video)).max() for video in videos] for videos in made]
    scores = {"further each time": rising(ways)}
    return Row(MODELS["Speed"], f"motion_bucket_id {listed(MOTION)}", scores, [videos[0] for videos in made])


def changed(studio: Studio, count: int) -> Row:
    """Whether a video, described as another one, is left further behind with each higher denoise."""
    clips = [sample.clip for sample in samples(TASKS["I2V"], count // len(DENOISE), seed=2, held_out=True)]
    captions = [sample.captions[0] for sample in samples(TASKS["I2V"], len(clips), seed=3, held_out=True)]
    latents = torch.cat([studio.encoders.vae.encode(pixels(clip)) for clip in clips])
    made = [
        replace(studio, settings=replace(studio.settings, denoise=denoise)).videos(captions, changed=latents)
        for denoise in DENOISE
    ]
    losses = [[-measure.psnr(video, clip) for video, clip in zip(videos, clips, strict=True)] for videos in made]
    scores = {"less like the video each time": rising(losses)}
    return Row(MODELS["T2V"], f"a video, denoise {listed(DENOISE)}", scores, [videos[0] for videos in made])


def rising(levels: Sequence[Sequence[float]]) -> float:
    """The share of columns that rise from each row to the next."""
    return float(np.mean(np.all(np.diff(levels, axis=0) > 0, axis=0)))


def listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def coded(vae: WanVAE, count: int) -> Row:
    scores = {f"{frames} frames, dB": reconstruction(vae, count, frames) for frames in (9, 17)}
    return Row("the VAE", "clips to encode and decode", scores)


def reconstruction(vae: WanVAE, count: int, frames: int) -> float:
    """dB over unseen scenes, encoded and decoded: of the mean squared error of all of them."""
    scenes = [sample.scene for sample in samples(TASKS["I2V"], count, seed=4, held_out=True)]
    clips = [world.render(scene, frames) for scene in scenes]
    seen = [to_frames(vae.decode(vae.encode(pixels(clip))))[0] for clip in clips]
    return measure.psnr(np.stack(seen), np.stack(clips))


# ---------------------------------------------------------------- what options do


def options(count: int, folder: Path | None) -> Iterator[Row]:
    """What options do to the scores of text to video, and how near they stay to the run without them."""
    studio, file = Studio.of("T2V", folder), MODELS["T2V"] if folder is None else folder / "T2V" / WEIGHTS
    given = samples(TASKS["T2V"], count, seed=1, held_out=True)
    plain = studio.perform(TASKS["T2V"], given)
    yield Row("none", f"{studio.settings.steps} steps, cfg {studio.settings.cfg:g}", fact_scores(plain, given), plain)
    for cfg in (1.0, 3.0, 12.0):
        videos = replace(studio, settings=replace(studio.settings, cfg=cfg)).perform(TASKS["T2V"], given)
        yield Row("cfg", f"{cfg:g}", fact_scores(videos, given), videos)

    def like_plain(name: str, does: str, studio: Studio) -> Row:
        said = []
        videos = replace(studio, say=said.append).perform(TASKS["T2V"], given)
        error = np.mean([np.square(video - other).mean() for video, other in zip(videos, plain, strict=True)])
        scores = {"like none, dB": measure.decibel(error)} | fact_scores(videos, given)
        return Row(name, said[0] if said else does, scores, videos)

    for cache in (TeaCache(0.1), EasyCache()):
        yield like_plain(cache.name, "", replace(studio, model=studio.model.with_cache(cache)))
    tiles = {"tiled": True, "tile_size": (6, 6), "tile_stride": (3, 3)}
    yield like_plain("tiled decoding", "tiles of 6 x 6 latents, every 3", replace(studio, tiling=tiles))
    for dtype in ("fp8_e4m3fn", "int8"):
        model = load_model(file, weight_dtype=dtype)
        share = model.stored_bytes() / studio.model.stored_bytes()
        yield like_plain(dtype, f"{share:.0%} of the bytes", replace(studio, model=model))
    resting = load_model(file, offload=Offload(rest_on="disk"))
    yield like_plain("offload", "weights rest on disk", replace(studio, model=resting))
    yield from taught(studio, given, BUNDLED if folder is None else folder / "fewstep")


def taught(studio: Studio, given: Sequence[Sample], folder: Path) -> Iterator[Row]:
    """What a LoRA does at each strength: the distilled one, in its few steps."""
    lora = load_lora(folder / f"{NAME}.safetensors")
    for strength in (0.0, 0.5, 1.0):
        student = replace(studio, model=studio.model.with_lora(lora, strength), settings=STUDENT)
        videos = student.perform(TASKS["T2V"], given)
        does = f"{NAME} at {strength:g}, {STUDENT.steps} steps, cfg {STUDENT.cfg:g}"
        yield Row("LoRA", does, fact_scores(videos, given), videos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; without any: all of them, and the options")
    parser.add_argument("--out", type=Path, help="a folder that was trained into, instead of the bundled weights")
    parser.add_argument("--count", type=int, default=64, help="samples of each task")
    parser.add_argument("--write", type=Path, help="a page to put the tables into")
    parser.add_argument("--picture", type=Path, help="for the first video of each row of the tables")
    arguments = parser.parse_args()
    tables = {"family": (("model", "given", "met"), family(arguments.tasks or TASKS, arguments.count, arguments.out))}
    if not arguments.tasks:
        tables["options"] = (("option", "what it does", "met"), options(arguments.count, arguments.out))
    shown = []
    for name, (heads, measured) in tables.items():
        rows = []
        for row in measured:
            print(row, flush=True)
            rows.append(row)
            shown.extend(row.videos[:1])
        if arguments.write:
            write_section(arguments.write, name, f"{origin()}\n\n{table(heads, rows)}")
    if arguments.picture:
        Image.fromarray(sheet(shown)).save(arguments.picture)


if __name__ == "__main__":
    main()
