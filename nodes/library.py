"""Where published models lie and come from (menu loaders)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..wan_core.loading.download import PLAIN, Library
from .host import host, io
from .host.standalone import MODEL_FOLDERS
from .wires import WanLibrary


def library_of(folder: str, choices: Library | None = None) -> Library:
    """The host's folders, that for a kind of model first, as the user of Wan Model Library wants them used.

    All are searched: whole repositories lie wherever people have room.
    """
    choices = choices or replace(PLAIN, local_model_path=host.models_dir)
    folders = dict.fromkeys(path for kind in (folder, *MODEL_FOLDERS) for path in host.model_folders(kind))
    return replace(choices, folders=tuple(folders), say=host.say, progress=download_progress)


def download_progress(megabytes: int):
    return host.progress(megabytes, unit="MB")


def library_input() -> io.Custom.Input:
    tooltip = "From Wan Model Library: where models are downloaded to, or that none are."
    return WanLibrary.Input("library", optional=True, tooltip=tooltip)


class ModelLibrary(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowLibrary",
            display_name="Wan Model Library",
            category="WanFlow/loaders",
            description="Sets where published models are downloaded to, or that nothing is downloaded. Without it they "
            "go to the models folder, and only what is on no model folder is fetched.",
            inputs=[
                io.String.Input(
                    "local_model_path",
                    default="",
                    tooltip="Downloads go to <organisation>/<name> in this folder. Empty: the models folder.",
                ),
                io.Boolean.Input(
                    "skip_download", default=False, tooltip="Never contact ModelScope: what is missing is an error."
                ),
                io.Boolean.Input(
                    "redirect_common_files",
                    default=True,
                    tooltip="Text encoder, VAE and image encoder are the same in all Wan 2.1 repositories: take them "
                    "from one, so that they are downloaded once.",
                ),
            ],
            outputs=[WanLibrary.Output(display_name="library", tooltip="For the loaders.")],
        )

    @classmethod
    def execute(cls, local_model_path, skip_download, redirect_common_files):
        folder = Path(local_model_path.strip()) if local_model_path.strip() else host.models_dir
        return io.NodeOutput(Library((), folder, skip_download, redirect_common_files))


NODES = [ModelLibrary]
