"""Loads this checkout under the name `comfyui_wanflow`, whatever its folder is called.

The root must not be on `sys.path`: its `nodes` would hide ComfyUI's module of that name.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the processors
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which they ignore, and so would the programs they start
# What the processor is fast in must not change what the tests see; those of the choice itself remove this.
os.environ["WANFLOW_COMPUTE_DTYPE"] = "float32"

ROOT = Path(__file__).resolve().parents[1]
NAME = "comfyui_wanflow"

specification = importlib.util.spec_from_file_location(
    NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
)
package = importlib.util.module_from_spec(specification)
sys.modules[NAME] = package
specification.loader.exec_module(package)


@pytest.fixture(autouse=True)
def compiled_code_is_forgotten():
    """torch compiles a piece of code only so many times in a process, and then runs it as it is, without a word."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
