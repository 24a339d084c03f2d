"""`wanflow models` and `wanflow download`: what of the published models is on this machine, and getting the rest."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from ...wan_core.errors import InputError
from ...wan_core.loading.catalog import BY_NAME, CATALOG, Row, Source
from ...wan_core.loading.download import Library, check_room, fetch, find, order, remote_files
from ...wan_core.loading.hub import in_words
from ...wan_core.loading.shards import complete
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
    models.add_argument("--sizes", action="store_true", help="ask ModelScope how large the missing files are")
    models.set_defaults(command=models_command)
    download = commands.add_parser(
        "download",
        help="fetch a published model from ModelScope",
        description="Fetch from ModelScope what is missing of a published model, into ORGANISATION/MODEL of the models "
        "folder. A download that was interrupted goes on.",
    )
    download.add_argument(
        "model",
        help="a model's name, such as Wan2.1-T2V-1.3B (`wanflow models` lists them), or model_id:pattern for any files "
        "on ModelScope",
    )
    download.set_defaults(command=download_command)
    for command in (models, download):
        add_library(command)


def add_library(parser: Any) -> None:
    """The arguments that say where published models lie and come from."""
    parser.add_argument(
        "--models-dir", "--local_model_path", type=Path, metavar="FOLDER", help="where the model folders are (./models)"
    )
    parser.add_argument("--skip_download", action="store_true", help="never contact ModelScope")
    parser.add_argument(
        "--redirect_common_files",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take text encoder, VAE and image encoder, which all repositories share, from one of them (yes)",
    )


def library_for(kind: str, options: argparse.Namespace) -> Library:
    """The library for a kind of file, from the arguments of `add_library`."""
    from ..library import library_of

    host.models_dir = options.models_dir or host.models_dir
    choices = Library((), host.models_dir, options.skip_download, options.redirect_common_files)
    return library_of(FOLDERS[kind], choices)


def models_command(options: argparse.Namespace) -> int:
    if options.model is not None:
        for kind in (row := row_of(options.model)).files:
            print(f"{kind.replace('_', ' ')}: {file_line(row, kind, options)}")
        return 0
    width = max(len(row.name) for row in CATALOG)
    for row in CATALOG:
        print(f"{row.name:{width}}  {row_line(row, options)}")
    return 0


def row_line(row: Row, options: argparse.Namespace) -> str:
    """What is missing of a model, or how large it is."""
    found = {kind: on_this_machine(kind, source, options) for kind, source in row.files.items()}
    missing = [
        kind.replace("_", " ") + size_of_missing(row.files[kind], options)
        for kind, files in found.items()
        if not files
    ]
    if missing:
        return f"missing: {', '.join(missing)}"
    return f"here, {in_words(size_on_disk(chain(*found.values())))}"


def file_line(row: Row, kind: str, options: argparse.Namespace) -> str:
    """Where the files of a kind lie, or where they would come from and how large they are."""
    source = row.files[kind]
    if found := on_this_machine(kind, source, options):
        return f"{', '.join(map(str, found))} ({in_words(size_on_disk(found))})"
    return f"missing, {source}{size_of_missing(source, options) or estimate(row, kind, options)}"


def estimate(row: Row, kind: str, options: argparse.Namespace) -> str:
    """In brackets, from what is published of a network; nobody is asked."""
    if kind == "tokenizer":
        return ""
    from ...wan_core.loading.outline import open_outline

    return f" (about {in_words(open_outline(row.name, kind, library_for(kind, options)).bytes)})"


def size_on_disk(paths: Iterable[Path]) -> int:
    """In bytes; of folders all that is in them, of an index what it lists."""
    files: set[Path] = set()
    for path in paths:
        files.update(path.rglob("*") if path.is_dir() else (shard.path for shard in complete([path])))
    return sum(file.stat().st_size for file in files if file.is_file())


def size_of_missing(source: Source, options: argparse.Namespace) -> str:
    """In brackets, if it was asked for and ModelScope may be."""
    if not options.sizes or library_for("dit", options).offline:
        return ""
    return f" ({in_words(sum(file.size for file in remote_files(source)))})"


def download_command(options: argparse.Namespace) -> int:
    files = asked_for(options.model)
    missing = [(kind, source) for kind, source in files if not on_this_machine(kind, source, options)]
    libraries = {kind: library_for(kind, options) for kind, _ in files}
    if len(missing) > 1 and not libraries[missing[0][0]].offline:
        orders = [order(source, libraries[kind]) for kind, source in missing]
        needed = sum(order.total - order.begun for order in orders)
        check_room(host.models_dir, needed, options.model)
        host.say(f"{options.model}: {in_words(needed)} to download.")
    for kind, source in files:
        for path in on_this_machine(kind, source, options) or fetch(source, libraries[kind]):
            print(path, flush=True)
    return 0


def asked_for(text: str) -> list[tuple[str, Source]]:
    """(kind, source) of each part of what `wanflow download` was asked for; of files by id and pattern, as if for a
    diffusion model."""
    model_id, colon, pattern = text.partition(":")
    return [("dit", Source(model_id, pattern))] if colon else list(row_of(text).files.items())


def row_of(name: str) -> Row:
    """The catalogue's row of this name."""
    if name not in BY_NAME:
        raise InputError(f"There is no published model {name!r}{nearest(name, BY_NAME)}. `wanflow models` lists them.")
    return BY_NAME[name]


def on_this_machine(kind: str, source: Source, options: argparse.Namespace) -> list[Path]:
    """The files of a source if they are all here; nobody is asked for them."""
    return find(source, library_for(kind, options))
