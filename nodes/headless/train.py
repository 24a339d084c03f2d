"""`wanflow train` and `wanflow validate`: their arguments. What they do is in train_run.py and train_validate.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .train_arguments import add_arguments
from .train_config import complete


def add_train(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train",
        usage="wanflow train [--config FILE] [--NAME VALUE ...]",
        help="train a LoRA or a whole model",
        allow_abbrev=False,
        description="Train a LoRA (--lora_base_model dit), whole parts of a model (--trainable_models dit), or both. "
        "Started again with the same output_path, it goes on where it stopped.",
    )
    add_config(parser)
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="train in N processes, each with a card of its own"
    )
    add_arguments(parser)
    return parser


def add_validate(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "validate",
        usage="wanflow validate [--config FILE] [--result FILE] [--NAME VALUE ...]",
        help="make a video with what was trained",
        allow_abbrev=False,
        description="Make the validation video with the last result in output_path, or with another one. Takes the "
        "arguments of `wanflow train`: the same config will do.",
    )
    add_config(parser)
    parser.add_argument("--result", type=Path, metavar="FILE", help="what was trained (default: the last result)")
    add_arguments(parser)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a .toml or .json with arguments, which those given here replace; or one that WanFlow is shipped with, "
        "such as lora/Wan2.1-T2V-1.3B",
    )


def train(options: argparse.Namespace) -> list[Path]:
    """The files of all results so far."""
    from . import train_run

    return train_run.train(complete(options))


def validate(options: argparse.Namespace) -> list[Path]:
    """The file of the video."""
    from . import train_validate

    return [train_validate.validate(complete(options))]
