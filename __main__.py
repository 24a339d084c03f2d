"""`python -m comfyui_wanflow` is `wanflow`; torchrun starts it so."""

import sys

from .nodes.headless.cli import main

sys.exit(main())
