"""Menu WanFlow/report: what files are."""

from __future__ import annotations

from pathlib import Path

from ..wan_core.errors import FileError
from ..wan_core.loading import catalog
from ..wan_core.loading.download import find
from ..wan_core.loading.inspect import inspect
from .host import host, io
from .host.standalone import MODEL_FOLDERS
from .library import library_of


def named_files(text: str) -> list[Path]:
    """The files behind a text with a path or name a line: names are those of the loaders' menus, of catalogued models,
    and of files in the input and output folder. Raises FileError where there is none."""
    names = [line.strip().strip("\"'") for line in text.splitlines() if line.strip()]
    if not names:
        raise FileError("No file was named. Enter a path, or a name as the loaders list it.")
    return [path for name in names for path in files_called(name)]


def files_called(name: str) -> list[Path]:
    if Path(name).exists():
        return [Path(name)]
    if row := catalog.BY_NAME.get(name):
        source = row.files.get("motion_controller", row.files["dit"])
        if files := find(source, library_of("diffusion_models")):
            return files
        raise FileError(f"{name} is not on this machine. Fetch it with 'wanflow download {name}', or load it once.")
    for kind in MODEL_FOLDERS:
        if name in host.model_files(kind):
            return [host.find_model(kind, name)]
    if (host.output_dir() / name).is_file():
        return [host.output_dir() / name]
    try:
        return [host.input_path(name)]
    except FileError as error:
        raise FileError(
            f"There is no file {name}: no path leads to it, and no model, input or output folder holds it. "
            "Enter the whole path, or the name as the loaders list it."
        ) from error


class Inspect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowInspect",
            display_name="Inspect Wan File",
            category="WanFlow/report",
            description="Tells what a checkpoint, a LoRA, a video or a picture is: family, sizes, types, what it fits, "
            "how it was made. Nothing is loaded.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "file",
                    default="WanTiny-T2V",
                    multiline=True,
                    tooltip="A path, or a name as the loaders list it; a file in the input or output folder; the parts "
                    "of one checkpoint a line each.",
                )
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The page, for any node that shows text.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file):
        """The files as they are now; ComfyUI runs the node again when they change."""
        try:
            facts = [(path.stat().st_size, path.stat().st_mtime_ns) for path in named_files(file)]
        except FileError as error:
            facts = str(error)
        return str(hash(str(facts)))

    @classmethod
    def execute(cls, file):
        report = inspect(named_files(file))
        host.say(report)
        return io.NodeOutput(report, ui={"text": (report,)})


NODES = [Inspect]
