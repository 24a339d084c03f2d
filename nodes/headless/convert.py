"""`wanflow convert`: a model file in another type, or in another number of files."""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

from ...wan_core.errors import InputError
from ..host.standalone import host
from .models import add_library, library_for

KINDS = ("dit", "text_encoder", "vae", "image_encoder")
PLAIN = ("auto", "fp32", "bf16", "fp16")
NARROW = ("fp8_e4m3fn", "fp8_e5m2")
ENDS = {"tensor": "_tensor", "row": "", "none": "_cast"}  # of the loaders' names for the same


def add_convert(commands: Any) -> Any:
    convert = commands.add_parser(
        "convert",
        help="write a model file in another type, or as one file or several",
        description="Write a checkpoint, in any layout that WanFlow reads, as safetensors with the published names. "
        "One tensor at a time is in memory; the file appears under its name when it is complete.",
    )
    convert.add_argument("input", nargs="+", help="a file, all parts of a checkpoint, a folder, or a model's name")
    convert.add_argument("output", type=Path, help="a .safetensors file that is not there yet")
    convert.add_argument("--dtype", choices=[*PLAIN, *NARROW], default="auto", help="auto keeps the types (auto)")
    convert.add_argument(
        "--scaling",
        choices=list(ENDS),
        help="of fp8: one scale a matrix, which ComfyUI reads (tensor); one a row, which WanFlow and musubi-tuner "
        "read; or none, everything cast plainly (tensor)",
    )
    convert.add_argument("--names", choices=["published", "comfyui"], default="published", help="of the tensors; they "
                         "differ in text encoders, which for ComfyUI get their vocabulary too (published)")
    convert.add_argument("--shard-size", type=float, metavar="GB", help="split into parts of at most so many gigabytes")
    convert.add_argument("--kind", choices=KINDS, default="dit", help="which model of a folder, a published model or "
                         "an all-in-one file (dit: the diffusion model)")  # fmt: skip
    convert.add_argument("--report", action="store_true", help="print by how much each weight changed, worst first")
    add_library(convert)
    convert.add_argument("--quiet", action="store_true", help="show nothing but the paths and errors")
    return convert


def convert(options: argparse.Namespace) -> list[Path]:
    """Do it; returns the files."""
    from ...wan_core.loading.checkpoint import open_checkpoint
    from ...wan_core.loading.convert import convert as write
    from ...wan_core.loading.hub import in_words
    from ...wan_core.loading.sources import resolve
    from ...wan_core.offload.quantize import STORAGE

    if options.scaling and options.dtype not in NARROW:
        raise InputError(f"--scaling is for fp8, and --dtype is {options.dtype}. Take fp8_e4m3fn, or leave it out.")
    if options.shard_size is not None and options.shard_size <= 0:
        raise InputError(f"--shard-size is {options.shard_size:g} GB. Give how many gigabytes a part may have.")
    host.quiet = options.quiet
    end = ENDS[options.scaling or "tensor"] if options.dtype in NARROW else ""
    library = library_for(options.kind, options)
    checkpoint = open_checkpoint(resolve(source(options.input), options.kind, library), options.kind)
    names = for_comfyui(checkpoint, options, library) if options.names == "comfyui" else {}
    progress = cache(lambda megabytes: host.progress(megabytes, unit="MB"))
    written = write(
        checkpoint,
        STORAGE[options.dtype + end],
        options.output,
        None if options.shard_size is None else int(options.shard_size * 1e9),
        lambda done, total: progress(total).update(done),
        **names,
    )
    if written.errors:
        mean, worst = sum(written.errors.values()) / len(written.errors), max(written.errors, key=written.errors.get)
        host.say(
            f"{len(written.errors)} weights changed, by {mean:.3%} of their size on average and by "
            f"{written.errors[worst]:.3%} at most ({worst})."
        )
    host.say(f"{checkpoint.description} became {in_words(written.bytes)}.")
    if options.report:
        for name, error in sorted(written.errors.items(), key=lambda item: -item[1]):
            print(f"{error:9.3%}  {name}")
    return written.files


def source(inputs: list[str]) -> str | list[Path]:
    return inputs[0] if len(inputs) == 1 else [Path(path) for path in inputs]


def for_comfyui(checkpoint: Any, options: argparse.Namespace, library: Any) -> dict[str, Any]:
    """What `convert` is told so that ComfyUI's loader finds its own names, and in a text encoder the vocabulary."""
    from ...wan_core.loading.identify import identify
    from ...wan_core.loading.keymaps import TO_COMFYUI
    from ...wan_core.loading.load import EMBEDDED_TOKENIZER
    from ...wan_core.loading.sources import tokenizer_folder

    kind = identify(checkpoint.shapes).kind
    if kind == "image_encoder":
        raise InputError("Image encoders are written under published names only. ComfyUI has clip_vision_h for them.")
    names: dict[str, Any] = {"rules": TO_COMFYUI.get(kind, ())}
    if kind == "text_encoder" and EMBEDDED_TOKENIZER not in checkpoint.shapes:
        import torch

        pieces = tokenizer_folder(source(options.input), checkpoint.files, library) / "spiece.model"
        if not pieces.is_file():
            raise InputError(f"ComfyUI needs the vocabulary in the text encoder's file, and there is no {pieces}.")
        names["beside"] = {EMBEDDED_TOKENIZER: torch.frombuffer(bytearray(pieces.read_bytes()), dtype=torch.uint8)}
    return names
