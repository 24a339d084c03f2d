"""`wanflow train`: the arguments of DiffSynth-Studio's training script, as far as they exist, and a few more."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...wan_core.errors import InputError
from ..host.standalone import host
from .models import add_library, library_for

REFERENCE_PREFIX = "pipe.dit."  # its scripts strip this from names; ours never have it


def add_train(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train",
        help="train a LoRA or a whole model",
        allow_abbrev=False,
        description="Train a LoRA (with "
        "--lora_base_model dit) or the whole diffusion model (with --trainable_models dit). "
        "Started again with the same output_path, it goes on where it stopped.",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_base_path", type=Path, required=True, help="the folder of clips and pictures")
    data.add_argument(
        "--dataset_metadata_path",
        type=Path,
        help="a .csv, .json or .jsonl with a column prompt; without it, captions are .txt files",
    )
    data.add_argument(
        "--data_file_keys",
        type=names,
        default=["image", "video"],
        help="columns that name the file; the first that is filled counts (image,video)",
    )
    data.add_argument("--dataset_repeat", type=int, default=1, help="how often an epoch shows each clip (1)")
    data.add_argument("--height", type=int, help="of all clips; without height and width each keeps its shape")
    data.add_argument("--width", type=int)
    data.add_argument("--max_pixels", type=int, default=921600, help="for clips that keep their shape (921600)")
    data.add_argument("--num_frames", type=int, default=81, help="4n+1 (81)")
    data.add_argument(
        "--frame_rate",
        type=float,
        default=16.0,
        help="to bring clips to (16); 0 takes frames as they come, as DiffSynth-Studio does",
    )
    data.add_argument("--extra_inputs", type=names, default=[], help="input_image, end_image, or both with a comma")
    data.add_argument("--cache_path", type=Path, help="where encoded clips are kept (output_path/cache)")

    model = parser.add_argument_group("model")
    model.add_argument("--model_paths", type=path_list, default=[], help='a JSON list: ["a.safetensors", ["shard", …]]')
    model.add_argument("--model_id_with_origin_paths", type=names, default=[], help="id:pattern,id:pattern, ModelScope")
    model.add_argument("--tokenizer_path", default="", help="a folder, or id:pattern (the one published for all models)")
    add_library(model)
    model.add_argument("--trainable_models", choices=["dit"], help="train the whole model")
    model.add_argument("--lora_base_model", choices=["dit"], help="train a LoRA")
    model.add_argument(
        "--lora_target_modules",
        type=names,
        default=["q", "k", "v", "o", "ffn.0", "ffn.2"],
        help="names of layers, or their ends (q,k,v,o,ffn.0,ffn.2)",
    )
    model.add_argument("--lora_rank", type=int, default=32, help="32")
    model.add_argument(
        "--remove_prefix_in_ckpt",
        choices=[REFERENCE_PREFIX],
        default=REFERENCE_PREFIX,
        help="for scripts that name it; saved names have no such prefix",
    )

    steps = parser.add_argument_group("training")
    steps.add_argument("--learning_rate", type=float, default=1e-4, help="0.0001")
    steps.add_argument("--weight_decay", type=float, default=0.01, help="0.01")
    steps.add_argument("--warmup_steps", type=int, default=0, help="steps over which the rate rises (0)")
    steps.add_argument("--num_epochs", type=int, default=1, help="1")
    steps.add_argument("--batch_size", type=int, default=1, help="clips of one size at once (1)")
    steps.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches to a step (1)")
    steps.add_argument("--min_timestep_boundary", type=float, default=0.0, help="0 is the noisiest level (0)")
    steps.add_argument("--max_timestep_boundary", type=float, default=1.0, help="1 is the cleanest level (1)")
    steps.add_argument(
        "--use_gradient_checkpointing_offload", action="store_true", help="keep activations in main memory"
    )
    steps.add_argument("--seed", type=int, default=0, help="0")
    steps.add_argument("--save_steps", type=int, help="save every so many steps, not only after each epoch")
    steps.add_argument("--output_path", type=Path, default=Path("models"), help="where results go (./models)")
    return parser


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def path_list(text: str) -> list[str | list[str]]:
    """The type of an argument that is a JSON list of paths, a list in it being the parts of one checkpoint."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a JSON list of paths ({error})") from error
    if not isinstance(found, list):
        raise argparse.ArgumentTypeError("not a JSON list of paths")
    return found


def train(options: argparse.Namespace) -> list[Path]:
    """Train as the arguments say; the files of all epochs."""
    from ...wan_core.training import loop
    from ...wan_core.training.cache import Cache
    from ...wan_core.training.dataset import Framing, list_items
    from ...wan_core.training.examples import Encoders, prepare
    from ...wan_core.training.trainee import new_lora, whole_trunk

    if bool(options.trainable_models) == bool(options.lora_base_model):
        raise InputError("Say what to train: either --lora_base_model dit for a LoRA, or --trainable_models dit.")
    framing = Framing(options.num_frames, options.height, options.width, options.max_pixels, options.frame_rate)
    settings = loop.Settings(
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        num_epochs=options.num_epochs,
        repeat=options.dataset_repeat,
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        warmup_steps=options.warmup_steps,
        min_timestep_boundary=options.min_timestep_boundary,
        max_timestep_boundary=options.max_timestep_boundary,
        seed=options.seed,
        save_steps=options.save_steps,
        offload_activations=options.use_gradient_checkpointing_offload,
    )
    items, problems = list_items(options.dataset_base_path, options.dataset_metadata_path, options.data_file_keys)
    say_all(problems)
    engines = load_engines(options)
    model = engines.pop("dit")
    cache = Cache(options.cache_path or options.output_path / "cache")
    progress = host.progress(len(items))
    examples, notes = prepare(
        items, framing, Encoders(**engines), cache, options.extra_inputs, lambda done, total: progress.update(done)
    )
    engines.clear()  # what was made of clips and captions is on the disk
    say_all(notes)
    if options.lora_base_model:
        trainee = new_lora(model, options.lora_rank, options.lora_target_modules, options.seed)
    else:
        trainee = whole_trunk(model)
    progress = None

    def on_step(done: int, total: int, loss: float) -> None:
        nonlocal progress
        progress = progress or host.progress(total)
        progress.update(done)

    losses = loop.train(trainee, examples, settings, options.output_path, on_step)
    host.say(f"{len(losses)} steps are done; the last loss was {losses[-1]:.4f}.")
    return [options.output_path / f"epoch-{epoch}.safetensors" for epoch in range(settings.num_epochs)]


def say_all(lines: list[str]) -> None:
    for line in lines:
        host.say(line)


def load_engines(options: argparse.Namespace) -> dict[str, Any]:
    """The models by their kinds: dit, vae, text_encoder and, if it is named, image_encoder."""
    from ...wan_core.loading import load

    loaders = {
        "dit": load.load_model,
        "vae": load.load_vae,
        "text_encoder": load.load_text_encoder,
        "image_encoder": load.load_image_encoder,
    }
    found = dict(sources(options))
    for kind, example in (("dit", "diffusion model"), ("vae", "VAE"), ("text_encoder", "text encoder")):
        if kind not in found:
            raise InputError(
                f"No {example} is among the models. Name it in --model_paths or --model_id_with_origin_paths."
            )
    wanted = [kind for kind in loaders if kind in found and (kind != "image_encoder" or options.extra_inputs)]
    extras = {"text_encoder": {"tokenizer": options.tokenizer_path}}
    return {
        kind: loaders[kind](
            found[kind], device=host.device(), library=library_for(kind, options), **extras.get(kind, {})
        )
        for kind in wanted
    }


def sources(options: argparse.Namespace) -> Iterator[tuple[str, list[Path]]]:
    """(kind, files) of every model that was named."""
    from ...wan_core.loading.catalog import Source
    from ...wan_core.loading.checkpoint import open_checkpoint
    from ...wan_core.loading.download import fetch
    from ...wan_core.loading.identify import identify

    listed = [[Path(part) for part in ([entry] if isinstance(entry, str) else entry)] for entry in options.model_paths]
    for entry in options.model_id_with_origin_paths:
        model_id, colon, pattern = entry.partition(":")
        if not colon:
            raise InputError(f"'{entry}' names no model. Write model_id:pattern.")
        listed.append(fetch(Source(model_id, pattern), library_for("dit", options)))
    for files in listed:
        yield identify(open_checkpoint(files).shapes).kind, files
