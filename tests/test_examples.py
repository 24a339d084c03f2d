"""Every published model's example runs, from its files in a models folder to a video, with small random weights.

The files have the published names and lie where ModelScope's tools put them; nothing is downloaded.
"""

import json
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.nodes.headless.cli import main
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.loading.catalog import PUBLISHED
from comfyui_wanflow.wan_core.video import save_video
from PIL import Image
from published import write_models

API = Path(__file__).resolve().parents[1] / "example_workflows" / "api"
EXAMPLES = sorted(path for path in API.glob("*.json") if path.stem != "quickstart")  # which test_text_to_video.py runs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture
def run(models, tmp_path, monkeypatch, capsys):
    """`run(workflow, *more arguments)` -> the exit status, the file that was saved, and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANFLOW_OFFLINE", "1")
    for name in ("models_dir", "output_directory", "input_directory", "quiet"):
        monkeypatch.setattr(host, name, getattr(host, name))  # to be put back
    (tmp_path / "input").mkdir()
    Image.new("RGBA", (40, 40), (200, 30, 30, 255)).save(tmp_path / "input" / "picture.png")
    save_video(torch.rand(3, 32, 48, 3), tmp_path / "input" / "video.webp", 16.0)

    def run(workflow, *arguments):
        folders = ["--models-dir", str(models), "--input-dir", "input", "--output-dir", "out"]
        status = main(["run", str(workflow), *folders, *arguments])
        printed = capsys.readouterr()
        return status, [Path(line) for line in printed.out.splitlines()], printed.err

    return run


def small(workflow, **settings):
    """The arguments that make an example cheap: small pictures, a short clip, one step."""
    settings = {"6.width": 48, "6.height": 32, "6.num_frames": 5, "7.steps": 1, "9.format": "png"} | settings
    for id, node in json.loads(workflow.read_text(encoding="utf-8")).items():
        if node["class_type"] == "WanFlowLoadVideo":
            settings |= {f"{id}.video": "video.webp", f"{id}.size": "48x32"}
        elif node["class_type"] in ("LoadImage", "LoadImageMask"):
            settings[f"{id}.image"] = "picture.png"
        elif node["class_type"] == "WanFlowDataset":
            settings |= {f"{id}.size": "32x32", f"{id}.num_frames": 5}
        elif node["class_type"] == "WanFlowTrain":
            settings |= {f"{id}.max_steps": 1}
    return [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]


def test_every_model_has_an_example():
    assert {row.name for row in PUBLISHED} <= {workflow.stem for workflow in EXAMPLES}


@pytest.mark.parametrize("workflow", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(run, workflow):
    status, files, error = run(workflow, *small(workflow))
    assert status == 0, error
    frames = sorted(file for file in files if file.suffix == ".png")
    assert [Image.open(frame).size for frame in frames] == [(48, 32)] * 5


@pytest.mark.parametrize(
    "name, model, sentence",
    [
        ("Wan2.1-I2V-14B-480P", "Wan2.1-T2V-1.3B", "takes no first or last image (it is a Text to Video model"),
        ("Wan2.1-Fun-1.3B-Control", "Wan2.1-Fun-1.3B-InP", "takes no control video"),
        ("Wan2.1-T2V-1.3B", "Wan2.1-I2V-14B-480P", "Connect Wan First / Last Image"),
        ("Wan2.1-I2V-14B-480P", "Wan2.1-VACE-1.3B", "Give it to Wan VACE in place of Wan First / Last Image"),
    ],
)
def test_another_models_example_is_refused_in_a_sentence(run, name, model, sentence):
    workflow = API / f"{name}.json"
    status, files, error = run(workflow, *small(workflow, **{"1.model": model}))
    assert status == 1 and not files
    assert sentence in error and "Traceback" not in error
