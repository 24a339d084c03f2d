"""Finds the files of a catalogued model: inside this package, in the folders users keep models in, and only then on
ModelScope."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from ..errors import FileError
from . import catalog, hub
from .catalog import Source
from .hub import PART, RemoteFile, in_words, part_of
from .shards import complete

BUNDLED = Path(__file__).parents[1] / "tiny" / "weights"
LOCAL = Path("models")  # ./models/<organisation>/<name>/, as ModelScope's own tools lay it out
OFFLINE = "WANFLOW_OFFLINE"
# File names that say nothing about the model inside; others may also lie directly in a model folder.
GENERIC = ("diffusion_pytorch_model", "pytorch_model", "model.")
MEGABYTE = 1_000_000
# Files that are the same in many repositories, and the one they are taken from.
COMMON = {source.pattern: source for source in map(catalog.IMAGE.get, ("text_encoder", "vae", "image_encoder"))}


class Progress(Protocol):
    def update(self, megabytes: int) -> None: ...


@dataclass(frozen=True)
class Library:
    """Where models lie on this machine, and what may be fetched.

    folders                searched first: the folders of the host
    local_model_path       searched next, and where downloads go, as <organisation>/<name>
    skip_download          never contact ModelScope
    redirect_common_files  take files that are the same in many repositories from one of them
    say, progress          how the user is told what is fetched, and how far it is (in megabytes); what an update of
                           the progress raises stops a download, which a later one goes on with
    """

    folders: tuple[Path, ...] = ()
    local_model_path: Path = LOCAL
    skip_download: bool = False
    redirect_common_files: bool = True
    say: Callable[[str], None] = lambda text: None
    progress: Callable[[int], Progress] | None = None

    @property
    def roots(self) -> tuple[Path, ...]:
        return (*self.folders, self.local_model_path, LOCAL)

    @property
    def offline(self) -> str:
        """What forbids downloads, if anything does."""
        if self.skip_download:
            return "skip_download"
        return OFFLINE if os.environ.get(OFFLINE, "0") not in ("", "0") else ""


PLAIN = Library()


def fetch(source: Source, library: Library = PLAIN) -> list[Path]:
    """The files of a source, complete. Contacts nobody if they are on this machine.

    A pattern that ends with "/" (or is empty) means a folder, which is returned as it is.
    Raises FileError if they are not found and may not or cannot be downloaded.
    """
    if found := find(source, library):
        return found
    if not source.model_id:
        raise FileError(f"This installation of WanFlow lacks {source}. Install it again.")
    common = redirected(source)
    if library.redirect_common_files and common != source:
        library.say(f"{source} is the same file as {common}, which is used instead (redirect_common_files).")
        return fetch(common, library)
    if library.offline:
        raise FileError(
            f"{source} is not on this machine, and {library.offline} forbids downloads. Put it into "
            f"{library.local_model_path / source.model_id}, or into the folder {source.model_id} of one of your model "
            "folders."
        )
    download(order(source, library), library)
    if found := find(source, library):
        return found
    raise FileError(f"ModelScope's {source.model_id} has not all parts of '{source.pattern}'. Check the pattern.")


def redirected(source: Source) -> Source:
    return COMMON.get(source.pattern, source)


def find(source: Source, library: Library = PLAIN) -> list[Path]:
    """The files of a source that are on this machine; empty unless all of them are."""
    if not source.model_id:
        return [path for path in [BUNDLED / source.pattern] if path.exists()]
    name = source.model_id.split("/")[-1]
    for root in library.roots:
        for folder in (root / source.model_id, root / name):
            if found := _matches(folder, source.pattern):
                return found
        if source.pattern and "*" not in source.pattern and not source.pattern.startswith(GENERIC):
            if found := _matches(root, source.pattern):
                return found
    return []


def _matches(folder: Path, pattern: str) -> list[Path]:
    if pattern == "" or pattern.endswith("/"):
        whole = folder / pattern
        return [whole] if whole.is_dir() and any(whole.iterdir()) and not _unfinished(whole) else []
    found = [path for path in sorted(folder.glob(pattern)) if path.suffix != PART] if folder.is_dir() else []
    if not found or any(map(_unfinished, (*found, *folder.glob(pattern + PART)))):
        return []
    try:
        return [shard.path for shard in complete(found)]
    except FileError:  # somebody's interrupted download left some of the parts
        return []


def _unfinished(path: Path) -> bool:
    """Whether a download stopped in this folder, or with this part of a file."""
    parts = path.rglob("*" + PART) if path.is_dir() else [path] if path.suffix == PART else []
    return any(not part.with_suffix("").exists() for part in parts)


# ---------------------------------------------------------------- from ModelScope


def remote_files(source: Source) -> list[RemoteFile]:
    """What ModelScope has of a source. Raises FileError if that is nothing."""
    pattern = source.pattern + "*" if source.pattern == "" or source.pattern.endswith("/") else source.pattern
    found = [file for file in hub.list_files(source.model_id) if fnmatch(file.path, pattern)]
    if not found:
        raise FileError(f"ModelScope's {source.model_id} has no files '{source.pattern}'. Check the name and pattern.")
    return found


@dataclass(frozen=True)
class Order:
    """What is missing of a source: the files, and how many bytes of them an interrupted download has left."""

    source: Source
    folder: Path
    files: tuple[RemoteFile, ...]
    begun: int

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)

    def __str__(self) -> str:
        count = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        rest = f", of which {in_words(self.begun)} are there from before" if self.begun else ""
        return f"{self.source} from ModelScope into {self.folder}: {count}, {in_words(self.total)}{rest}"


def order(source: Source, library: Library) -> Order:
    """What has to be fetched of a source. Raises FileError if ModelScope does not have it."""
    folder = library.local_model_path / source.model_id
    files = tuple(file for file in remote_files(source) if not _is_whole(folder / file.path, file))
    return Order(source, folder, files, sum(_size(part_of(folder / file.path)) for file in files))


ADVICE = (
    "Nothing was downloaded. Free some space, or choose another folder for models (--models-dir, local_model_path)."
)


def check_room(folder: Path, needed: int, what: str, advice: str = ADVICE) -> None:
    """Raises FileError if so many bytes do not fit on the disk."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise FileError(f"{what} needs {in_words(needed)} on the disk, and {there} has {in_words(free)} left. {advice}")


def download(order: Order, library: Library) -> None:
    """Fetch it; interrupted, a later call goes on. Raises FileError before the first byte if the disk is too full."""
    check_room(order.folder, order.total - order.begun, str(order.source))
    library.say(f"Downloading {order}.")
    for file in order.files:  # all are begun at once, so that some of them alone are never taken for all
        hub.begin(order.folder / file.path)
    megabytes, done = math.ceil(order.total / MEGABYTE), 0
    progress = library.progress and library.progress(megabytes)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress.update(megabytes if done >= order.total else done // MEGABYTE)

    for file in order.files:
        hub.download(order.source.model_id, file, order.folder / file.path, advance)


def _is_whole(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and _size(path) == file.size


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
