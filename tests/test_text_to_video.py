"""The quickstart graph from the command to the mp4, with small random weights that are found in a models folder."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from comfyui_wanflow.nodes.headless.cli import main
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.video import read_video
from safetensors.torch import save_file

QUICKSTART = Path(__file__).resolve().parents[1] / "example_workflows" / "api" / "quickstart.json"
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "circle"]


def save_random(module, path):
    generator = torch.Generator().manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in module.state_dict().items()}, path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A ComfyUI models folder with one small file of each kind."""
    models = tmp_path_factory.mktemp("models")
    save_random(DiT(DiTLayout(dim=128, ffn_dim=64, layers=1, heads=1)), models / "diffusion_models/toy.safetensors")
    umt5 = UMT5Layout(vocabulary=len(WORDS), dim=4096, attention_dim=8, ffn_dim=16, heads=2, layers=1)
    save_random(UMT5Encoder(umt5), models / "text_encoders/toy.safetensors")
    save_random(VideoVAE(8), models / "vae/toy.safetensors")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (models / "text_encoders" / "google" / "umt5-xxl").mkdir(parents=True)
    tokenizer.save(str(models / "text_encoders" / "google" / "umt5-xxl" / "tokenizer.json"))
    return models


@pytest.fixture
def run(models, tmp_path, monkeypatch, capsys):
    """Runs the graph with further arguments; the exit status, lines of stdout, and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("models_dir", "output_directory", "quiet"):
        monkeypatch.setattr(host, name, getattr(host, name))  # to be put back
    ids = {node["class_type"]: id for id, node in json.loads(QUICKSTART.read_text()).items()}
    settings = {"WanFlowLoadModel.model": "toy.safetensors", "WanFlowLoadTextEncoder.text_encoder": "toy.safetensors",
                "WanFlowLoadVAE.vae": "toy.safetensors", "WanFlowSampler.steps": 2, "WanFlowEmptyLatent.num_frames": 5}

    def run(**changes):
        changed = settings | {name.replace("__", "."): value for name, value in changes.items()}
        arguments = []
        for name, value in changed.items():
            node, _, input_name = name.partition(".")
            arguments += ["--set", f"{ids[node]}.{input_name}={value}"]
        status = main(["run", str(QUICKSTART), "--models-dir", str(models), "--output-dir", "out", *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err

    return run


def test_a_video_comes_out(run):
    status, lines, error = run()
    assert status == 0, error
    assert "2/2" in error
    frames, rate = read_video(Path(lines[-1]))
    assert Path(lines[-1]).suffix == ".mp4" and frames.shape == (5, 64, 64, 3) and rate == 8


def test_the_same_seed_gives_the_same_pixels(run):
    videos = [read_video(Path(run(WanFlowSampler__seed=seed)[1][-1]))[0] for seed in (1, 1, 2)]
    assert torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[0], videos[2])


def test_odd_sizes_are_rounded_up_and_said_once(run):
    status, lines, error = run(WanFlowEmptyLatent__width=50, WanFlowEmptyLatent__num_frames=3)
    assert status == 0, error
    assert read_video(Path(lines[-1]))[0].shape == (5, 64, 64, 3)
    assert error.count("multiple of 16") + error.count("multiples of 16") == 1, error


@pytest.mark.parametrize("change, status, sentence", [
    ({"WanFlowLoadModel__files": "none.safetensors"}, 1, "There is no file none.safetensors"),
    ({"WanFlowLoadModel__files": "{models}/text_encoders/toy.safetensors"}, 1, "Load Wan Text Encoder"),
    ({"WanFlowLoadTextEncoder__files": "{models}/vae/toy.safetensors"}, 1, "Load Wan VAE"),
    ({"WanFlowLoadVAE__files": "{models}/diffusion_models/toy.safetensors"}, 1, "Load Wan Model"),
    ({"WanFlowLoadVAE__vae": "toi.safetensors"}, 2, "did you mean 'toy.safetensors'?"),
    ({"WanFlowSampler__steps": 0}, 2, "it takes INT from 1"),
    ({"WanFlowEmptyLatent__width": -16}, 2, "it takes INT from 16"),
])
def test_a_mistake_gets_its_sentence(run, models, change, status, sentence):
    found, lines, error = run(**{name: str(value).format(models=models) for name, value in change.items()})
    assert found == status and lines == []
    assert sentence in error and "Traceback" not in error
