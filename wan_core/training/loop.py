"""The training: steps, and between them all that is saved, measured and shown."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, ModelError
from ..model import WanModel
from ..models.network import Network
from ..offload.recovery import others_give, persist
from .average import Average, put
from .cache import digest
from .checkpoints import Progress, load_checkpoint, save_checkpoint
from .examples import Example, Examples
from .logs import Log
from .objective import Objective
from .optimizers import OPTIMIZERS, make_optimizer, set_rate
from .order import Batch, epoch_steps, share, steps_from
from .settings import Settings
from .team import current_team, mapped
from .trainee import Trainee
from .validation import validation_losses

OnStep = Callable[[int, int, float], None]  # steps done, of how many, and the loss of the last
OnSample = Callable[[WanModel, int], None]  # the model as it would be saved now, and steps done

# Settings that no step depends on: a training may go on with others.
FREE = (
    "save_steps", "validation_steps", "sample_steps", "tensorboard", "gradient_checkpointing", "offload_activations",
)  # fmt: skip
LENGTH = ("num_epochs", "max_train_steps")  # the rate depends on them where it falls to the end
LESS_MEMORY = (
    "Train with gradient_checkpointing, offload_activations, fewer frames or a smaller size, or with the model in fp8. "
    "All steps before this one are saved: started again with the same settings, the training goes on from there."
)


def train(
    trainee: Trainee,
    examples: Examples,
    settings: Settings,
    folder: Path,
    on_step: OnStep | None = None,
    held_out: Sequence[Example] = (),
    on_sample: OnSample | None = None,
) -> list[float]:
    """Train, or go on where a training in `folder` stopped; returns the loss of every step.

    Writes `epoch-N.safetensors` into `folder` after each epoch, `step-N.safetensors` as `save_steps` says and at the
    end, each with a checkpoint, and tables of the losses (logs.py), with those of `held_out` clips, which must be none
    that are trained on. An exception of `on_step` or `on_sample`, and whatever stops a step, ends the training after
    everything was saved, and passes through. In the end the trainee's parameters are those that were saved.
    """
    with torch.inference_mode(False), torch.enable_grad(), trainee.model.attached() as network:
        training = Training(trainee, examples, settings, folder, network)
        try:
            training.run(on_step, held_out, on_sample)
        finally:
            training.close()
        return training.progress.losses


class Training:
    """All that a training is made of between two steps."""

    def __init__(self, trainee: Trainee, examples: Examples, settings: Settings, folder: Path, network: Network):
        self.trainee, self.examples, self.settings, self.folder = trainee, examples, settings, folder
        self.team = current_team()
        if not (self.team.holds_all or OPTIMIZERS[settings.optimizer].takes_parts):
            raise InputError(
                f"{settings.optimizer} looks at whole matrices, but each process holds a part of them. Choose adamw."
            )
        self.groups = examples.groups  # read from the files of all clips
        self.steps_an_epoch = len(epoch_steps(self.groups, settings, 0, self.team.count))
        self.total = min(self.steps_an_epoch * settings.num_epochs, settings.max_train_steps or 2**63)
        self.objective = Objective(network, trainee.model, settings)
        self.parameters = self.team.prepare(self.objective, trainee)
        self.optimizer = make_optimizer(self.parameters, settings.learning_rate, settings)
        self.average = Average(self.parameters, settings.ema_decay) if settings.ema_decay else None
        self.progress = self.resume(recipe(trainee, examples, settings, self.team.count))
        self.log = Log(folder, self.progress.step, settings.tensorboard) if self.team.is_main else None

    def close(self) -> None:
        self.settle()
        if self.log:
            self.log.close()

    def run(self, on_step: OnStep | None, held_out: Sequence[Example], on_sample: OnSample | None) -> None:
        if on_sample is not None and not self.team.holds_all:
            raise InputError("No samples can be made while each process holds a part of the model. Leave them out.")
        begun = time.perf_counter()
        for number, batches in steps_from(self.progress.step, self.total, self.groups, self.settings, self.team.count):
            facts = self.step(number, batches)
            now = time.perf_counter()
            if self.log:
                self.log.step({**facts, "seconds": round(now - begun, 4)})
            begun = now
            self.look(held_out, on_sample)
            self.outside(on_step and partial(on_step, self.progress.step, self.total, facts["loss"]))

    def step(self, number: int, batches: Sequence[Batch]) -> dict[str, float]:
        """One step; what there is to tell of it."""
        loss, length = self.gradients_or_save(number, batches)
        rate = self.settings.rate(number, self.total)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step = number + 1
        self.progress.losses.append(loss)
        if self.average:
            self.average.update(self.progress.step)
        epoch = number // self.steps_an_epoch
        return {"step": number + 1, "epoch": epoch, "loss": loss, "learning_rate": rate, "gradient_norm": length}

    def gradients_or_save(self, number: int, batches: Sequence[Batch]) -> tuple[float, float]:
        """As `gradients`. Where that fails, all steps before this one are saved."""
        try:
            return persist(
                partial(self.gradients, number, batches),
                relieve=lambda: others_give(self.trainee.model.weights),
                doing=f"training, in step {number + 1}",
                advice=LESS_MEMORY,
            )
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            if number and self.team.saves_alone:
                self.save(f"step-{number}")
            raise

    def gradients(self, number: int, batches: Sequence[Batch]) -> tuple[float, float]:
        """The step's loss and the length of its gradient, which is in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)  # of a try before
        team, loss = self.team, 0.0
        for indices, generators, weight in share(batches, (self.settings.seed, number), team.rank, team.count):
            part = weight * self.objective(self.examples.batch(indices, generators), generators)
            part.backward()
            loss += part.item()
        loss = team.mean(loss)
        length = team.gather(self.parameters, self.settings.max_grad_norm)
        check_finite(number, loss=loss, gradient=length)
        return loss, length

    def look(self, held_out: Sequence[Example], on_sample: OnSample | None) -> None:
        """Save, validate and show samples where it is time to."""
        step = self.progress.step
        epoch_ends = step % self.steps_an_epoch == 0

        def due(every: int | None) -> bool:
            return epoch_ends or step == self.total or (every is not None and step % every == 0)

        if held_out and due(self.settings.validation_steps):
            self.outside(partial(self.validate, held_out))
        if due(self.settings.sample_steps):
            self.outside(on_sample and partial(self.show, on_sample))
        if due(self.settings.save_steps):
            self.save(f"epoch-{step // self.steps_an_epoch - 1}" if epoch_ends else f"step-{step}")

    def validate(self, held_out: Sequence[Example]) -> None:
        with self.at_rest():
            losses = validation_losses(self.objective, held_out)
        if self.log:
            self.log.validation(self.progress.step, losses)

    def show(self, on_sample: OnSample) -> None:
        with self.at_rest(), torch.no_grad():
            on_sample(self.trainee.model, self.progress.step)

    def outside(self, call: Callable[[], None] | None) -> None:
        """Call what no step depends on. Where it fails, in any process, all save: they may have to do it together."""
        failure = None
        try:
            if call is not None:
                call()
        except BaseException as error:
            failure = error
        if self.team.mean(float(failure is not None)):
            self.save(f"step-{self.progress.step}")
            raise failure or KeyboardInterrupt

    def settle(self) -> None:
        """Let the parameters be those to save and to show: the average, or where schedule-free steps arrive at."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        if self.average:
            put(self.parameters, self.average.values)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Settled inside the `with`; afterwards the training can go on."""
        if not (self.average or hasattr(self.optimizer, "eval")):
            yield
            return
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.settle()
        try:
            yield
        finally:
            if hasattr(self.optimizer, "train"):
                self.optimizer.train()
            put(self.parameters, own)  # the optimizer's own way back is rounded

    def save(self, name: str) -> None:
        """The result so far under its name, and a checkpoint."""
        facts = {key: value for key, value in asdict(self.settings).items() if value is not None}
        with self.at_rest():
            texts = {"training": json.dumps(facts), "steps": str(self.progress.step)}
            self.team.write(self.trainee, self.folder / f"{name}.safetensors", texts)
        state = mapped(self.state(), self.team.whole)
        if self.team.is_main:
            save_checkpoint(self.folder, self.progress, state)

    def state(self) -> dict[str, Any]:
        return {
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values if self.average else {},
        }

    @torch.no_grad()
    def resume(self, recipe: str) -> Progress:
        """Put everything into the state of the checkpoint in the folder, if there is one."""
        found = load_checkpoint(self.folder, recipe)
        if found is None:
            return Progress(recipe)
        progress, state = found
        for name, parameter in self.parameters.items():
            parameter.copy_(self.team.part(state["parameters"][name], parameter))
            if self.average:
                self.average.values[name].copy_(self.team.part(state["average"][name], parameter))
        self.optimizer.load_state_dict(self.shared_out(state["optimizer"]))
        return progress

    def shared_out(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """An optimizer's state as this process holds it."""
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states = {n: mapped(of, partial(self.team.part, like=ordered[n])) for n, of in state["state"].items()}
        return {**state, "state": states}


def recipe(trainee: Trainee, examples: Examples, settings: Settings, processes: int = 1) -> str:
    """The name of all that a training's steps follow from."""
    free = FREE + (LENGTH if settings.lr_scheduler == "constant" else ())
    usual = Settings()
    fixed = replace(settings, **{name: getattr(usual, name) for name in free})
    shapes = {name: tuple(parameter.shape) for name, parameter in trainee.parameters.items()}
    return digest(asdict(fixed), processes, shapes, trainee.origin, examples.facts)


def check_finite(step: int, **numbers: float) -> None:
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ModelError(
                f"In step {step + 1} the {name} was {number}. Choose a lower learning_rate and another output folder; "
                "the result of the steps before is saved."
            )
