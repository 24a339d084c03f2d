"""ComfyUI's memory manager with our weights and another pack's on one small card. Run by test_comfyui.py.

The card is not there: "cpu:0" is to torch and to ComfyUI another place than "cpu", with the numbers at hand.
"""

import importlib
import importlib.util
import sys

import torch

CARD, SIZE = torch.device("cpu:0"), 4 * 2**20
QUARTER_MIB = 256 * 256 * 4  # of one layer


def start(comfyui: str):
    """ComfyUI's memory manager on the card."""
    sys.argv = ["comfyui", "--cpu"]
    sys.path.insert(0, comfyui)
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("folder_paths")
    manager = importlib.import_module("comfy.model_management")

    def free(device=None, torch_free_too=False):
        left = SIZE - sum(entry.model.loaded_size() for entry in manager.current_loaded_models)
        return (left, 0) if torch_free_too else left

    manager.get_free_memory = free
    manager.is_device_cpu = lambda device: False
    manager.get_torch_device = lambda: CARD
    manager.get_all_torch_devices = lambda *_: [CARD]
    manager.minimum_inference_memory = manager.extra_reserved_memory = lambda: 0
    manager.vram_state = manager.VRAMState.NORMAL_VRAM
    return manager


def load_pack(root: str) -> None:
    spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])


def layers(count: int) -> torch.nn.Module:
    return torch.nn.ModuleList(torch.nn.Linear(256, 256, bias=False) for _ in range(count)).requires_grad_(False)


def main(comfyui: str, root: str) -> None:
    manager = start(comfyui)
    load_pack(root)
    host = importlib.import_module("pack.nodes.host").host
    engine_of = importlib.import_module("pack.wan_core.model").Engine
    residency_of = importlib.import_module("pack.wan_core.offload.residency").Residency
    patcher_of = importlib.import_module("comfy.model_patcher").ModelPatcher

    module = layers(8)
    place = {"device": CARD, "compute_dtype": torch.float32, "residency": residency_of(module)}
    ours, our_size = engine_of(module=module, name="ours", **place), 8 * QUARTER_MIB
    theirs, their_size = patcher_of(layers(10), CARD, torch.device("cpu")), 10 * QUARTER_MIB

    manager.load_models_gpu([theirs])
    assert theirs.loaded_size() == their_size
    with host.attached(ours):  # theirs have to go, in part at least
        assert ours.resident_bytes() == our_size and theirs.loaded_size() <= SIZE - our_size
    manager.unload_all_models()
    assert ours.resident_bytes() == theirs.loaded_size() == 0 and manager.loaded_models() == []

    with host.attached(ours):
        pass
    manager.load_models_gpu([theirs])  # now ours have to go, in part at least
    assert theirs.loaded_size() == their_size and ours.resident_bytes() <= SIZE - their_size

    with host.attached(ours):
        before = ours.resident_bytes()
        assert ours.relieve()  # memory ran out in our run: theirs go altogether, ours stay
        assert theirs.loaded_size() == 0 and 0 < ours.resident_bytes() == before
        assert [type(patcher).__name__ for patcher in manager.loaded_models()] == ["EnginePatcher"]
        assert ours.relieve() and ours.resident_bytes() <= before / 2  # then half of ours
    manager.unload_all_models()
    assert ours.resident_bytes() == 0 and manager.loaded_models() == []


if __name__ == "__main__":
    main(*sys.argv[1:])
