"""The CLIP image encoder against a recorded run and transformers, and loading it."""

import json
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.errors import FileError, ModelError
from comfyui_wanflow.wan_core.loading.load import load_image_encoder
from comfyui_wanflow.wan_core.models.image_encoder import ImageEncoder, ImageEncoderLayout
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

GOLDEN = Path(__file__).parent / "data" / "golden" / "clip_visual.safetensors"
TINY = {"hidden_size": 160, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 56, "patch_size": 14, "hidden_act": "gelu"}  # fmt: skip


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def test_equals_the_recorded_reference():
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}
    weights = {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}
    layout = ImageEncoderLayout(  # heads cannot be read from the shapes: the recorded model has heads of 8
        config["dim"], weights["visual.transformer.0.mlp.0.weight"].shape[0], config["num_heads"],
        config["num_layers"] - 1, config["patch_size"], config["image_size"],
    )  # fmt: skip
    encoder = ImageEncoder(layout)
    encoder.load_state_dict({name: value for name, value in weights.items() if layout.reads(name)})
    with torch.inference_mode():
        got = encoder.visual(tensors["in.image"])
    assert relative_error(got, tensors["out.penultimate"]) < 1e-5


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**TINY)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, parameter.shape[-1] ** -0.5)
    return model


def published(model):
    """transformers' weights under the published names, with the parts Wan does not use."""
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in model.state_dict().items()}
    found = {
        "visual.cls_embedding": weights["embeddings.class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": weights["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": weights["embeddings.patch_embedding.weight"],
        "visual.head": torch.zeros(TINY["hidden_size"], 8),
        "textual.token_embedding.weight": torch.zeros(4, 8),
        "log_scale": torch.zeros(()),
    }
    renamed = [("self_attn.out_proj", "attn.proj"), ("layer_norm", "norm"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2")]
    for kind in ("weight", "bias"):
        found[f"visual.pre_norm.{kind}"] = weights[f"pre_layrnorm.{kind}"]
        found[f"visual.post_norm.{kind}"] = weights[f"post_layernorm.{kind}"]
        for i in range(TINY["num_hidden_layers"]):
            layer = f"encoder.layers.{i}."
            qkv = [weights[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"visual.transformer.{i}.attn.to_qkv.{kind}"] = torch.cat(qkv)
            for name in ("self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                ours = name
                for old, new in renamed:
                    ours = ours.replace(old, new)
                found[f"visual.transformer.{i}.{ours}.{kind}"] = weights[f"{layer}{name}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def test_a_file_becomes_an_encoder_equal_to_transformers(theirs, tmp_path):
    save_file(published(theirs), tmp_path / "clip.safetensors")
    engine = load_image_encoder(tmp_path / "clip.safetensors", device="cpu")
    assert engine.module.layout == ImageEncoderLayout(160, 96, 2, 2, 14, 56)
    torch.manual_seed(1)
    images = torch.rand(2, 48, 80, 3)
    got = engine.encode(images)
    with torch.inference_mode():
        pixels = engine.module.prepared(images)
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
    assert got.shape == (2, 17, 160) and relative_error(got, expected) < 1e-5
    halves = load_image_encoder(tmp_path / "clip.safetensors", "bf16", device="cpu")
    assert 1e-5 < relative_error(halves.encode(images), expected) < 0.05


def test_pictures_are_stretched_and_given_the_colours_of_clip():
    encoder = ImageEncoder(ImageEncoderLayout(80, 8, 1, 1, 14, 28))
    column = torch.linspace(0, 1, 56)[None, :, None, None].expand(1, 56, 112, 3)
    prepared = encoder.prepared(column)  # (1, 3, 28, 28)
    assert prepared.shape == (1, 3, 28, 28)
    torch.testing.assert_close(prepared[..., :1].expand_as(prepared), prepared)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(prepared.mean((2, 3))[0], (0.5 - mean) / deviation)


def test_true_size_and_other_files(theirs, tmp_path):
    with torch.device("meta"):
        published_size = ImageEncoder(ImageEncoderLayout())
    assert len(published_size.state_dict()) == 392 - 12 - 3  # less the last block, and the end after it
    assert sum(p.numel() for p in published_size.parameters()) == 611_086_080
    weights = published(theirs)
    missing = {name: tensor for name, tensor in weights.items() if name != "visual.transformer.1.mlp.2.bias"}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(FileError, match=r"lacks visual\.transformer\.1\.mlp\.2\.bias"):
        load_image_encoder(tmp_path / "missing.safetensors", device="cpu")
    with pytest.raises(ModelError, match="width 1024"):
        ImageEncoderLayout.from_shapes({
            "visual.patch_embedding.weight": (1024, 3, 14, 14), "visual.pos_embedding": (1, 257, 1024),
            "visual.transformer.0.mlp.0.weight": (4096, 1024),
        })  # fmt: skip
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FileError, match="'Load Wan Image Encoder' needs a CLIP image encoder"):
        load_image_encoder(tmp_path / "other.safetensors", device="cpu")
