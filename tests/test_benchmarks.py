"""The measuring itself: contestants run in turn, equal results are a condition, memory and time are counted."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch

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


def test_different_results_are_not_compared(measure):
    with pytest.raises(SystemExit, match="toy: the results differ"):
        measure.race("toy", {"wanflow": busy, "peer": lambda: torch.zeros(3)}, rounds=1)
