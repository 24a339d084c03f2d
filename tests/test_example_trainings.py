"""Every published training configuration runs, on the model's small layout and a data set of the toy world."""

import csv
import json
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.example_trainings.build import FOLDER, configs
from comfyui_wanflow.nodes.headless.cli import main
from comfyui_wanflow.nodes.headless.train_config import config_file, read_config
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.loading.catalog import PUBLISHED
from comfyui_wanflow.wan_core.video import read_video
from published import write_models
from safetensors.torch import load_file
from toy_data import write_data

NAMES = [name.removesuffix(".toml") for name in configs()]
TABLES = ("", "_control", "_reference_control", "_camera_control", "_vace", "_motion_bucket_id")
SMALL = ["--height", "16", "--width", "16", "--num_frames", "5", "--dataset_repeat", "1", "--max_train_steps", "2",
         "--skip_download", "--cache_path", "cache"]  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with all models, and the data where the configurations look for it."""
    folder = tmp_path_factory.mktemp("workplace")
    write_models(folder / "models")
    data = folder / "data" / "example_video_dataset"
    data.mkdir(parents=True)
    rows = json.loads(write_data(data).read_text())
    for table in TABLES:
        with (data / f"metadata{table}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.fixture(autouse=True)
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    for name in ("models_dir", "output_directory", "quiet"):
        monkeypatch.setattr(host, name, getattr(host, name))  # to be put back


def test_the_files_are_what_the_catalog_says():
    on_disk = {str(file.relative_to(FOLDER)): file.read_text() for file in FOLDER.rglob("*.toml")}
    assert on_disk == configs(), "run python -m comfyui_wanflow.example_trainings.build"
    assert len(on_disk) == 2 * len(PUBLISHED) == 38


@pytest.mark.parametrize(
    "name, expected",
    [
        ("full/Wan2.1-T2V-1.3B", {"learning_rate": 1e-5, "num_epochs": 2, "trainable_models": ["dit"]}),
        ("lora/Wan2.1-T2V-1.3B", {"learning_rate": 1e-4, "num_epochs": 5, "lora_base_model": ["dit"]}),
        ("lora/Wan2.1-I2V-14B-720P", {"height": 720, "num_frames": 49, "use_gradient_checkpointing_offload": True}),
        ("full/Wan2.1-FLF2V-14B-720P", {"height": 480, "extra_inputs": ["input_image", "end_image"]}),
        ("lora/Wan2.1-Fun-V1.1-1.3B-Control-Camera", {"learning_rate": 1e-5}),
        ("full/Wan2.1-VACE-1.3B", {"trainable_models": ["vace"], "learning_rate": 1e-4, "num_frames": 49}),
        ("lora/Wan2.1-VACE-14B", {"lora_base_model": ["vace"], "num_frames": 17}),
        ("full/Wan2.1-1.3b-speedcontrol-v1", {"trainable_models": ["motion_controller"]}),
    ],
)
def test_what_the_reference_s_scripts_say(name, expected):
    values = {key: value for part in read_config(config_file(name)).values() for key, value in part.items()}
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_two_steps(capsys, name):
    assert main(["train", "--config", name, *SMALL]) == 0, capsys.readouterr().err
    (line,) = capsys.readouterr().out.split()
    assert Path(line).parent.name == f"{name.split('/')[1]}_{name.split('/')[0]}"
    names = set(load_file(line))
    if name.startswith("lora"):
        part = "vace_blocks" if "VACE" in name else "blocks"
        assert f"diffusion_model.{part}.0.self_attn.q.lora_A.weight" in names
    else:
        own = {"VACE": "vace_patch_embedding.weight", "speed": "linear.0.weight"}
        assert next((own[word] for word in own if word in name), "patch_embedding.weight") in names


@pytest.mark.parametrize("name", ["lora/Wan2.1-Fun-V1.1-1.3B-Control", "full/Wan2.1-VACE-1.3B",
    "full/Wan2.1-1.3b-speedcontrol-v1", "full/Wan2.1-Fun-V1.1-1.3B-Control-Camera"])  # fmt: skip
def test_the_result_is_validated(capsys, name):
    """By one command, from the same configuration; what was trained shows."""
    few = ["--num_inference_steps", "1", "--cfg_scale", "1"]
    strong = ["--learning_rate", "0.01", "--output_path", f"strong/{name}"]
    assert main(["train", "--config", name, *SMALL, *strong]) == 0
    (result,) = capsys.readouterr().out.split()
    videos = []
    for rate in ("0", "0.01"):  # the first keeps what it begins with
        place = ["--output_path", f"validated/{rate}/{name}", "--result", result]
        if rate == "0":
            other = ["--learning_rate", "1e-12", "--output_path", f"weak/{name}"]
            assert main(["train", "--config", name, *SMALL, *other]) == 0
            place[3] = capsys.readouterr().out.split()[0]
        assert main(["validate", "--config", name, *SMALL, *few, *place]) == 0, capsys.readouterr().err
        (video,) = capsys.readouterr().out.split()
        videos.append(read_video(Path(video))[0])
    assert videos[0].shape == (5, 16, 16, 3) and not torch.equal(*videos)
