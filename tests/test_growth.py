"""Nothing is left behind: the memory of fifty runs does not grow."""

import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest
from comfyui_wanflow.nodes.headless import cli

STATUS = Path("/proc/self/statm")
QUICKSTART = Path(__file__).resolve().parents[1] / "example_workflows/api/quickstart.json"
RUNS, SETTLED = 50, 15  # what libraries load and allocators keep for good is there after some runs


def resident_bytes() -> int:
    return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells the memory of a process in /proc")
def test_fifty_runs_take_no_more_memory_than_the_first(tmp_path):
    """Each loads all models anew, samples, decodes and saves."""
    graph = json.loads(QUICKSTART.read_text())
    for entry in graph.values():
        small = {"WanFlowSampler": {"steps": 2}, "WanFlowEmptyLatent": {"width": 32, "height": 32, "num_frames": 5}}
        entry["inputs"] |= small.get(entry["class_type"], {})
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    used = []
    for _ in range(RUNS):
        assert cli.main(["run", str(tmp_path / "graph.json"), "--output-dir", str(tmp_path), "--quiet"]) == 0
        gc.collect()
        used.append(resident_bytes())
    growth = np.polyfit(range(RUNS - SETTLED), used[SETTLED:], 1)[0]
    first, last = used[0] / 2**20, used[-1] / 2**20
    print(f"{growth / 1024:.1f} KiB a run; {first:.0f} MiB after the first, {last:.0f} at the end")
    assert growth < 128 * 1024
