"""What `wanflow train` does: from arguments to data, a trainee and the loop."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ...wan_core.errors import InputError
from ...wan_core.loading.lora_files import load_lora
from ...wan_core.model import WanModel
from ...wan_core.training.dataset import Item
from ...wan_core.training.examples import Encoders, Examples
from ...wan_core.training.loop import train as run_loop
from ...wan_core.training.memory import training_memory
from ...wan_core.training.results import captioned, results
from ...wan_core.training.settings import Settings
from ...wan_core.training.team import Team, joined
from ...wan_core.training.trainee import Trainee, check_choice, mixed
from ..host.standalone import host
from ..watch import Watch
from .train_data import encoded, items_of, look_through, validation_sample
from .train_models import load_engines

# Settings whose arguments have DiffSynth-Studio's names.
RENAMED = {"repeat": "dataset_repeat", "offload_activations": "use_gradient_checkpointing_offload"}


@dataclass
class Data:
    """What a training is given. Of the encoders nothing is left but the VAE, and that only to show samples."""

    model: WanModel
    examples: Examples
    held_out: Sequence
    captions: list[str]


def train(options: Namespace) -> list[Path]:
    """Train as the arguments say; the files of all results so far."""
    settings = settings_of(options)
    with joined() as team:
        host.quiet = host.quiet or not team.is_main
        host.output_directory = options.output_path.resolve()
        watch = Watch(None, host.output_directory)
        data = prepared(options, watch, team)
        trainee = captioned(trainee_of(options, data.model), data.captions)

        memory = training_memory(trainee, data.examples.shapes, settings)
        host.say(str(memory))
        with host.attached(trainee.model, memory.room):
            losses = run_loop(
                trainee,
                data.examples,
                settings,
                options.output_path,
                watch.step if team.is_main else None,
                data.held_out,
                watch.sample if team.is_main and options.sample_steps else None,
            )
        host.say(f"{len(losses)} steps are done; the last loss was {losses[-1]:.4f}.")
        return [file for _, file in results(options.output_path)] if team.is_main else []


def settings_of(options: Namespace) -> Settings:
    return Settings(**{field.name: getattr(options, RENAMED.get(field.name, field.name)) for field in fields(Settings)})


def trainee_of(options: Namespace, model: WanModel) -> Trainee:
    return mixed(
        model,
        options.trainable_models,
        options.lora_base_model,
        rank=options.lora_rank,
        targets=options.lora_target_modules,
        seed=options.seed,
        start=load_lora(options.lora_checkpoint) if options.lora_checkpoint else None,
        alpha=options.lora_alpha,
        kind=options.lora_kind,
    )


def prepared(options: Namespace, watch: Watch, team: Team) -> Data:
    """Load the models, and encode what the cache does not hold yet."""
    items = items_of(options)
    unseen = held_out(items, options.held_out, options.seed)
    seen = [item for item in items if item not in unseen]
    with team.main_first():
        clips, others = (look_through(options, some) if some else None for some in (seen, unseen))
    engines = load_engines(options)
    model = engines.pop("dit")
    check_choice(model, options.trainable_models, options.lora_base_model)
    encoders = Encoders(**engines)
    with team.main_first():
        examples = encoded(options, clips, encoders, model, watch.prepared)
        measured = encoded(options, others, encoders, model, watch.prepared) if others else ()
        if options.sample_steps:
            watch.show_samples(validation_sample(options, items, encoders), encoders.vae, options.sample_steps)
    return Data(model, examples, measured, [item.prompt for item in seen])


def held_out(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    if not 0 <= count < len(items):
        raise InputError(f"held_out is {count}, but there are {len(items)} clips, of which at least 1 is trained on.")
    return random.Random(seed).sample(items, count)
