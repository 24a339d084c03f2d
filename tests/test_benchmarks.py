"""The measuring itself: contestants run in turn, equal results are a condition, memory and time are counted."""

import importlib
import importlib.util
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.tiny.perform import Studio
from comfyui_wanflow.wan_core.tiny.tasks import TASKS
from comfyui_wanflow.wan_core.trajectory import Trajectory
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


@pytest.fixture
def suite(monkeypatch):
    """The benchmarks' modules, found as their scripts find each other."""
    monkeypatch.syspath_prepend(str(FILE.parent))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FILE.parent) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_operations_are_those_that_were_counted(suite):
    """Published sizes: tera-operations of a forward, and of the VAE's encoder and decoder."""
    floors, setting = suite("floors"), suite("setting").Setting(torch.device("cpu"), 1)
    for model, tokens, expected in (("1.3B", 32760, 283.0), ("14B", 32760, 1678.4), ("14B", 75600, 6523.4)):
        assert floors.dit_operations(setting.layout(model), tokens) / 1e12 == pytest.approx(expected, abs=0.05)
    assert floors.vae_operations(81, 720, 1280)[0] / 1e12 == pytest.approx(381.7, abs=0.05)
    assert floors.vae_operations(81, 720, 1280)[1] / 1e12 == pytest.approx(639.2, abs=0.05)


@pytest.mark.parametrize("row", ["C1", "C5", "C8", "G5", "G7"])
def test_a_row_is_measured_and_told(suite, monkeypatch, tmp_path, row):
    report, setting = suite("report"), suite("setting").Setting(torch.device("cpu"), 1, toy=True, folder=tmp_path)
    workloads = suite("cpu" if row[0] == "C" else "gpu").ROWS[row](setting)
    assert all(workload.found > 0 and workload.ours.cpu_seconds > 0 for workload in workloads)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- cpu: written by benchmarks/report.py -->\nold\n<!-- end of cpu -->\nafter\n")
    (tmp_path / "docs").mkdir()
    for name, value in {"RESULTS": tmp_path, "ROOT": tmp_path, "PAGES": (page,)}.items():
        monkeypatch.setattr(report, name, value)
    report.keep("cpu", row, {"facts": {"commit": "abc"}, "workloads": [asdict(workload) for workload in workloads]})
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert workloads[0].name in text and "commit abc" in text
    assert ET.parse(tmp_path / "docs" / "speed_cpu_time.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("name", ["FLF2V", "Control-Reference", "Control-Camera", "VACE", "Speed"])
def test_a_data_set_brings_what_its_task_is_given(suite, tmp_path, name):
    """Files and a table become the task's own conditions, but for what the files lose."""
    concept, studio = suite("concept"), Studio.of(name)
    given = concept.drawn(name, concept.concept_facts()[0], 4, 0)
    concept.write_data(tmp_path / "data", name, given)
    examples = concept.examples_of(tmp_path, name, studio)
    assert len(examples) == len(given)
    for example, sample in zip(map(examples.__getitem__, range(4)), given, strict=True):
        wanted = {type(one): one for one in TASKS[name].conditions(sample, studio.encoders)}
        assert {type(one) for one in example.conditions} == wanted.keys()
        for found in example.conditions:
            for key, value in vars(found).items():
                alike(value, vars(wanted[type(found)])[key])


def alike(found, wanted):
    if isinstance(wanted, torch.Tensor):
        assert found.shape == wanted.shape and (found - wanted).norm() <= 0.4 * wanted.norm()
    elif isinstance(wanted, Trajectory):
        assert torch.equal(found.poses, wanted.poses)
    else:
        assert found == wanted


def test_the_fastest_other_library_counts(measure):
    results = [measure.Result(name, seconds, seconds, 1, 0, []) for name, seconds in
               (("wanflow", 1.0), ("wanflow, compiled", 0.5), ("slow", 4.0), ("fast", 2.0))]  # fmt: skip
    assert measure.Workload("w", results).found == 0.5
    assert measure.Workload("w", results, against=("slow",)).found == 0.25
    assert measure.Workload("w", results, figure=7.0, unit="µs").found == 7.0


def test_different_results_are_not_compared(measure):
    with pytest.raises(SystemExit, match="toy: the results differ"):
        measure.race("toy", {"wanflow": busy, "peer": lambda: torch.zeros(3)}, rounds=1)
