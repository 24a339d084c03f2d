"""The host: ComfyUI when it has already started, this machine's files and terminal when it has not.

Nodes write `from .host import host, io` and know nothing else of where they run. ComfyUI is recognised by modules that
it has imported before it loads packs; it is never tried, so that a ComfyUI lying on `sys.path` changes nothing.
"""

import sys

if "folder_paths" in sys.modules and "comfy.model_management" in sys.modules:
    from .comfy import ComfyExtension, host, io
else:
    from . import schema as io
    from .schema import ComfyExtension
    from .standalone import host

__all__ = ["ComfyExtension", "host", "io"]
