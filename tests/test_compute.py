"""The compute type follows what the processor does fast, is measured once, and can be set by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core import compute
from comfyui_wanflow.wan_core.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, no wish from outside, nothing remembered in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compute.OVERRIDE, raising=False)
    compute.bf16_gain.cache_clear()
    yield tmp_path / "wanflow" / "bf16_gain.json"
    compute.bf16_gain.cache_clear()


@pytest.mark.parametrize("gain, expected", [(0.2, torch.float32), (1.4, torch.float32), (1.6, torch.bfloat16)])
def test_cpu_takes_bf16_only_where_it_is_clearly_faster(monkeypatch, gain, expected):
    monkeypatch.setattr(compute, "measure_bf16_gain", lambda: gain)
    assert compute.compute_dtype("cpu") == expected


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_graphics_cards_take_bf16_without_a_measurement(monkeypatch, device):
    monkeypatch.setattr(compute, "measure_bf16_gain", lambda: pytest.fail("measured"))
    assert compute.compute_dtype(device) == torch.bfloat16


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv(compute.OVERRIDE, "float16")
    assert compute.compute_dtype("cpu") == compute.compute_dtype("cuda") == torch.float16
    monkeypatch.setenv(compute.OVERRIDE, "int8")
    with pytest.raises(InputError, match="WANFLOW_COMPUTE_DTYPE is 'int8'. Set it to one of float32"):
        compute.compute_dtype("cpu")


def test_measured_once_a_machine(monkeypatch, own_cache):
    measured = []
    monkeypatch.setattr(compute, "measure_bf16_gain", lambda: measured.append(1) or 3.0)
    for _ in range(2):
        compute.bf16_gain.cache_clear()  # as a new process would begin
        assert compute.bf16_gain() == 3.0
    assert len(measured) == 1
    assert list(json.loads(own_cache.read_text()).values()) == [3.0]


@pytest.mark.parametrize("damage", ["", "[1, 2]", '{"a": null}'])
def test_a_damaged_cache_is_measured_again(monkeypatch, own_cache, damage):
    own_cache.parent.mkdir()
    own_cache.write_text(damage)
    monkeypatch.setattr(compute, "measure_bf16_gain", lambda: 2.0)
    assert compute.bf16_gain() == 2.0


def test_a_home_that_cannot_be_written_is_no_error(monkeypatch, own_cache):
    own_cache.parent.write_text("a file where the folder should be")
    monkeypatch.setattr(compute, "measure_bf16_gain", lambda: 2.0)
    assert compute.bf16_gain() == 2.0


def test_the_measurement_is_real_and_changes_no_setting():
    threads = torch.get_num_threads()
    assert 0 < compute.measure_bf16_gain() < 1000
    assert torch.get_num_threads() == threads


def test_default_device_is_one_that_works():
    assert torch.ones(1, device=compute.default_device()).item() == 1


def test_importing_asks_for_no_gpu():
    """In a fresh process in which any question to CUDA is an error."""
    code = (
        "import runpy, torch; runpy.run_path('tests/conftest.py');"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = lambda: exit('CUDA was asked');"
        "import comfyui_wanflow.wan_core.sampling.loop, comfyui_wanflow.wan_core.loading.load"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_free_memory():
    """Of main memory what is left of it, where the system tells; of devices without a memory of their own nothing."""
    free = compute.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert compute.free_memory(torch.device("meta")) is None
