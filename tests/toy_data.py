"""A data set of the toy world with a column for every extra input, and small random encoders to prepare it."""

import json

import tokenizers
import torch
from comfyui_wanflow.wan_core.loading.load import load_image_encoder, load_text_encoder, load_vae
from comfyui_wanflow.wan_core.models.image_encoder import ImageEncoder, ImageEncoderLayout
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.tiny import world
from comfyui_wanflow.wan_core.training.examples import Encoders
from comfyui_wanflow.wan_core.video import save_video
from PIL import Image
from safetensors.torch import save_file

SIZE = 32
SCENES = [world.Scene("red", "circle", "up", "blue"), world.Scene("green", "square", "down", "white")]
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "green", "square", "moves"]


def render(scene, frames=9):
    return torch.from_numpy(world.render(scene, frames, SIZE, SIZE))


def write_data(folder):
    """Clips of 9 frames at 16 a second with what may lie beside them, listed in all.json; the path of the table."""
    rows = []
    for number, scene in enumerate(SCENES):
        clip = render(scene)
        save_video(clip, folder / f"clip{number}.mp4", quality=10)
        save_video(clip.mean(3, keepdim=True).expand_as(clip), folder / f"grey{number}.mp4", quality=10)
        mask = torch.zeros_like(clip)
        mask[:, :, SIZE // 2 :] = 1
        save_video(mask, folder / f"mask{number}.mp4", quality=10)
        Image.new("RGB", (40, 24), ("orange", "purple")[number]).save(folder / f"reference{number}.png")
        rows.append({
            "video": f"clip{number}.mp4", "prompt": scene.caption, "control_video": f"grey{number}.mp4",
            "reference_image": f"reference{number}.png", "vace_video": f"grey{number}.mp4",
            "vace_video_mask": f"mask{number}.mp4", "vace_reference_image": f"reference{number}.png",
            "camera_control_direction": ("Left", "Up")[number], "camera_control_speed": 0.01 * (number + 1),
            "motion_bucket_id": 20 + 60 * number,
        })  # fmt: skip
    (folder / "all.json").write_text(json.dumps(rows))
    return folder / "all.json"


def save_random(module, path):
    generator = torch.Generator().manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in module.state_dict().items()}, path)
    return path


def write_encoders(folder):
    """The files of a VAE, a text encoder (of width 8) and an image encoder."""
    umt5 = UMT5Layout(vocabulary=len(WORDS), dim=8, attention_dim=8, ffn_dim=16, heads=2, layers=1)
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    tokenizer.save(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))
    return {
        "vae": save_random(VideoVAE(4), folder / "vae.safetensors"),
        "text": save_random(UMT5Encoder(umt5), folder / "text.safetensors"),
        "image": save_random(ImageEncoder(ImageEncoderLayout(mlp_dim=8, layers=1)), folder / "image.safetensors"),
    }


def load_encoders(files):
    """Those of `write_encoders`."""
    loaders = {"vae": load_vae, "text": load_text_encoder, "image": load_image_encoder}
    return Encoders(*(load(files[name], device="cpu") for name, load in loaders.items()))
