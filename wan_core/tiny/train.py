"""Train a WanTiny diffusion model for its task: `python -m comfyui_wanflow.wan_core.tiny.train T2V --out DIR`, after
train_vae, train_text and train_image into the same folder.

T2V learns from nothing; every other model begins with its weights, as the published ones did, and learns the layers
that are new to it and the self-attention. The loop is the project's own (training/loop.py), the conditions are those
of inference. Weights are fp32 while they learn. Started again, a training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters.injection import Condition
from ..loading.load import add_module, load_image_encoder, load_model, load_text_encoder, load_vae
from ..model import WanModel, WanTextEncoder
from ..models.dit import DiT
from ..models.embedders import MotionController
from ..models.layout import DiTLayout
from ..models.vace import VACE, VACELayout
from ..models.vae import normalised
from ..training.examples import Example
from ..training.loop import Settings
from ..training.loop import train as run_loop
from ..training.trainee import Trainee, whole
from .perform import IMAGE, TEXT, VAE, WEIGHTS, pixels
from .tasks import TASKS, Encoders, Task, samples, shapes, stacked

LAYOUT = DiTLayout(dim=256, ffn_dim=512, layers=4, heads=2)
VACE_LAYERS = 2
DROPPED_CAPTIONS = 0.1  # what classifier-free guidance compares with
LOOKS = {"image_tokens": True, "image_features": 80}
OWN_LAYERS = ("patch_embedding.*", "*.self_attn.*", "*.modulation", "*_img.*", "*norm_k_img*", "img_emb.*", "head.*")


@dataclass(frozen=True)
class Recipe:
    """How a model differs from the one it begins with, what it learns from which tasks, and for how long."""

    tasks: tuple[str, ...]
    layout: Mapping[str, object] = field(default_factory=dict)
    begins: str = "T2V"
    parts: tuple[str, ...] = ("dit",)
    learns: tuple[str, ...] = OWN_LAYERS
    clips: int = 1500
    steps: int = 1500
    rate: float = 1e-3


RECIPES = {
    "T2V": Recipe(("T2V",), learns=("*",), clips=6000, steps=6500, rate=2e-3),
    "InP": Recipe(  # models of both kinds have the same layout
        ("I2V", "InP"), {"in_dim": 36, **LOOKS}, clips=1250, steps=2200
    ),
    "FLF2V": Recipe(("FLF2V",), {"in_dim": 36, "image_positions": 514, **LOOKS}, begins="InP", clips=1200, steps=600),
    "Control-Reference": Recipe(
        ("Control", "Control-Reference"),
        {"in_dim": 48, "reference": True, **LOOKS},
        learns=(*OWN_LAYERS, "ref_conv.*"),
        clips=1600,
    ),
    "Control-Camera": Recipe(
        ("Control-Camera",),
        {"in_dim": 32, "camera_channels": 24, **LOOKS},
        learns=(*OWN_LAYERS, "control_adapter.*"),
        clips=2500,
    ),
    "VACE": Recipe(("VACE",), parts=("vace",), learns=("*",), clips=3100, steps=3200),
    "Speed": Recipe(("Speed",), parts=("motion_controller",), learns=("*",), clips=1500, steps=1000),
}


class Examples(Sequence):
    """Samples of some tasks, encoded once and kept in `folder`. Training asks for them in batches of one kind."""

    def __init__(
        self, tasks: Sequence[str], count: int, encoders: Encoders, text_encoder: WanTextEncoder, folder: Path
    ):
        self.facts = [*tasks, count]
        self.text_encoder = text_encoder
        self.rows: list[Row] = []
        for name in tasks:
            file = folder / f"examples-{name}.pt"
            if not file.exists():
                torch.save(encoded(TASKS[name], count, encoders), file)
            self.rows += torch.load(file, weights_only=False)  # our own file: conditions are objects

    @property
    def groups(self) -> list[tuple]:
        """Those with equal ones can lie side by side."""
        return [(row.latents.shape, *(shapes(condition) for condition in row.conditions)) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @torch.no_grad()
    def batch(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Example:
        rows = [self.rows[index] for index in indices]
        texts = [wording(row.captions, generator) for row, generator in zip(rows, generators, strict=True)]
        tokens = self.text_encoder.tokenizer(texts)
        text = self.text_encoder.module(tokens.ids, tokens.mask)
        columns = zip(*(row.conditions for row in rows), strict=True)
        return Example(torch.cat([row.latents for row in rows]), text, tuple(stacked(column) for column in columns))


@dataclass(frozen=True, eq=False)
class Row:
    latents: Tensor  # (1, 16, T, 8, 8) normalised
    captions: tuple[str, ...]
    conditions: tuple[Condition, ...]


def encoded(task: Task, count: int, encoders: Encoders) -> list[Row]:
    rows = []
    for sample in samples(task, count, seed=7, held_out=False):
        latents = normalised(encoders.vae.encode(pixels(sample.clip)))
        rows.append(Row(latents, sample.captions, task.conditions(sample, encoders)))
        if len(rows) % 500 == 0:
            print(f"{task.name}: {len(rows)} of {count} clips are encoded", flush=True)
    return rows


def wording(captions: Sequence[str], generator: torch.Generator) -> str:
    """Half of the time the plain caption, otherwise any, sometimes none at all."""
    kept, plain, which = torch.rand(3, generator=generator).tolist()
    if kept < DROPPED_CAPTIONS:
        return ""
    return captions[0] if plain < 0.5 else captions[int(which * len(captions))]


# ---------------------------------------------------------------- where a model begins


def first_weights(name: str, out: Path) -> dict[str, Tensor]:
    """The weights that a model's training begins with, under the published names."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    trunk = DiT(replace(LAYOUT, **recipe.layout)).state_dict()
    if name == "T2V":
        return trunk
    known = {name: weight.float() for name, weight in load_file(out / recipe.begins / WEIGHTS).items()}
    if "motion_controller" in recipe.parts:
        controller = MotionController(LAYOUT.frequency_dim, LAYOUT.dim)
        silence(controller.linear[-1])
        return controller.state_dict()
    if "vace" in recipe.parts:
        return known | new_vace(known)
    weights = {name: grown(weight, known.get(name)) for name, weight in trunk.items()}
    for name in weights.keys() - known.keys():  # what is new begins without a say
        if name.endswith("v_img.weight") or name.startswith("control_adapter.conv."):
            weights[name] = torch.zeros_like(weights[name])
    return weights


def grown(fresh: Tensor, known: Tensor | None) -> Tensor:
    """T2V's weight where there is one; further input channels begin at zero."""
    if known is None or known.shape == fresh.shape:
        return fresh if known is None else known
    return F.pad(known, (0, 0) * (known.ndim - 2) + (0, fresh.shape[1] - known.shape[1]))


def new_vace(trunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VACE begins as copies of the trunk's blocks that say nothing yet, as its authors began."""
    layout = VACELayout(dim=LAYOUT.dim, ffn_dim=LAYOUT.ffn_dim, layers=VACE_LAYERS, heads=LAYOUT.heads)
    vace = VACE(layout)
    for block in vace.vace_blocks:
        silence(block.after_proj)
    silence(vace.vace_blocks[0].before_proj)
    weights = vace.state_dict()
    for number, place in enumerate(vace.places(LAYOUT.layers)):
        own = f"vace_blocks.{number}."
        weights |= {name: trunk[name.replace(own, f"blocks.{place}.")] for name in weights
                    if name.startswith(own) and "_proj" not in name}  # fmt: skip
    return weights


def silence(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def begin(name: str, out: Path) -> WanModel:
    """The model as it is before it has learned anything new."""
    start = out / name / "start.safetensors"
    start.parent.mkdir(parents=True, exist_ok=True)
    if not start.exists():
        save_file({name: weight.half().contiguous() for name, weight in first_weights(name, out).items()}, start)
    return load_model(start) if name != "Speed" else add_module(load_model(out / "T2V" / WEIGHTS), start)


def learner(name: str, out: Path) -> Trainee:
    """The part of the model that learns."""
    trainee = whole(begin(name, out), RECIPES[name].parts)
    chosen = {
        key: parameter
        for key, parameter in trainee.parameters.items()
        if any(fnmatchcase(key, pattern) for pattern in RECIPES[name].learns)
    }
    for key, parameter in trainee.parameters.items():
        parameter.requires_grad_(key in chosen)
    return replace(trainee, parameters=chosen)


# ---------------------------------------------------------------- training


def train(
    name: str, out: Path, recipe: Recipe, batch_size: int = 32, on_step: Callable[[int, int, float], None] | None = None
) -> Path:
    """Train one of RECIPES; the file of its weights."""
    text_encoder = load_text_encoder(out / TEXT)
    looks = load_image_encoder(out / IMAGE) if recipe.layout.get("image_tokens") else None
    encoders = Encoders(load_vae(out / VAE), looks)
    folder = out / name
    trainee = learner(name, out)
    examples = Examples(recipe.tasks, recipe.clips, encoders, text_encoder, folder)
    settings = Settings(
        learning_rate=recipe.rate,
        optimizer="muon",
        lr_scheduler="cosine",
        warmup_steps=100,
        ema_decay=0.998,
        timestep_weighting="none",
        shift=3.0,  # small pictures need fewer of the noisiest levels than the published models' 5
        batch_size=batch_size,
        repeat=-(-recipe.steps * batch_size // len(examples)),
        max_train_steps=recipe.steps,
        save_steps=250,
        gradient_checkpointing=False,
    )
    run_loop(trainee, examples, settings, folder, on_step)
    for file in (f"step-{recipe.steps}.safetensors", "epoch-0.safetensors"):
        if (folder / file).exists():
            shutil.copy(folder / file, folder / WEIGHTS)
    return folder / WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.model]
    recent = 0.0

    def tell(done: int, total: int, loss: float) -> None:
        nonlocal recent
        recent = 0.98 * recent + 0.02 * loss if recent else loss
        if done % 50 == 0:
            print(f"step {done} of {total}  loss {recent:.4f}", flush=True)

    train(arguments.model, arguments.out, replace(recipe, steps=arguments.steps or recipe.steps), on_step=tell)


if __name__ == "__main__":
    main()
