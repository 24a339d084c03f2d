"""The host inside ComfyUI: its folders, progress bar, previews, interrupt and memory manager.

The same methods as `StandaloneHost`, which says what each promises.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.cli_args import args
from comfy_api.latest import ComfyExtension, io

from ...wan_core.compute import device_memory
from ...wan_core.errors import FileError, InputError
from ...wan_core.model import Engine
from ...wan_core.offload import recovery
from ...wan_core.offload.residency import Residency
from . import live
from .patcher import entries_of, patchers_of
from .standalone import MODEL_ENDINGS, OutputFile, folder_below, folder_of_clips

__all__ = ["ComfyExtension", "host", "io"]

log = logging.getLogger("WanFlow")


class Progress:
    """The bar and the preview on the node."""

    def __init__(self, total: int, node_id: str | None):
        self.total = total
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self.previewer = None

    def update(self, step: int, preview: torch.Tensor | None = None, note: str = "") -> None:
        """Show that `step` of `total` steps are done; there is no room for a `note`.

        `preview` (b,16,T,h,w) is the video as far as it is known, in normalised latents.
        Raises ComfyUI's InterruptProcessingException when the user has asked to stop.
        """
        self.bar.update_absolute(step, self.total, None if preview is None else self.picture(preview))
        comfy.model_management.throw_exception_if_processing_interrupted()

    def picture(self, latent: torch.Tensor) -> Any:
        """What ComfyUI's "preview method" setting makes of the latents; None where previews are off."""
        if self.previewer is None:
            wan = comfy.latent_formats.Wan21()
            self.previewer = latent_preview.get_previewer(latent.device, wan)
        return self.previewer and self.previewer.decode_latent_to_preview_image("JPEG", latent)


class ComfyHost:
    """What nodes ask of their host, answered by ComfyUI."""

    team = None  # ComfyUI is one process

    # Model files

    @property
    def models_dir(self) -> Path:
        return Path(folder_paths.models_dir)

    def model_files(self, kind: str) -> list[str]:
        # ComfyUI lists no .gguf files in these folders; under a name of our own it does, and remembers the list.
        gguf = f"wanflow_{kind}_gguf"
        folder_paths.folder_names_and_paths[gguf] = (folder_paths.get_folder_paths(kind), {".gguf"})
        names = (Path(name) for name in folder_paths.get_filename_list(kind) + folder_paths.get_filename_list(gguf))
        return sorted({name.as_posix() for name in names if name.suffix in MODEL_ENDINGS})

    def find_model(self, kind: str, name: str) -> Path:
        if path := folder_paths.get_full_path(kind, name):
            return Path(path)
        folders = " or ".join(folder_paths.get_folder_paths(kind))
        raise FileError(f"There is no file {name!r} in {folders}. Put it there, then press R to refresh the lists.")

    def model_folders(self, kind: str) -> list[Path]:
        return [Path(folder) for folder in (*folder_paths.get_folder_paths(kind), self.models_dir)]

    # Files that workflows read and write

    def input_dir(self) -> Path:
        return Path(folder_paths.get_input_directory())

    def output_dir(self) -> Path:
        return Path(folder_paths.get_output_directory())

    def temp_dir(self) -> Path:
        return Path(folder_paths.get_temp_directory())

    def input_path(self, name: str) -> Path:
        path = Path(folder_paths.get_annotated_filepath(name))
        if not path.is_file():
            raise FileError(f"There is no file {name!r}. Looked for {path}. Upload it, or choose another one.")
        return path

    def input_folder(self, name: str) -> Path:
        return folder_of_clips(name, self.input_dir())

    def output_folder(self, name: str) -> Path:
        return folder_below(self.output_dir(), name)

    def output_path(self, prefix: str, extension: str, temporary: bool = False) -> OutputFile:
        root = self.temp_dir() if temporary else self.output_dir()
        if Path(prefix).is_absolute() or ".." in Path(prefix).parts or not Path(prefix).name:
            raise InputError(f"The file name prefix {prefix!r} leads out of the folder {root}. Use a name below it.")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, str(root))
        filename = f"{name}_{counter:05}_.{extension.lstrip('.')}"
        return OutputFile(Path(folder), filename, subfolder, Path(folder) / filename)

    def metadata(self, hidden: Any) -> dict[str, Any]:
        """As the stand-in's, but nothing with --disable-metadata, and without ComfyUI's notes in the graph.

        The notes are the nodes' fingerprints: they may hold paths of this machine, and NaN, which is not JSON.
        """
        if args.disable_metadata:
            return {}
        graph = {
            node: {key: value for key, value in entry.items() if key != "is_changed"}
            for node, entry in (hidden.prompt or {}).items()
        }
        graphs = {"prompt": graph or None, **(hidden.extra_pnginfo or {})}
        return {name: graph for name, graph in graphs.items() if graph is not None}

    # The user

    def say(self, text: str) -> None:
        log.info("%s", text)

    def progress(self, total: int, node_id: str | None = None, unit: str = "") -> Progress:
        return Progress(total, node_id)

    def show(self, node_id: str, state: dict[str, Any]) -> None:
        live.show(node_id, state)

    def finish_asked(self, node_id: str) -> bool:
        return live.finish_asked(node_id)

    def check_interrupted(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    # Compute

    def device(self) -> torch.device:
        return comfy.model_management.get_torch_device()

    def intermediate_device(self) -> torch.device:
        return comfy.model_management.intermediate_device()

    @contextmanager
    def attached(self, engine: Engine, memory_required: int = 0) -> Iterator[torch.nn.Module]:
        """As the stand-in's, after ComfyUI has made room for the engine and `memory_required` bytes of work space."""
        if engine.offload:
            engine.limit(engine.offload, memory_required, device_memory(engine.device))
        room = memory_required + engine.passing_bytes()
        comfy.model_management.load_models_gpu(patchers_of(engine), memory_required=room)
        with engine.attached() as module:
            yield module

    def evict_others(self, weights: Sequence[Residency]) -> bool:
        """Unload all models but these, other packs' too. False where there were none."""
        return bool(comfy.model_management.free_memory(1e30, self.device(), entries_of(weights)))


host = ComfyHost()
recovery.OTHERS.append(host.evict_others)
