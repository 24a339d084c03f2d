"""The training: batches in an order that follows from the seed, AdamW, checkpoints, a file for each epoch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..adapters.injection import Canvas, inject
from ..errors import InputError, ModelError
from ..model import WanModel
from ..models.dit import Run
from ..models.network import Network
from .cache import digest, module_digest
from .checkpoints import Progress, resume, save_checkpoint
from .examples import Example, Examples, batch
from .flow import flow_matching_loss, training_levels
from .trainee import Trainee

OnStep = Callable[[int, int, float], None]  # steps done, of how many, and the loss of the last


@dataclass(frozen=True)
class Settings:
    """How to train. Raises InputError for values that cannot work.

    repeat: how often an epoch shows each clip; gradient_accumulation_steps: batches to a step; warmup_steps: the rate
    rises evenly over so many steps, and stays; min and max_timestep_boundary: see flow.Levels.between; save_steps:
    save every so many steps too; offload_activations: keep what the backward pass needs in main memory.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    num_epochs: int = 1
    repeat: int = 1
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    warmup_steps: int = 0
    min_timestep_boundary: float = 0.0
    max_timestep_boundary: float = 1.0
    shift: float = 5.0
    seed: int = 0
    save_steps: int | None = None
    offload_activations: bool = False

    def __post_init__(self):
        for name in ("num_epochs", "repeat", "batch_size", "gradient_accumulation_steps", "save_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but it has to be at least 1.")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"learning_rate is {self.learning_rate}. Enter a number such as 0.0001.")

    def rate(self, step: int) -> float:
        return self.learning_rate * min(1.0, (step + 1) / (self.warmup_steps + 1))


def epoch_steps(shapes: Sequence[tuple[int, ...]], settings: Settings, epoch: int) -> list[list[list[int]]]:
    """The steps of an epoch: each some batches, each batch the numbers of some examples of one shape."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = torch.randperm(len(shapes) * settings.repeat, generator=generator) % len(shapes)
    batches, open_batches = [], {}
    for index in order.tolist():
        filling = open_batches.setdefault(shapes[index], [])
        filling.append(index)
        if len(filling) == settings.batch_size:
            batches.append(open_batches.pop(shapes[index]))
    batches += open_batches.values()
    size = settings.gradient_accumulation_steps
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def train(
    trainee: Trainee, examples: Examples, settings: Settings, folder: Path, on_step: OnStep | None = None
) -> list[float]:
    """Train, or go on where a training in `folder` stopped; returns the loss of every step.

    Writes `epoch-N.safetensors` into `folder`, and `step-N.safetensors` as `save_steps` says, each with a checkpoint.
    An exception of `on_step` ends the training after everything was saved, and passes through.
    """
    parameters = list(trainee.parameters.values())
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate, (0.9, 0.999), weight_decay=settings.weight_decay)
    progress = resume(folder, recipe(trainee, examples, settings), trainee.parameters, optimizer)
    steps_an_epoch = len(epoch_steps(examples.shapes, settings, 0))
    total = steps_an_epoch * settings.num_epochs

    def save(name: str) -> None:
        facts = {key: value for key, value in asdict(settings).items() if value is not None}
        trainee.write(folder / f"{name}.safetensors", {"training": json.dumps(facts), "steps": str(progress.step)})
        save_checkpoint(folder, progress, trainee.parameters, optimizer)

    with torch.inference_mode(False), torch.enable_grad(), trainee.model.attached() as network:
        for step, batches in steps_from(progress, examples, settings):
            generator = torch.Generator().manual_seed((settings.seed + 1) * 1_000_003 + step)
            loss = 0.0
            for indices in batches:
                example = batch([examples[index] for index in indices])
                part = example_loss(network, trainee.model, example, settings, generator) / len(batches)
                part.backward()
                loss += part.item()
            check_loss(loss, step)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.step += 1
            progress.losses.append(loss)
            if progress.step % steps_an_epoch == 0:
                save(f"epoch-{progress.step // steps_an_epoch - 1}")
            elif settings.save_steps and progress.step % settings.save_steps == 0:
                save(f"step-{progress.step}")
            try:
                if on_step is not None:
                    on_step(progress.step, total, loss)
            except BaseException:
                save(f"step-{progress.step}")
                raise
    return progress.losses


def steps_from(progress: Progress, examples: Examples, settings: Settings) -> Iterator[tuple[int, list[list[int]]]]:
    """(number, batches) of every step that is left."""
    step = 0
    for epoch in range(settings.num_epochs):
        for batches in epoch_steps(examples.shapes, settings, epoch):
            if step >= progress.step:
                yield step, batches
            step += 1


def example_loss(
    network: Network, model: WanModel, example: Example, settings: Settings, generator: torch.Generator
) -> Tensor:
    """The weighted loss of a batch at random levels. What the trunk is given comes from the same code as in sampling.

    Levels and noise are drawn on the CPU: a seed means the same on every device.
    """
    rows, _, *size = example.latents.shape
    levels = training_levels(settings.shift).between(settings.min_timestep_boundary, settings.max_timestep_boundary)
    sigmas, weights = levels.draw(rows, generator)
    noise = torch.randn(example.latents.shape, generator=generator)
    canvas = Canvas(rows, *size, dtype=model.compute_dtype, device=model.device)
    run = Run(model.compute_dtype, model.attention, around(settings))
    latents, text, sigmas, noise, weights = (
        x.to(model.device) for x in (example.latents, example.text, sigmas, noise, weights)
    )
    injection = inject(example.conditions, network, canvas)
    return (weights * flow_matching_loss(network.trunk, latents, text, sigmas, noise, injection, run)).mean()


def around(settings: Settings) -> Callable:
    """Calls a block so that its inner results are computed again in the backward pass instead of kept.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
    """

    def call(module: Callable, *arguments):
        if settings.offload_activations:
            with torch.autograd.graph.save_on_cpu():
                return checkpoint(module, *arguments, use_reentrant=False)
        return checkpoint(module, *arguments, use_reentrant=False)

    return call


def recipe(trainee: Trainee, examples: Examples, settings: Settings) -> str:
    """The name of all that a training's steps follow from; its length and when it is saved are none of it."""
    fixed = replace(settings, num_epochs=1, save_steps=None, offload_activations=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in trainee.parameters.items()}
    return digest(asdict(fixed), shapes, module_digest(trainee.model.trunk), examples.names)


def check_loss(loss: float, step: int) -> None:
    if not abs(loss) < float("inf"):
        raise ModelError(
            f"In step {step + 1} the loss was {loss}. Choose a lower learning_rate, and go on from the last checkpoint."
        )
