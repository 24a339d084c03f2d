"""The models that a training names, told apart by what is in their files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...wan_core.errors import InputError
from ...wan_core.loading import load
from ...wan_core.loading.catalog import Source
from ...wan_core.loading.checkpoint import open_checkpoint
from ...wan_core.loading.download import fetch
from ...wan_core.loading.identify import identify
from ...wan_core.offload.options import Offload
from ..host.standalone import host
from ..offload import GIB
from .models import library_for, row_of

NEEDED = {"dit": "diffusion model", "vae": "VAE", "text_encoder": "text encoder"}
MODULES = ("vace_module", "motion_controller")  # that come beside a diffusion model
KINDS = (*NEEDED, "image_encoder", *MODULES)


def load_engines(options: argparse.Namespace, instead: Mapping[str, list[Path]] | None = None) -> dict[str, Any]:
    """The models by their kinds: dit with the modules beside it, vae, text_encoder and, if it is named and needed,
    image_encoder. `instead`: files in place of those that are named."""
    loaders = {
        "dit": load.load_model,
        "vae": load.load_vae,
        "text_encoder": load.load_text_encoder,
        "image_encoder": load.load_image_encoder,
    }
    extras = {
        "text_encoder": {"tokenizer": options.tokenizer_path},
        "dit": {
            "weight_dtype": options.weight_dtype,
            "attention": options.attention,
            "offload": offload_of(options),
        },
    }
    found = {**files_by_kind(options), **(instead or {})}
    wanted = [kind for kind in loaders if kind in found and (kind != "image_encoder" or options.extra_inputs)]
    engines = {
        kind: loaders[kind](
            found[kind], device=host.device(), library=library_for(kind, options), **extras.get(kind, {})
        )
        for kind in wanted
    }
    for kind in MODULES:
        if kind in found:
            engines["dit"] = load.add_module(engines["dit"], found[kind])
    return engines


def offload_of(options: argparse.Namespace) -> Offload | None:
    """None where nothing was asked for: then weights of any type may rest in their file."""
    if not options.vram_limit_gb and options.rest_on == "disk":
        return None
    return Offload(options.rest_on, vram_limit=int(options.vram_limit_gb * GIB) or None)


def files_by_kind(options: argparse.Namespace) -> dict[str, list[Path]]:
    """Raises InputError where a model is missing, or named twice."""
    found: dict[str, list[Path]] = {}
    for kind, files in named_files(options):
        if kind in found:
            raise InputError(f"Two of the models are of one kind: {found[kind][0]} and {files[0]}. Name one of them.")
        found[kind] = files
    if options.model is not None:
        published = {kind: source for kind, source in row_of(options.model).files.items() if kind in KINDS}
        found = {kind: fetch(published[kind], library_for(kind, options)) for kind in published} | found
    for kind, noun in NEEDED.items():
        if kind not in found:
            raise InputError(
                f"No {noun} is among the models. Name it in --model_paths or --model_id_with_origin_paths, or a "
                "published model with --model."
            )
    return found


def named_files(options: argparse.Namespace) -> Iterator[tuple[str, list[Path]]]:
    """(kind, files) of every model that was named."""
    listed = [[Path(part) for part in ([entry] if isinstance(entry, str) else entry)] for entry in options.model_paths]
    for entry in options.model_id_with_origin_paths:
        model_id, colon, pattern = entry.partition(":")
        if not colon:
            raise InputError(f"'{entry}' names no model. Write model_id:pattern.")
        listed.append(fetch(Source(model_id, pattern), library_for("dit", options)))
    for files in listed:
        yield identify(open_checkpoint(files).shapes).kind, files
