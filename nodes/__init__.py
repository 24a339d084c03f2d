"""The nodes. Importing this is cheap; the classes, and torch with them, are imported when first asked for."""

from __future__ import annotations

import importlib
import logging

MENUS = (
    "load", "text", "condition", "camera", "vace", "modules", "lora", "offload", "library", "speed_up", "sample", "vae",
    "video", "report", "dataset", "train", "grid", "plan",
)  # fmt: skip


def node_classes() -> list[type]:
    """Every node class, in menu order."""
    menus = (importlib.import_module(f".{name}", __package__) for name in MENUS)
    return [node for menu in menus for node in menu.NODES]


async def comfy_entrypoint():
    """What ComfyUI calls after loading the pack; it returns the pack's nodes."""
    try:
        from .host import ComfyExtension

        class WanFlow(ComfyExtension):
            async def get_node_list(self) -> list[type]:
                return node_classes()

        return WanFlow()
    except Exception:
        # ComfyUI prints only the exception's message; whoever has to mend it needs the traceback.
        logging.getLogger(__name__).exception("WanFlow could not be loaded")
        raise
