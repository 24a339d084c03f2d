"""The arguments of `wanflow train` and `wanflow validate`: DiffSynth-Studio's under its names, and WanFlow's own.

Reading them must not need torch: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...wan_core.loading.catalog import NEGATIVE_PROMPT

REQUIRED = object()


@dataclass(frozen=True)
class Argument:
    """`type` makes the value of a text; bool is a switch, which --no-name turns off. `flags`: names beside its own."""

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str
    choices: Sequence[str] | None = None
    flags: tuple[str, ...] = ()


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def whole_numbers(text: str) -> list[int]:
    return [int(name) for name in names(text)]


def path_list(text: str) -> list[str | list[str]]:
    """A JSON list of paths; a list in it holds the parts of one checkpoint."""
    return of_json(text, list, "a JSON list of paths")


def table(text: str) -> dict[str, Any]:
    return of_json(text, dict, 'a JSON table such as {"name": 1}')


READ_JSON = (path_list, table)


def of_json(text: str, kind: type, what: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not {what} ({error})") from error
    if not isinstance(found, kind):
        raise argparse.ArgumentTypeError(f"not {what}")
    return found


DATA = (
    Argument("dataset_base_path", Path, REQUIRED, "the folder of clips and pictures"),
    Argument("dataset_metadata_path", Path, None,
             "a .csv, .json or .jsonl with a column prompt; without it captions are .txt files beside the clips"),
    Argument("data_file_keys", names, ["image", "video"], "columns that name files; the first that is filled, and no "
             "extra input, is the clip"),
    Argument("dataset_repeat", int, 1, "how often an epoch shows each clip"),
    Argument("dataset_num_workers", int, 0, "threads that read clips while others are encoded"),
    Argument("height", int, None, "of all clips; without height and width each keeps its shape"),
    Argument("width", int, None, "of all clips"),
    Argument("max_pixels", int, 921600, "of clips that keep their shape"),
    Argument("num_frames", int, 81, "4n+1; shorter clips give as many as they have"),
    Argument("frame_rate", float, 16.0, "to bring clips to; 0 takes frames as they come, as DiffSynth-Studio does"),
    Argument("buckets", bool, False, "give each clip the size of about height x width, or max_pixels, that is nearest "
             "to its shape"),
    Argument("length_buckets", whole_numbers, [], "lengths that shorter clips are cut to, such as 17,33,49"),
    Argument("frame_sampling", str, "head", "of longer clips: their first frames, pieces evenly spread over them, or "
             "all pieces one after the other", ("head", "uniform", "chunk")),
    Argument("frame_samples", int, 1, "how many pieces uniform takes of a clip"),
    Argument("flip", bool, False, "show clips mirrored too, where caption and camera tell no side"),
    Argument("caption_prefix", str, "", "put in front of every caption"),
    Argument("caption_dropout", float, 0.0, "share of the cases in which a clip is shown without its caption"),
    Argument("extra_inputs", names, [], "what the model is given beside the caption: input_image and end_image are the "
             "clip's first and last frame, others come from columns (control_video, reference_image, vace_video, ...)"),
    Argument("held_out", int, 0, "clips to leave out of the training and to measure the loss on"),
    Argument("cache_path", Path, None, "where encoded clips are kept (default: output_path/cache)"),
)  # fmt: skip

MODEL = (
    Argument("model", str, None, "a published model by its name, such as Wan2.1-T2V-1.3B or the bundled WanTiny-T2V, "
             "with its encoders; files that are named beside it take the place of its own"),
    Argument("model_paths", path_list, [], 'a JSON list of files: ["a.safetensors", ["part 1", "part 2"]]'),
    Argument("model_id_with_origin_paths", names, [], "id:pattern,id:pattern on ModelScope, or in the models folder"),
    Argument("tokenizer_path", str, "", "a folder, or id:pattern (default: the one published for all models)"),
    Argument("models_dir", Path, None, "where the model folders are (default: ./models)", None,
             ("models-dir", "local_model_path")),
    Argument("skip_download", bool, False, "never contact ModelScope"),
    Argument("redirect_common_files", bool, True, "take text encoder, VAE and image encoder, which all repositories "
             "share, from one of them"),
    Argument("weight_dtype", str, "auto", "the type to keep the model's weights in (fp8 for a LoRA on a large model)"),
    Argument("attention", str, "auto", "the attention backend: auto (torch's own here), sdpa, cudnn, flash2, flash3"),
    Argument("rest_on", str, "disk", "where weights wait that are not on the card", ("cpu", "disk")),
    Argument("vram_limit_gb", float, 0.0, "how much of the card's memory may be in use; what of a LoRA's base model "
             "does not fit travels to the card block by block (default: all)"),
    Argument("trainable_models", names, [], "parts to train whole: dit, vace, motion_controller"),
    Argument("lora_base_model", names, [], "parts to train a LoRA on"),
    Argument("lora_target_modules", names, ["q", "k", "v", "o", "ffn.0", "ffn.2"],
             "names of layers, their ends, or patterns such as blocks.1?.*_attn.q"),
    Argument("lora_rank", int, 32, "a higher one can learn more"),
    Argument("lora_alpha", float, None, "the LoRA counts alpha / rank (default: the rank)"),
    Argument("lora_kind", str, "lora", "dora learns the lengths of a weight's rows beside their directions",
             ("lora", "dora")),
    Argument("lora_checkpoint", Path, None, "a LoRA to begin with"),
    Argument("remove_prefix_in_ckpt", str, "pipe.dit.", "for scripts that name it: saved names never have a prefix"),
)  # fmt: skip

TRAINING = (
    Argument("learning_rate", float, 1e-4, "how large the steps are"),
    Argument("lr_scheduler", str, "constant", "how the rate goes after the warm-up", ("constant", "linear", "cosine")),
    Argument("warmup_steps", int, 0, "steps over which the rate rises"),
    Argument("lr_cycles", int, 1, "how often cosine falls and begins again"),
    Argument("optimizer", str, "adamw", "all but adamw and muon need a package of their own",
             ("adamw", "adamw8bit", "adafactor", "prodigy", "schedule_free", "muon")),
    Argument("optimizer_options", table, {}, "more of the optimizer's own, as JSON"),
    Argument("weight_decay", float, 0.01, "how strongly weights are drawn towards 0"),
    Argument("lora_plus_ratio", float, 1.0, "how much faster a LoRA's second factor learns (LoRA+: 16)"),
    Argument("max_grad_norm", float, 1.0, "longer gradients are cut to this; 0 leaves them, as DiffSynth-Studio does"),
    Argument("ema_decay", float, 0.0, "save an average: 0.99 of about 100 steps; 0 saves the last step"),
    Argument("num_epochs", int, 1, "how often all clips are gone through"),
    Argument("max_train_steps", int, None, "end after so many steps at the latest"),
    Argument("batch_size", int, 1, "clips of one size at once"),
    Argument("gradient_accumulation_steps", int, 1, "batches to a step"),
    Argument("timestep_sampling", str, "shifted", "which noise levels are trained most",
             ("shifted", "uniform", "logit_normal")),
    Argument("timestep_weighting", str, "bell", "how much the loss counts at each", ("bell", "none")),
    Argument("shift", float, 5.0, "of shifted noise levels; higher trains noisier ones"),
    Argument("logit_mean", float, 0.0, "of logit_normal"),
    Argument("logit_std", float, 1.0, "of logit_normal"),
    Argument("min_timestep_boundary", float, 0.0, "0 is the noisiest level"),
    Argument("max_timestep_boundary", float, 1.0, "1 is the cleanest level"),
    Argument("gradient_checkpointing", bool, True, "compute each block twice in place of keeping what is between"),
    Argument("use_gradient_checkpointing_offload", bool, False, "keep activations in main memory"),
    Argument("seed", int, 0, "all that is random follows from it"),
    Argument("output_path", Path, Path("models"), "where results go"),
    Argument("save_steps", int, None, "save every so many steps too, not only after each epoch"),
    Argument("validation_steps", int, None, "measure the loss on held-out clips every so many steps too"),
    Argument("sample_steps", int, None, "make the validation video every so many steps, and at the end"),
    Argument("tensorboard", bool, False, "write a log for TensorBoard too, beside losses.csv"),
    Argument("find_unused_parameters", bool, False, "for scripts that name it: WanFlow never needs it"),
)  # fmt: skip

VALIDATION = (
    Argument("validation_prompt", str, "from sunset to night, a small town, light, house, river",
             "what the video shows; empty: the clip's caption"),
    Argument("validation_negative_prompt", str, NEGATIVE_PROMPT, "what it must not show (default: Wan's own)"),
    Argument("validation_item", int, 0, "number of the clip that gives size and extra inputs; 0 is the first"),
    Argument("validation_inputs", table, {}, 'extra inputs in place of the clip\'s: {"motion_bucket_id": 100}'),
    Argument("validation_seed", int, 1, "of the video's noise"),
    Argument("num_inference_steps", int, 50, "steps of the sampler"),
    Argument("cfg_scale", float, 5.0, "how strongly the prompt is followed"),
    Argument("sigma_shift", float, 5.0, "the sampler's shift"),
)  # fmt: skip

GROUPS = {"data": DATA, "model": MODEL, "training": TRAINING, "validation": VALIDATION}
ARGUMENTS = tuple(argument for group in GROUPS.values() for argument in group)
BY_NAME = {name: argument for argument in ARGUMENTS for name in (argument.name, *argument.flags)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given is not in the namespace then, so that a file can give it: see train_config.complete."""
    for title, arguments in GROUPS.items():
        group = parser.add_argument_group(title)
        for argument in arguments:
            flags = [f"--{name}" for name in (argument.name, *argument.flags)]
            options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": with_default(argument)}
            if argument.type is bool:
                group.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
            else:
                group.add_argument(*flags, type=argument.type, choices=argument.choices, **options)


def with_default(argument: Argument) -> str:
    default = argument.default
    if default is REQUIRED:
        return f"{argument.help} (needed)"
    if default is None or default in ("", [], {}) or "(default" in argument.help:
        return argument.help
    shown = ("no", "yes")[default] if argument.type is bool else default
    return f"{argument.help} (default: {','.join(shown) if isinstance(shown, list) else shown})".replace("%", "%%")
