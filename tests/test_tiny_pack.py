"""Trained WanTiny models become a bundle in which nothing is stored twice, and load from it as they were trained."""

import shutil
from dataclasses import replace

import pytest
import torch
from comfyui_wanflow.wan_core.loading.load import add_module, load_model
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.embedders import MotionController
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.tiny.pack import ALONE, MODEL, MODELS, pack
from safetensors import safe_open
from safetensors.torch import load_file, save_file

LAYOUT = DiTLayout(dim=128, ffn_dim=32, layers=2, heads=1, text_dim=16, frequency_dim=16)
LOOKS = {"image_tokens": True, "image_features": 8}
TRAININGS = {
    "InP": {"in_dim": 36, **LOOKS},
    "FLF2V": {"in_dim": 36, "image_positions": 514, **LOOKS},
    "Control-Reference": {"in_dim": 48, "reference": True, **LOOKS},
    "Control-Camera": {"in_dim": 32, "camera_channels": 24, **LOOKS},
}
FROM_T2V = ("text_embedding.", "time_", "blocks.0.")  # what the other trainings leave as it is


def random(module, generator):
    return {name: torch.randn(x.shape, generator=generator) for name, x in module.state_dict().items()}


@pytest.fixture(scope="module")
def trained():
    """The weights of each training in fp32."""
    generator = torch.Generator().manual_seed(0)
    t2v = random(DiT(LAYOUT), generator)
    weights = {"T2V": t2v}
    for name, more in TRAININGS.items():
        own = random(DiT(replace(LAYOUT, **more)), generator)
        weights[name] = own | {key: x for key, x in t2v.items() if key.startswith(FROM_T2V)}
    weights["VACE"] = random(VACE(VACELayout(dim=128, ffn_dim=32, layers=1, heads=1)), generator)
    weights["Speed"] = random(MotionController(16, 128), generator)
    return weights


@pytest.fixture(scope="module")
def out(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("out")
    for name, weights in trained.items():
        (folder / name).mkdir()
        save_file(weights, folder / name / MODEL, {"task": name})
    (folder / "google/umt5-xxl").mkdir(parents=True)
    (folder / "google/umt5-xxl/tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def packed(out, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "weights"
    pack(out, folder)
    return folder


@pytest.mark.parametrize("bundled", MODELS, ids=lambda bundled: bundled.folder or "T2V")
def test_a_folder_loads_as_it_was_trained(packed, trained, bundled):
    wanted = {name: x for training in bundled.trainings for name, x in trained[training].items()}
    model = load_model(packed / bundled.folder, device="cpu")
    found = {name.partition(".")[2]: x for name, x in model.module.state_dict().items()}  # without "trunk." and "vace."
    assert found.keys() == {name for name in wanted if not name.startswith(bundled.without)}
    assert all(torch.equal(x, wanted[name].half()) for name, x in found.items())


def test_speed_control_is_added_to_the_model(packed, trained):
    model = add_module(load_model(packed, device="cpu"), packed / "speedcontrol/model.safetensors")
    found = model.module.motion_controller.state_dict()
    assert found.keys() == trained["Speed"].keys()
    assert all(torch.equal(x, trained["Speed"][name].half()) for name, x in found.items())


def test_nothing_is_stored_twice(packed, trained):
    stored = {file.parent.name: set(load_file(file)) for file in packed.rglob(MODEL)}
    assert stored.keys() == {"weights", "Fun-InP", "FLF2V", "Fun-V1.1-Control", "Fun-V1.1-Control-Camera", "VACE"}
    assert stored["VACE"] == trained["VACE"].keys()
    assert stored["FLF2V"] == trained["FLF2V"].keys() - {name for name in trained["T2V"] if name.startswith(FROM_T2V)}
    assert not (packed / f"{MODEL}.index.json").exists()  # T2V takes nothing of others


def test_what_a_training_says_of_itself_stays(packed):
    with safe_open(packed / "Fun-InP" / MODEL, "pt") as file:
        assert file.metadata() == {"format": "pt", "task": "InP"}


def test_what_is_not_trained_is_left_out_and_told(out, tmp_path):
    shutil.copytree(out, tmp_path / "out")
    absent = [f"{task}/{MODEL}" for task in ("Speed", "FLF2V")]
    for file in absent:
        (tmp_path / "out" / file).unlink()
    weights = tmp_path / "weights"
    (weights / "FLF2V").mkdir(parents=True)
    (weights / "FLF2V" / MODEL).touch()  # of an earlier family
    missing = pack(tmp_path / "out", weights)
    assert set(missing) == {*absent, *(name for name in ALONE.values() if not name.startswith("Speed"))}
    assert not (weights / "FLF2V").exists() and not (weights / "speedcontrol").exists()
    load_model(weights / "I2V")
