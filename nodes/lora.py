"""LoRAs: changes to a model, applied while it runs (menu loaders), and saved (menu training)."""

from __future__ import annotations

from pathlib import Path

from ..wan_core.errors import InputError
from ..wan_core.loading.catalog import LORAS
from ..wan_core.loading.download import fetch
from ..wan_core.loading.lora_files import KEY_FORMATS, PARTS, load_lora, save_lora
from ..wan_core.lora import fit, report
from .host import host, io
from .library import library_of
from .wires import WanLora, WanModel

NONE = "none"


def lora_file(name: str) -> Path:
    return fetch(LORAS[name], library_of("loras"))[0] if name in LORAS else host.find_model("loras", name)


class ApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowApplyLora",
            display_name="Apply Wan LoRA",
            category="WanFlow/loaders",
            description="Changes a model by a LoRA, of any program and kind. Put several in a row to combine them. "
            "The model's weights stay as they are, so another strength loads nothing.",
            inputs=[
                WanModel.Input("model", tooltip="From Load Wan Model, Add Wan Module or another Apply Wan LoRA."),
                io.Combo.Input(
                    "lora_name",
                    options=[NONE, *LORAS, *host.model_files("loras")],
                    default=NONE,
                    tooltip="A file in models/loras, or the built-in one for WanTiny. none leaves the model as it is.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    tooltip="1 as trained, 0 without effect; negative values do the opposite.",
                ),
                WanLora.Input("lora", optional=True, tooltip="A LoRA from a node, in place of a file."),
                io.Combo.Input(
                    "part",
                    options=list(PARTS),
                    optional=True,
                    default="auto",
                    tooltip="Whose blocks the file changes: the model's own or VACE's. Needed only where its names do "
                    "not tell and auto is wrong, which the report says.",
                ),
            ],
            outputs=[
                WanModel.Output(display_name="model", tooltip="For Wan Sampler."),
                io.String.Output(
                    display_name="report", tooltip="How much of the LoRA fits the model, and what does not."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, lora_name, strength, lora=None, part="auto"):
        if lora is None and lora_name == NONE:
            return io.NodeOutput(model, "No LoRA was chosen: the model stays as it is.")
        lora = lora or load_lora(lora_file(lora_name), part)
        changed = model.with_lora(lora, strength)
        text = report(lora, fit(lora, changed.module), strength)
        host.say(text)
        return io.NodeOutput(changed, text)


class SaveLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowSaveLora",
            display_name="Save Wan LoRA",
            category="WanFlow/training",
            description="Saves a LoRA where every LoRA loader finds it, under the names of the program that shall "
            "load it.",
            is_output_node=True,
            inputs=[
                WanLora.Input("lora", tooltip="From Wan Train."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/WanFlow",
                    tooltip="Name below the output folder; a number is added. LoRA loaders list what is in loras "
                    "there, after R was pressed.",
                ),
                io.Combo.Input(
                    "key_format",
                    options=list(KEY_FORMATS),
                    default="comfyui",
                    tooltip="Whose names to use. comfyui is read by ComfyUI, diffusers and WanFlow.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The path of the saved file.")],
        )

    @classmethod
    def execute(cls, lora, filename_prefix, key_format):
        if lora is None:
            raise InputError(
                "There is no LoRA to save: Wan Train was run in mode full, whose result is a whole model. Its files "
                "are in the folder that Wan Train names."
            )
        target = host.output_path(filename_prefix, "safetensors")
        save_lora(lora, target.path, key_format)
        saved = {"filename": target.filename, "subfolder": target.subfolder, "type": "output"}
        return io.NodeOutput(str(target.path), ui={"loras": [saved]})


NODES = [ApplyLora, SaveLora]
