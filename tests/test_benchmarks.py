"""The measuring itself: contestants run in turn, equal results are a condition, memory and time are counted."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "measure.py"
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by Linux's /proc")


@pytest.fixture(scope="module")
def measure():
    specification = importlib.util.spec_from_file_location("benchmark_measure", FILE)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def busy(seconds=0.0, megabytes=0):
    begin = time.process_time()
    held = torch.ones(megabytes, 1 << 18)
    while time.process_time() - begin < seconds:
        pass
    del held
    return torch.ones(3)


def test_medians_of_time_and_memory(measure):
    results = measure.race("toy", {"wanflow": busy, "peer": lambda: busy(0.05, 100)}, rounds=3)
    ours, peer = results
    assert (ours.library, peer.library, ours.error) == ("wanflow", "peer", 0)
    assert len(peer.samples) == 3
    assert peer.cpu_seconds >= 0.05 > ours.cpu_seconds
    assert 90 < peer.peak_mb < 150 and ours.peak_mb < 50


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", FILE.parent / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)
    specification.loader.exec_module(module)
    return module


def test_cases_of_memory_are_networks_of_true_width(monkeypatch, tmp_path):
    memory = load("memory", monkeypatch)
    for cases in (memory.CPU, memory.CUDA):
        assert len({case.name for case in cases}) == len(cases)
    case = next(case for case in memory.CPU if case.beside == "vace")
    trunk = memory.on_meta(memory.makers(case)[0])
    assert trunk.blocks[0].ffn[0].weight.shape == (8960, 1536)
    small = memory.write_random(tmp_path / "small.safetensors", [torch.nn.Linear(3, 5)], torch.bfloat16)
    assert {name: tensor.shape for name, tensor in load_file(small).items()} == {"weight": (5, 3), "bias": (5,)}


def test_streaming_says_that_it_needs_a_card(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    load("memory", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["streaming.py"])
    with pytest.raises(SystemExit, match="There is no CUDA card here"):
        load("streaming", monkeypatch).main()


def test_different_results_are_not_compared(measure):
    with pytest.raises(SystemExit, match="toy: the results differ"):
        measure.race("toy", {"wanflow": busy, "peer": lambda: torch.zeros(3)}, rounds=1)
