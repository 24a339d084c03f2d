"""Graphs with pictures in them, from the command to the frames, with small random weights in a models folder."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from comfyui_wanflow.nodes.headless.cli import main
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.models.dit import DiT, DiTLayout
from comfyui_wanflow.wan_core.models.image_encoder import ImageEncoder, ImageEncoderLayout
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from PIL import Image
from safetensors.torch import save_file

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat"]
DITS = {
    "t2v": {},
    "i2v": {"in_dim": 36, "image_tokens": True},
    "flf2v": {"in_dim": 36, "image_tokens": True, "image_positions": 514},
    "control": {"in_dim": 48, "image_tokens": True, "reference": True},
}


def save_random(module, path, extra=()):
    generator = torch.Generator().manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.randn(t.shape, generator=generator) * 0.05 for name, t in module.state_dict().items()}
    save_file(tensors | dict(extra), path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A ComfyUI models folder with small files of each kind."""
    models = tmp_path_factory.mktemp("models")
    for name, options in DITS.items():
        layout = DiTLayout(dim=128, ffn_dim=64, layers=1, heads=1, **options)
        save_random(DiT(layout), models / f"diffusion_models/{name}.safetensors")
    umt5 = UMT5Layout(vocabulary=len(WORDS), dim=4096, attention_dim=8, ffn_dim=16, heads=2, layers=1)
    save_random(UMT5Encoder(umt5), models / "text_encoders/toy.safetensors")
    save_random(VideoVAE(8), models / "vae/toy.safetensors")
    clip = ImageEncoderLayout(dim=1280, mlp_dim=8, heads=16, layers=1, patch=14, side=224)
    last = {"visual.transformer.1.norm1.bias": torch.zeros(1280)}  # of the block that is not used
    save_random(ImageEncoder(clip), models / "clip_vision/toy.safetensors", last)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(WORDS, range(5), strict=True)), "<unk>"))
    (models / "text_encoders" / "google" / "umt5-xxl").mkdir(parents=True)
    tokenizer.save(str(models / "text_encoders" / "google" / "umt5-xxl" / "tokenizer.json"))
    return models


def graph(model, conditions):
    """A workflow for one model; `conditions` maps node ids to nodes, the last of them goes to the sampler."""

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    files = {"weight_dtype": "auto"}
    return {
        "model": node("WanFlowLoadModel", model=f"{model}.safetensors", attention="auto", **files),
        "text_encoder": node("WanFlowLoadTextEncoder", text_encoder="toy.safetensors", **files),
        "vae": node("WanFlowLoadVAE", vae="toy.safetensors", **files),
        "clip": node("WanFlowLoadImageEncoder", image_encoder="toy.safetensors", **files),
        "prompt": node("WanFlowTextEncode", text_encoder=["text_encoder", 0], text="a cat"),
        "latent": node("WanFlowEmptyLatent", width=48, height=32, num_frames=5, batch_size=1),
        "picture": node("LoadImage", image="cat.png"),
        **{id: node(kind, vae=["vae", 0], latent=["latent", 0], **inputs) for id, (kind, inputs) in conditions.items()},
        "sampler": node(
            "WanFlowSampler", model=["model", 0], positive=["prompt", 0], latent=["latent", 0], seed=1,
            rand_device="cpu", steps=1, cfg=1.0, cfg_merge=False, shift=3.0, scheduler="euler", denoise=1.0,
            **({"conditions": [list(conditions)[-1], 0]} if conditions else {}),
        ),
        "decode": node(
            "WanFlowVAEDecode", vae=["vae", 0], latent=["sampler", 0], tiled=False, tile_size="30x52",
            tile_stride="15x26",
        ),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="frames"),
    }  # fmt: skip


@pytest.fixture
def run(models, tmp_path, monkeypatch, capsys):
    """Runs a graph; the exit status, the paths of the frames, and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANFLOW_COMPUTE_DTYPE", "float32")
    for name in ("models_dir", "output_directory", "input_directory", "quiet"):
        monkeypatch.setattr(host, name, getattr(host, name))  # to be put back
    (tmp_path / "input").mkdir()
    Image.new("RGBA", (40, 40), (200, 30, 30, 255)).save(tmp_path / "input" / "cat.png")

    def run(model, conditions):
        (tmp_path / "graph.json").write_text(json.dumps(graph(model, conditions)))
        folders = ["--models-dir", str(models), "--input-dir", str(tmp_path / "input"), "--output-dir", "out"]
        status = main(["run", "graph.json", *folders])
        printed = capsys.readouterr()
        return status, [Path(line) for line in printed.out.splitlines()], printed.err

    return run


PICTURE, CLIP = ["picture", 0], ["clip", 0]
FIRST = ("WanFlowImageToVideo", {"fit": "cover", "start_image": PICTURE, "image_encoder": CLIP})
BOTH = ("WanFlowImageToVideo", {**FIRST[1], "end_image": PICTURE})
CONTROL = ("WanFlowControlVideo", {"fit": "stretch", "extend": "hold", "control_video": PICTURE})
REFERENCE = ("WanFlowReferenceImage", {"fit": "contain", "image": PICTURE, "image_encoder": CLIP})


def chained(*conditions):
    """Each condition node takes the one before it."""
    nodes = {}
    for number, (kind, inputs) in enumerate(conditions):
        before = {"conditions": [f"condition {number - 1}", 0]} if number else {}
        nodes[f"condition {number}"] = (kind, inputs | before)
    return nodes


@pytest.mark.parametrize(
    "model, conditions",
    [("i2v", chained(FIRST)), ("flf2v", chained(BOTH)), ("control", chained(FIRST, CONTROL, REFERENCE))],
    ids=["first image", "first and last image", "control, first image and reference"],
)
def test_a_video_comes_out(run, model, conditions):
    status, files, error = run(model, conditions)
    assert status == 0, error
    assert [Image.open(file).size for file in files] == [(48, 32)] * 5
    assert "40x40 were fitted to 48x32" in error


def test_what_does_not_fit_is_a_sentence(run):
    status, files, error = run("t2v", chained(FIRST))
    assert status == 1 and not files and "takes no first or last image" in error and "Traceback" not in error
    status, files, error = run("i2v", {})
    assert status == 1 and not files and "Connect Wan First / Last Image" in error and "Traceback" not in error
