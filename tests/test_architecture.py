"""The rules that hold the house together, read from the source."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for top in ("nodes", "wan_core") for file in (ROOT / top).rglob("*.py"))

# wan_core from the ground up: a part may use the floors below it, and nothing beside it.
TOWER = (
    ("errors",),
    ("size", "compute", "fit", "saving", "sheet", "trajectory", "offload", "loading.catalog", "loading.keymaps"),
    ("models", "video", "viewfinder"),
    ("adapters", "lora", "room", "parallel", "sampling.schedules", "sampling.reuse"),
    ("sampling.easycache", "sampling.magcache", "sampling.teacache", "sampling.windows"),
    ("model",),
    ("loading", "sampling"),
    ("training", "planning"),
    ("tiny",),
)
FLOOR = {part: number for number, parts in enumerate(TOWER) for part in parts}
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview",
           "node_helpers", "nodes", "server"}  # fmt: skip
KNOWN_TO_CORE = {"ftfy", "gguf", "imageio_ffmpeg", "numpy", "PIL", "safetensors", "sentencepiece",
                 "tokenizers", "torch"}  # fmt: skip
KNOWN_TO_ATTENTION = {"flash_attn", "flash_attn_interface", "sageattention"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(file: Path) -> tuple[set[str], set[str]]:
    """(our modules, top-level names of others) that a file imports, anywhere in it."""
    package = file.parent.relative_to(ROOT).parts
    ours, others = set(), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = ".".join(part for part in base if part)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                ours.add(whole if whole in MODULES else base)
    return ours, others - set(sys.stdlib_module_names)


def part_of(module: str) -> str | None:
    """The part of the tower a module belongs to: the longest name that fits."""
    name = module.removeprefix("wan_core.")
    fitting = [part for part in FLOOR if name == part or name.startswith(part + ".")]
    return max(fitting, key=len, default=None)


CORE = {module: file for module, file in MODULES.items() if module.startswith("wan_core.")}


def test_every_relative_import_leads_to_a_module():
    for module, file in MODULES.items():
        missing = imports(file)[0] - set(MODULES)
        assert not missing, f"{module} imports {missing}"


@pytest.mark.parametrize("module", CORE)
def test_core_looks_down_only(module):
    part = part_of(module)
    assert part, f"{module} has no place in the tower; give it one"
    for used in imports(CORE[module])[0] - {"wan_core"}:
        assert used.startswith("wan_core."), f"{module} imports {used}: wan_core must not know nodes"
        below = part_of(used)
        assert below == part or FLOOR[below] < FLOOR[part], f"{module} ({part}) imports {used} ({below})"


def test_no_circles():
    graph = {module: imports(file)[0] - {module} for module, file in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_core_knows_torch_and_little_else():
    for module, file in CORE.items():
        known = KNOWN_TO_CORE | (KNOWN_TO_ATTENTION if module == "wan_core.models.attention" else set())
        assert imports(file)[1] <= known, f"{module} imports {imports(file)[1] - known}"


@pytest.mark.parametrize("part, known", [("offload", {"torch"}), ("size", set()), ("loading.catalog", set())])
def test_parts_that_need_hardly_anything(part, known):
    for module, file in CORE.items():
        if part_of(module) == part:
            ours, others = imports(file)
            assert others <= known, module
            assert {part_of(used) for used in ours} <= {part, "errors"}, module


def test_only_the_host_knows_comfyui():
    for module, file in MODULES.items():
        if not module.startswith("nodes.host"):
            assert not imports(file)[1] & COMFYUI, module


def test_nobody_imports_the_package_by_its_name():
    """Under ComfyUI the package has another name: such an import would make a second copy of everything."""
    for module, file in MODULES.items():
        assert "comfyui_wanflow" not in imports(file)[1], module


def test_the_nodes_do_not_load_the_compiler():
    """It takes seconds, and a decorator of `torch.compiler` is enough."""
    program = (
        "import runpy, sys; runpy.run_path('tests/conftest.py'); import comfyui_wanflow.nodes as nodes; "
        "nodes.node_classes(); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_looking_at_the_pack_is_cheap():
    """ComfyUI's start, and `wanflow --help`, must not wait for torch."""
    program = "import runpy, sys; runpy.run_path('tests/conftest.py'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
