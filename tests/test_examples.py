"""Every published model's example runs, from its files in a models folder to a video, with small random weights.

The files have the published names and lie where ModelScope's tools put them; nothing is downloaded.
"""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from comfyui_wanflow.nodes.headless.cli import main
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.loading.catalog import CATALOG
from comfyui_wanflow.wan_core.models.dit import DiT, DiTLayout
from comfyui_wanflow.wan_core.models.embedders import MotionController
from comfyui_wanflow.wan_core.models.image_encoder import ImageEncoder, ImageEncoderLayout
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.video import save_video
from PIL import Image
from safetensors.torch import save_file

API = Path(__file__).resolve().parents[1] / "example_workflows" / "api"
EXAMPLES = sorted(path for path in API.glob("*.json") if path.stem != "quickstart")  # which test_text_to_video.py runs
ROWS = [row for row in CATALOG if row.name != "WanTiny-T2V"]
DIM, LAYERS = 128, 2


def layout_of(row):
    """A small layout with all that the catalog says of the model."""
    has = set(row.adapters)
    in_dim = 48 if "control" in has else 32 if "camera" in has else 36 if "image" in has else 16
    return DiTLayout(
        dim=DIM, ffn_dim=64, layers=LAYERS, heads=1, in_dim=in_dim, image_tokens="image" in has,
        image_positions=514 if "FLF2V" in row.name else 0, reference="reference" in has,
        camera_channels=24 if "camera" in has else 0,
    )  # fmt: skip


def random_weights(*modules):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for module in modules for name, tensor in module.state_dict().items()}
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}


def parts_of(row):
    """The modules of each of the model's files."""
    vace = [VACE(VACELayout(dim=DIM, ffn_dim=64, layers=1, heads=1))] if "vace" in row.adapters else []
    return {
        "dit": [DiT(layout_of(row)), *vace],
        "text_encoder": [UMT5Encoder(UMT5Layout(3, 4096, attention_dim=8, ffn_dim=16, heads=2, layers=1))],
        "vae": [VideoVAE(8)],
        "image_encoder": [ImageEncoder(ImageEncoderLayout(mlp_dim=8, layers=1))],
        "motion_controller": [MotionController(256, DIM)],
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The files of every published model, each source once."""
    models = tmp_path_factory.mktemp("models")
    for row in ROWS:
        parts = parts_of(row)
        for kind, source in row.files.items():
            path = models / source.model_id / source.pattern.replace("*", "")
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "tokenizer":
                path.mkdir()
                words = tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, "<unk>")
                tokenizers.Tokenizer(words).save(str(path / "tokenizer.json"))
                continue
            weights = random_weights(*parts[kind])
            if kind == "image_encoder":  # the block and the tower that are not used
                weights |= {"visual.transformer.1.norm1.bias": torch.zeros(1280), "textual.head": torch.zeros(2)}
            save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return models


@pytest.fixture
def run(models, tmp_path, monkeypatch, capsys):
    """`run(workflow, *more arguments)` -> the exit status, the file that was saved, and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANFLOW_COMPUTE_DTYPE", "float32")
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
    return [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]


def test_every_model_has_an_example():
    assert {row.name for row in ROWS} <= {workflow.stem for workflow in EXAMPLES}


@pytest.mark.parametrize("workflow", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(run, workflow):
    status, files, error = run(workflow, *small(workflow))
    assert status == 0, error
    frames = sorted(files[-1].parent.glob("*.png"))
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
