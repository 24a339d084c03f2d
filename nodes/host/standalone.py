"""The host when there is no ComfyUI: folders below the working directory, a progress bar on stderr, ctrl-C.

`comfy.py` offers the same methods inside ComfyUI. What a node may ask of its host is listed by `StandaloneHost`. Names
and folders follow ComfyUI's conventions, so that a workflow finds the same files in both.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from ...wan_core.errors import FileError, InputError

MODEL_FOLDERS = {  # ComfyUI's folders for each kind of model file, the old names too
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "clip_vision": ("clip_vision",),
    "loras": ("loras",),
}
EXAMPLE_INPUTS = Path(__file__).resolve().parents[2] / "example_workflows" / "input"
LINE_EVERY = 60  # seconds, of progress in a file
MODEL_ENDINGS = {".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin", ".gguf"}


class Interrupted(Exception):
    """The user asked to stop. Like ComfyUI's own, an `Exception`: never catch broadly around a step."""


class OutputFile(NamedTuple):
    """Where a node shall write. `filename` and `subfolder` (below the output folder) are what the front end is told."""

    folder: Path
    filename: str
    subfolder: str
    path: Path


class Progress:
    """A bar on stderr; where stderr is a file, a line now and then, and one when all is done."""

    def __init__(self, host: StandaloneHost, total: int, unit: str = ""):
        self.host = host
        self.total = total
        self.unit = unit
        self.start = self.drawn = time.monotonic()

    def update(self, step: int, preview: Any = None, note: str = "") -> None:
        """Show that `step` of `total` steps are done, and a note; `preview` has no place to be shown here.

        Raises Interrupted when the user has asked to stop.
        """
        if not self.host.quiet:
            self.draw(step, note)
        self.host.check_interrupted()

    def draw(self, step: int, note: str) -> None:
        done, terminal, now = step >= self.total, sys.stderr.isatty(), time.monotonic()
        if not (terminal or done or now - self.drawn > LINE_EVERY):
            return
        self.drawn = now
        seconds = now - self.start
        filled = 30 * step // max(self.total, 1)
        pace = f"{step / max(seconds, 1e-3):.1f} {self.unit}/s" if self.unit else f"{seconds / max(step, 1):.2f} s/step"
        count = f"{step}/{self.total} {self.unit}".rstrip()
        line = f"[{'#' * filled}{'.' * (30 - filled)}] {count}  {seconds:.0f} s, {pace}  {note}".rstrip()
        print(f"\r{line}" if terminal else line, end="" if terminal and not done else "\n", file=sys.stderr, flush=True)


class StandaloneHost:
    """What nodes ask of their host. The command line sets the four folders and `quiet` before anything runs."""

    def __init__(self, base: Path | None = None):
        base = base or Path.cwd()
        self.models_dir = base / "models"
        self.input_directory = base / "input"
        self.output_directory = base / "output"
        self.quiet = False
        self.interrupted = False
        self.team = None  # the processes that share the work of this run: parallel.Team
        self.used = WeakSet()  # weights of which copies may lie on the compute device

    # Model files

    def model_files(self, kind: str) -> list[str]:
        """Names, below their folder and with "/", of the files of a kind (a key of `MODEL_FOLDERS`)."""
        names = set()
        for folder in self.kind_folders(kind):
            files = (path for path in folder.rglob("*") if path.suffix in MODEL_ENDINGS and path.is_file())
            names.update(path.relative_to(folder).as_posix() for path in files)
        return sorted(names)

    def find_model(self, kind: str, name: str) -> Path:
        """The file behind a name of `model_files`; FileError when there is none."""
        for folder in self.kind_folders(kind):
            if (folder / name).is_file():
                return folder / name
        folders = " or ".join(map(str, self.kind_folders(kind)))
        raise FileError(f"There is no file {name!r} in {folders}. Put it there, or name another --models-dir.")

    def model_folders(self, kind: str) -> list[Path]:
        """Where the folder `<organisation>/<model>` of a published model may lie."""
        return [*self.kind_folders(kind), self.models_dir]

    def kind_folders(self, kind: str) -> list[Path]:
        """As in ComfyUI: below the models folder, and below the output folder, where nodes save what was trained."""
        return [*(self.models_dir / folder for folder in MODEL_FOLDERS[kind]), self.output_directory / kind]

    # Files that workflows read and write

    def input_dir(self) -> Path:
        return self.input_directory

    def output_dir(self) -> Path:
        return self.output_directory

    def temp_dir(self) -> Path:
        return Path(self._temporary.name)

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="wanflow-")  # removed when the process ends

    def input_path(self, name: str) -> Path:
        """The file a workflow calls `name`: in the input folder, or as "name [output]", "[temp]", "[input]" says.

        A path from the working directory works too: without a browser nobody uploads into the input folder. Last come
        the pictures and clips that the example workflows are shipped with.
        """
        bare, _, place = name.rpartition(" [")
        folders = {"input]": self.input_dir, "output]": self.output_dir, "temp]": self.temp_dir}
        candidates = [folders[place]() / bare] if place in folders else [self.input_dir() / name, Path(name)]
        for path in (*candidates, EXAMPLE_INPUTS / name):
            if path.is_file():
                return path
        raise FileError(f"There is no file {name!r}. Looked for {' and '.join(map(str, candidates))}.")

    def input_folder(self, name: str) -> Path:
        """The folder of clips called `name`: below the input folder, anywhere by its path, or a shipped one."""
        return folder_of_clips(name, self.input_dir())

    def output_folder(self, name: str) -> Path:
        """The folder `name` below the output folder, whether it exists or not."""
        return folder_below(self.output_dir(), name)

    def output_path(self, prefix: str, extension: str, temporary: bool = False) -> OutputFile:
        """The next free name `<prefix>_00001_.<extension>`, counted as ComfyUI counts; its folder exists afterwards.

        `prefix` may hold a subfolder and %year%, %month%, %day%, %hour%, %minute%, %second%.
        """
        root = (self.temp_dir() if temporary else self.output_dir()).resolve()
        relative = Path(expand_time(prefix))
        if not relative.name:
            raise InputError("The file name prefix is empty. Enter a name, such as WanFlow/video.")
        folder = (root / relative.parent).resolve()
        if not folder.is_relative_to(root):
            raise InputError(f"The file name prefix {prefix!r} leads out of the folder {root}. Use a name below it.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"The folder {folder} cannot be made ({error.strerror}). Choose another one.") from error
        filename = f"{relative.name}_{next_counter(folder, relative.name):05}_.{extension.lstrip('.')}"
        subfolder = folder.relative_to(root).as_posix()
        return OutputFile(folder, filename, "" if subfolder == "." else subfolder, folder / filename)

    def metadata(self, hidden: Any) -> dict[str, Any]:
        """`{"prompt": graph, "workflow": graph of the editor}`, as far as known, for files that carry their graph.

        `hidden` is the node's `cls.hidden`.
        """
        graphs = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
        return {name: graph for name, graph in graphs.items() if graph is not None}

    # The user

    def say(self, text: str) -> None:
        """One line the user should read, once."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def progress(self, total: int, node_id: str | None = None, unit: str = "") -> Progress:
        """A bar for `total` steps, or what `unit` names."""
        return Progress(self, total, unit)

    def show(self, node_id: str | None, state: dict[str, Any]) -> None:
        """Draw a node's state on the node itself while it works. There is none here: its progress bar tells."""

    def finish_asked(self, node_id: str | None) -> bool:
        """Whether the user has pressed the node's button to come to an end and go on with what is there."""
        return False

    def check_interrupted(self) -> None:
        """Raises Interrupted when the user has asked to stop."""
        if self.interrupted:
            raise Interrupted("Stopped.")

    # Compute

    def device(self) -> Any:
        """The torch.device that models run on."""
        from ...wan_core.compute import default_device

        return default_device()

    def intermediate_device(self) -> Any:
        """The torch.device on which results wait for the next node."""
        import torch

        return torch.device("cpu")

    @contextmanager
    def attached(self, engine: Any, memory_required: int = 0) -> Iterator[Any]:
        """The engine's module on the compute device for the length of a run.

        On a graphics card as many weights stay as fit beside `memory_required` bytes of work space.
        """
        self.make_room(engine, memory_required)
        with engine.attached(self.device()) as module:
            yield module

    def make_room(self, engine: Any, memory_required: int) -> None:
        """Drop the copies of other engines' weights where they are in the way, and limit this one's."""
        from ...wan_core.compute import device_memory
        from ...wan_core.offload import recovery
        from ...wan_core.offload.options import Offload

        if self.evict_others not in recovery.OTHERS:
            recovery.OTHERS.append(self.evict_others)
        memory = device_memory(self.device())
        if memory is None:
            return
        options = engine.offload or Offload()
        if options.budget(memory_required, engine.resident_bytes(), memory) < engine.total_bytes():
            self.evict_others(engine.weights)
        engine.limit(options, memory_required, device_memory(self.device()))
        self.used.update(engine.weights)

    def evict_others(self, weights: Sequence[Any]) -> bool:
        """Drop the copies of all weights but these. False where there were none."""
        return sum(other.release() for other in set(self.used) - set(weights)) > 0


def folder_of_clips(name: str, inputs: Path) -> Path:
    """Raises FileError where there is none."""
    candidates = (inputs / name, Path(name).expanduser(), EXAMPLE_INPUTS / name)
    for folder in candidates:
        if name.strip() and folder.is_dir():
            return folder
    raise FileError(
        f"There is no folder {name!r} in {inputs}. Put the clips into a folder there, or enter the path of one."
    )


def folder_below(root: Path, name: str) -> Path:
    """Raises InputError for what is no name of a folder below `root`."""
    folder = (root / expand_time(name)).resolve()
    if not name.strip() or folder == root.resolve() or not folder.is_relative_to(root.resolve()):
        raise InputError(f"{name!r} is no folder below {root}. Enter a name, such as training/my_style.")
    return folder


def expand_time(prefix: str) -> str:
    codes = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}
    for name, code in codes.items():
        prefix = prefix.replace(f"%{name}%", time.strftime(code))
    return prefix


def next_counter(folder: Path, name: str) -> int:
    """One more than the highest number in names like `<name>_00001_.mp4`, whatever their ending."""
    pattern = re.compile(rf"{re.escape(name)}_(\d+)(_.*)?", re.IGNORECASE)
    numbers = [int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    return max(numbers, default=0) + 1


host = StandaloneHost()
