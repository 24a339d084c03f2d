"""`wanflow models` and `wanflow download`: what of the published models is on this machine, and getting the rest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...wan_core.errors import InputError
from ..host.standalone import host
from .validate import nearest

FOLDERS = {  # where the host keeps each kind of file that catalogue rows name
    "dit": "diffusion_models",
    "motion_controller": "diffusion_models",
    "text_encoder": "text_encoders",
    "tokenizer": "text_encoders",
    "vae": "vae",
    "image_encoder": "clip_vision",
}


def add_models(commands: Any) -> None:
    models = commands.add_parser("models", help="list the published models, and what of them is on this machine")
    models.add_argument("model", nargs="?", help="a model's name, such as Wan2.1-T2V-1.3B, to see its files")
    models.set_defaults(command=models_command)
    download = commands.add_parser(
        "download",
        help="fetch a published model from ModelScope",
        description="Fetch from ModelScope what is missing of a published model, into ./models/ORGANISATION/MODEL. "
        "Needs the package modelscope. A download that was interrupted goes on.",
    )
    download.add_argument("model", help="a model's name, such as Wan2.1-T2V-1.3B; `wanflow models` lists them")
    download.set_defaults(command=download_command)
    for command in (models, download):
        command.add_argument("--models-dir", type=Path, metavar="FOLDER", help="where the model folders are (./models)")


def models_command(options: argparse.Namespace) -> int:
    from ...wan_core.loading.catalog import CATALOG

    host.models_dir = options.models_dir or host.models_dir
    if options.model is not None:
        for kind, source in row_of(options.model).files.items():
            found = ", ".join(map(str, on_this_machine(kind, source)))
            print(f"{kind.replace('_', ' ')}: {found or f'missing, {source}'}")
        return 0
    width = max(len(row.name) for row in CATALOG)
    for row in CATALOG:
        missing = [kind.replace("_", " ") for kind, source in row.files.items() if not on_this_machine(kind, source)]
        print(f"{row.name:{width}}  {'missing: ' + ', '.join(missing) if missing else 'here'}")
    return 0


def download_command(options: argparse.Namespace) -> int:
    from ...wan_core.loading.sources import located

    host.models_dir = options.models_dir or host.models_dir
    for kind, source in row_of(options.model).files.items():
        for path in located(source, host.model_folders(FOLDERS[kind])):
            print(path, flush=True)
    return 0


def row_of(name: str) -> Any:
    """The catalogue's row of this name."""
    from ...wan_core.loading.catalog import BY_NAME

    if name not in BY_NAME:
        raise InputError(f"There is no published model {name!r}{nearest(name, BY_NAME)}. `wanflow models` lists them.")
    return BY_NAME[name]


def on_this_machine(kind: str, source: Any) -> list[Path]:
    """The files of a source if they are all here; nobody is asked for them."""
    from ...wan_core.loading.download import find
    from ...wan_core.loading.sources import located

    return find(source, host.model_folders(FOLDERS[kind])) if source.model_id else located(source, ())
