"""WanFlow: Wan 2.1 video models for ComfyUI and the command line. This file is what ComfyUI loads."""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY"]

if __package__:  # pytest also imports this file bare, as a module without a package
    from .nodes import comfy_entrypoint

    __all__ += ["comfy_entrypoint"]
