"""Modules that stand beside a model, and the motion speed that one of them takes (menus loaders and conditions)."""

from __future__ import annotations

from ..wan_core.adapters.speed import HIGHEST_SPEED, SpeedCondition
from ..wan_core.loading import catalog
from ..wan_core.loading.load import add_module
from .condition import conditions_input, conditions_output
from .host import host, io
from .library import library_input, library_of
from .load import chosen, files_input
from .wires import WanModel


class AddModule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        published = [row.name for row in catalog.CATALOG if {"vace", "speed"} & set(row.adapters)]
        return io.Schema(
            node_id="WanFlowAddModule",
            display_name="Add Wan Module (VACE, speed)",
            category="WanFlow/loaders",
            description="Puts a VACE module or a motion speed controller beside a model of the same size. "
            "The model's own weights are shared, not copied.",
            inputs=[
                WanModel.Input("model", tooltip="From Load Wan Model: a T2V model, or one tuned from it."),
                io.Combo.Input(
                    "module",
                    options=list(dict.fromkeys([*published, *host.model_files("diffusion_models")])),
                    default="Wan2.1-VACE-1.3B",
                    tooltip="A catalogued module, or a file in models/diffusion_models. Of a whole VACE model the "
                    "VACE part is taken.",
                ),
                files_input(),
                library_input(),
            ],
            outputs=[WanModel.Output(display_name="model", tooltip="For Wan Sampler.")],
        )

    @classmethod
    def execute(cls, model, module, files="", library=None):
        source = chosen("diffusion_models", module, files)
        return io.NodeOutput(add_module(model, source, library=library_of("diffusion_models", library)))


class MotionSpeed(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowMotionSpeed",
            display_name="Wan Motion Speed",
            category="WanFlow/conditions",
            description="Sets how much the picture moves. For models with a motion speed controller "
            "(Add Wan Module, Wan2.1-1.3b-speedcontrol-v1).",
            inputs=[
                io.Int.Input(
                    "motion_bucket_id",
                    default=50,
                    min=0,
                    max=HIGHEST_SPEED,
                    tooltip="0: hardly any motion; 100: much.",
                ),
                conditions_input(),
            ],
            outputs=[conditions_output()],
        )

    @classmethod
    def execute(cls, motion_bucket_id, conditions=()):
        return io.NodeOutput((*conditions, SpeedCondition(motion_bucket_id)))


NODES = [AddModule, MotionSpeed]
