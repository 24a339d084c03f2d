"""Distil WanTiny-T2V into a LoRA for a few steps without guidance:
`python -m comfyui_wanflow.wan_core.tiny.distil --out DIR`.

The teacher is the model with its usual steps and guidance. Where it is on its ways from noise to the videos of training
captions is noted at the student's few levels, and the student learns to go from each of these places to the next in a
straight line (`training.flow.line`). The loop is the project's own (training/loop.py). At the end it tells how well the
student does what captions say, beside the teacher and the model in as few steps. Started again, it goes on where it
stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..loading.lora_files import load_lora, save_lora
from ..model import WanModel, WanTextEncoder
from ..sampling.loop import Settings, draw_noise, sample
from ..sampling.presets import FEW_STEPS
from ..size import latent_shape
from ..training.examples import Example
from ..training.flow import line
from ..training.loop import Settings as TrainingSettings
from ..training.loop import train
from ..training.trainee import new_lora
from .perform import SETTINGS, Studio
from .table import Row
from .tasks import FRAMES, SIDE, TASKS, fact_scores, samples

NAME = "WanTiny-T2V-4steps"
TEACHER = SETTINGS
STUDENT = replace(TEACHER, **{**asdict(FEW_STEPS[NAME]), "timesteps": ()})
LENGTHS = FRAMES, 9
ROWS = 32
RANK = 16


class Ways:
    """A teacher's ways to videos, piece by piece, as examples to learn from.

    places: of each video, (levels, 16, T, h, w) normalised, where the teacher was at the `sigmas`, (levels,).
    """

    def __init__(self, places: Sequence[Tensor], sigmas: Tensor, captions: Sequence[str], text_encoder: WanTextEncoder):
        self.places, self.sigmas, self.captions, self.text_encoder = places, sigmas, captions, text_encoder
        self.pieces = [(video, piece) for video in range(len(places)) for piece in range(len(sigmas) - 1)]
        self.groups = [places[video].shape for video, _ in self.pieces]
        self.facts = [sigmas.tolist(), [way.double().sum().item() for way in places]]

    def batch(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Example:
        chosen = [self.pieces[index] for index in indices]
        x, y = (torch.stack([self.places[video][piece + on] for video, piece in chosen]) for on in (0, 1))
        sigmas, lower = (self.sigmas[[piece + on for _, piece in chosen]] for on in (0, 1))
        clean, noise = line(x, sigmas.view(-1, 1, 1, 1, 1), y, lower.view(-1, 1, 1, 1, 1))
        text = read(self.text_encoder, [self.captions[video] for video, _ in chosen])
        return Example(clean, text, noise=noise, sigmas=sigmas)


@torch.no_grad()
def read(text_encoder: WanTextEncoder, captions: Sequence[str]) -> Tensor:
    """(n, L, text width), zero after each caption's end."""
    tokens = text_encoder.tokenizer(list(captions))
    return text_encoder.module(tokens.ids, tokens.mask)


def walk(teacher: WanModel, positive: Tensor, negative: Tensor, frames: int, settings: Settings) -> Tensor:
    """Where the teacher is before and after each of Euler's steps, (b, steps + 1, 16, T, h, w) normalised."""
    shape, sigmas = latent_shape(SIDE, SIDE, frames, len(positive)), settings.levels()
    places = [draw_noise(shape, 0, settings)]

    def follow(step: int, steps: int, clean: Tensor) -> None:
        places.append(clean + (places[-1] - clean) * (sigmas[step + 1] / sigmas[step]))

    sample(teacher, positive, negative, torch.zeros(shape), settings, on_step=follow)
    return torch.stack(places, dim=1)


def ways(teacher: WanModel, text_encoder: WanTextEncoder, count: int, file: Path) -> Ways:
    """`count` ways to videos of training captions in all wordings; the places are kept in `file`."""
    generator = np.random.default_rng(7)
    wordings = [one.captions for one in samples(TASKS["T2V"], count, seed=7, held_out=False)]
    captions = [some[generator.integers(len(some))] for some in wordings]
    if not file.exists():
        negative, places = read(text_encoder, [""]), []
        for number, start in enumerate(range(0, count, ROWS)):
            positive, frames = read(text_encoder, captions[start : start + ROWS]), LENGTHS[number % len(LENGTHS)]
            walked = walk(teacher, positive, negative, frames, replace(TEACHER, seed=number))
            places += walked[:, :: TEACHER.steps // STUDENT.steps].clone().unbind()
            print(f"{len(places)} of {count} ways are walked", flush=True)
        torch.save(places, file)
    return Ways(torch.load(file, weights_only=True), torch.tensor(STUDENT.levels()), captions, text_encoder)


def distil(
    model: WanModel,
    examples: Ways,
    folder: Path,
    steps: int,
    rank: int = RANK,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Path:
    """Train the LoRA; its file, in fp16."""
    settings = TrainingSettings(
        learning_rate=2e-3,
        lr_scheduler="cosine",
        warmup_steps=steps // 12,
        ema_decay=0.99,
        batch_size=ROWS,
        repeat=1 + steps * ROWS // len(examples.pieces),  # one epoch is more than enough
        max_train_steps=steps,
        save_steps=100,
        gradient_checkpointing=False,
    )
    train(new_lora(model, rank), examples, settings, folder, on_step)
    lora = load_lora(folder / f"step-{steps}.safetensors")
    file = folder / f"{NAME}.safetensors"
    save_lora(replace(lora, name=NAME, changes={name: change.half() for name, change in lora.changes.items()}), file)
    return file


def compared(studio: Studio, file: Path, count: int) -> list[Row]:
    """What held-out captions become: by the teacher, by the same model in the student's steps, and by the student."""
    given = samples(TASKS["T2V"], count, seed=1, held_out=True)
    short = replace(studio, settings=STUDENT)
    student = replace(short, model=studio.model.with_lora(load_lora(file)))
    rows = []
    for name, actor in (("none", studio), ("none", short), (NAME, student)):
        videos = actor.perform(TASKS["T2V"], given)
        steps = f"{actor.settings.steps} steps, cfg {actor.settings.cfg:g}"
        rows.append(Row(name, steps, fact_scores(videos, given), videos))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="a folder that was trained into, instead of the bundled weights")
    parser.add_argument("--ways", type=int, default=640, help="videos of the teacher to learn from")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--count", type=int, default=64, help="captions to compare with")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    studio = Studio.of("T2V", arguments.weights)
    examples = ways(studio.model, studio.text_encoder, arguments.ways, arguments.out / "ways.pt")

    def tell(done: int, total: int, loss: float) -> None:
        if done % 20 == 0:
            print(f"step {done} of {total}  loss {loss:.4f}", flush=True)

    file = distil(studio.model, examples, arguments.out, arguments.steps, on_step=tell)
    print(*compared(studio, file, arguments.count), sep="\n")


if __name__ == "__main__":
    main()
