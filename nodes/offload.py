"""Where weights rest and how much of a graphics card they may take (menu loaders)."""

from __future__ import annotations

from ..wan_core.offload.options import REST_DTYPES, REST_ON, Offload
from .host import io
from .wires import WanOffload

GIB = 1024**3


class OffloadOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowOffload",
            display_name="Wan Offload",
            category="WanFlow/loaders",
            description="Sets where a model's weights rest and how much of the graphics card's memory they may take. "
            "Without it WanFlow decides by the memory that is free.",
            inputs=[
                io.Combo.Input(
                    "rest_on",
                    options=list(REST_ON),
                    default="disk",
                    tooltip="Where weights wait that are not on the card. cpu: in main memory, read once. "
                    "disk: in their file, of which the system remembers as much as it has memory for.",
                ),
                io.Combo.Input(
                    "rest_dtype",
                    options=list(REST_DTYPES),
                    default="auto",
                    tooltip="The type they are kept in there (see Load Wan Model). auto: as weight_dtype says. Another "
                    "type than the file's means, on disk, a second file, which is written once.",
                ),
                io.Float.Input(
                    "vram_limit_gb",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    round=0.01,
                    tooltip="How much of the card's memory may be in use, by all programs together, in GiB. 0: all.",
                ),
                io.Float.Input(
                    "vram_buffer_gb",
                    default=0.5,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    round=0.01,
                    tooltip="GiB of the limit that are left free.",
                ),
                io.Int.Input(
                    "num_persistent_params",
                    default=-1,
                    min=-1,
                    max=10**12,
                    tooltip="How many parameters stay on the card, in place of the limit. -1: by the limit.",
                ),
            ],
            outputs=[WanOffload.Output(display_name="offload", tooltip="For Load Wan Model and the other loaders.")],
        )

    @classmethod
    def execute(cls, rest_on, rest_dtype, vram_limit_gb, vram_buffer_gb, num_persistent_params):
        options = Offload(
            rest_on=rest_on,
            rest_dtype=rest_dtype,
            vram_limit=int(vram_limit_gb * GIB) or None,
            vram_buffer=int(vram_buffer_gb * GIB),
            persistent=None if num_persistent_params < 0 else num_persistent_params,
        )
        return io.NodeOutput(options)


NODES = [OffloadOptions]
