"""Teach WanTiny a colour it never saw, and measure what it then shows: `python benchmarks/concept.py --out FOLDER`.

Draws a folder of clips with captions, as a user would bring them: a few of a pink shape, as many of the colours that
WanTiny knows, so that it keeps them. A LoRA is trained on it. Videos of captions that were not in the folder are made
with and without the LoRA and read by plain code: how many show a pink shape where one is asked for, and what became of
everything else.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from comfyui_wanflow.example_workflows import pink
from comfyui_wanflow.example_workflows.pink import CONCEPT, FRAMES, RGB, SIZE, concept_facts
from comfyui_wanflow.wan_core.loading.lora_files import load_lora
from comfyui_wanflow.wan_core.tiny import measure, world
from comfyui_wanflow.wan_core.tiny.perform import Studio
from comfyui_wanflow.wan_core.tiny.tasks import TASKS, Sample, fact_scores, samples, wordings
from comfyui_wanflow.wan_core.training.cache import Cache
from comfyui_wanflow.wan_core.training.dataset import list_items
from comfyui_wanflow.wan_core.training.examples import Encoders, prepare
from comfyui_wanflow.wan_core.training.framing import Framing
from comfyui_wanflow.wan_core.training.loop import Settings, train
from comfyui_wanflow.wan_core.training.trainee import new_lora
from comfyui_wanflow.wan_core.video import save_video


def write_clips(folder: Path, count: int) -> None:
    """The clips as a user brings them, each with its caption beside it."""
    folder.mkdir(parents=True)
    for name, frames, caption in pink.clips(count):
        save_video(torch.from_numpy(frames), folder / name, quality=10)
        (folder / name).with_suffix(".txt").write_text(caption)


def shown_color(video: np.ndarray) -> str:
    """The colour of the shape, among all colours and the new one."""
    palette = {**world.COLORS, CONCEPT: RGB}
    mask = measure.shape_mask(video)
    inner = mask & np.roll(mask, 1, 1) & np.roll(mask, -1, 1) & np.roll(mask, 1, 2) & np.roll(mask, -1, 2)
    chosen = inner if inner.any() else mask
    if not chosen.any():
        return "none"
    color = np.median(video[chosen], axis=0) * 255
    return min(palette, key=lambda name: np.square(color - palette[name]).sum())


def measured(studio: Studio, count: int) -> dict[str, float]:
    """Shares of `count` captions of each kind that were shown right."""
    generator = np.random.default_rng(1)
    unseen = concept_facts()[1]
    scenes = [world.random_scene(generator, unseen[index]) for index in generator.permutation(len(unseen))[:count]]
    asked = [Sample(scene, wordings(scene), pink.render(scene)) for scene in scenes]
    videos = studio.perform(TASKS["T2V"], asked)
    found = {CONCEPT: float(np.mean([shown_color(video) == CONCEPT for video in videos]))}
    found |= {f"{CONCEPT}: {name}": share for name, share in fact_scores(videos, asked, skip=("color",)).items()}
    known = samples(TASKS["I2V"], count, seed=1, held_out=True)
    others = fact_scores(studio.perform(TASKS["T2V"], known), known)
    return found | {f"others: {name}": share for name, share in others.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for clips, checkpoints and results.json")
    parser.add_argument("--clips", type=int, default=24, help="of the new colour, and as many others")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--count", type=int, default=32, help="captions of each kind to make videos of")
    options = parser.parse_args()

    studio = Studio.of("T2V")
    if not (options.out / "clips").exists():
        write_clips(options.out / "clips", options.clips)
    items, _ = list_items(options.out / "clips")
    framing, encoders = Framing(FRAMES, SIZE, SIZE), Encoders(studio.encoders.vae, studio.text_encoder)
    examples, _ = prepare(items, framing, encoders, Cache(options.out / "cache"))
    settings = Settings(
        learning_rate=options.rate, num_epochs=options.epochs, batch_size=options.batch, shift=3.0, warmup_steps=10
    )
    begin = time.monotonic()
    losses = train(new_lora(studio.model, options.rank), examples, settings, options.out / "training", say_step)
    seconds = time.monotonic() - begin
    lora = load_lora(options.out / "training" / f"epoch-{options.epochs - 1}.safetensors")
    before = measured(studio, options.count)
    after = measured(replace(studio, model=studio.model.with_lora(lora)), options.count)
    results = {"steps": len(losses), "seconds": round(seconds, 1), "before": before, "after": after}
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"{len(losses)} steps, {seconds:.0f} s")
    for name in before:
        print(f"{name:20} {before[name]:7.1%} -> {after[name]:.1%}")


def say_step(done: int, total: int, loss: float) -> None:
    if done % 20 == 0 or done == total:
        print(f"step {done}/{total}  loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
