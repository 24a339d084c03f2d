"""Every published model as files with small random weights, named and laid out as ModelScope's tools do."""

import tokenizers
import torch
from comfyui_wanflow.wan_core.loading.catalog import PUBLISHED
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.embedders import MotionController
from comfyui_wanflow.wan_core.models.image_encoder import ImageEncoder, ImageEncoderLayout
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from safetensors.torch import save_file

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


def write_models(folder):
    """The files of every published model below `folder`, each source once."""
    for row in PUBLISHED:
        parts = parts_of(row)
        for kind, source in row.files.items():
            path = folder / source.model_id / source.pattern.replace("*", "")
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
