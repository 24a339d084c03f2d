"""A whole run, from words to a file: ours, and diffusers' pipeline (G6)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import contestants
import numpy as np
import torch
from comfyui_wanflow.nodes.host.standalone import StandaloneHost
from comfyui_wanflow.wan_core.loading.load import load_model, load_text_encoder, load_vae
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.sampling.loop import Settings, draw_noise, sample, working_room
from comfyui_wanflow.wan_core.video import save_video
from measure import OURS, Workload, race
from memory import PROMPT, tokenizer_folder
from random_weights import on_meta, write_random
from setting import Setting
from torch import Tensor, nn

NEGATIVE = "a blurred picture"
IN_BF16 = 5e-2  # what pixels may differ by, after all steps


class Models:
    """The networks of a run, and their files of random numbers."""

    def __init__(self, setting: Setting):
        self.setting = setting
        layout = setting.layout("1.3B")
        self.words = UMT5Layout(300, attention_dim=64, ffn_dim=64, heads=1, layers=1) if setting.toy else UMT5Layout()
        folder = setting.folder / f"pipeline {layout.dim}"
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = tokenizer_folder(folder)
        makers = {
            "text": lambda: UMT5Encoder(self.words),
            "dit": lambda: DiT(layout),
            "vae": lambda: VideoVAE(setting.vae_width),
        }
        self.files = {
            name: write_random(folder / f"{name}.safetensors", [on_meta(make)], torch.bfloat16)
            for name, make in makers.items()
        }


def ours(models: Models, shape: tuple[int, ...], settings: Settings, file: Path):
    device, host = models.setting.device, StandaloneHost()
    text = load_text_encoder(models.files["text"], device=device, tokenizer=str(models.tokenizer))
    model, vae = load_model(models.files["dit"], device=device), load_vae(models.files["vae"], device=device)

    def run() -> Tensor:
        with host.attached(text, text.working_room(PROMPT)):
            positive, negative = (text.encode([words])[0] for words in (PROMPT, NEGATIVE))
        with host.attached(model, working_room(model, shape, settings)):
            latent = sample(model, positive, negative, torch.zeros(shape), settings)
        frames = (vae.decode(latent)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 3, 0)
        save_video(frames, file)
        return frames

    return run


def diffusers(models: Models, shape: tuple[int, ...], settings: Settings, file: Path):
    """The transformer and the text encoder in the type that ours take, the VAE in fp32, as its documentation does."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    class Euler(FlowMatchEulerDiscreteScheduler):
        """With the noise levels of Wan's own code: evenly spaced from 1 to 0, then shifted."""

        def set_timesteps(self, num_inference_steps, device=None):
            super().set_timesteps(sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1], device=device)

    device = models.setting.device
    vae = AutoencoderKLWan(base_dim=models.setting.vae_width)
    vae.load_state_dict(contestants.in_diffusers_names(load_vae(models.files["vae"], device="cpu").module, vae))
    pipe = WanPipeline(
        tokenizer=their_tokenizer(models.tokenizer), text_encoder=their_text_encoder(models), vae=vae.to(device),
        transformer=contestants.diffusers_dit(load_model(models.files["dit"], device="cpu").trunk).to(device),
        scheduler=Euler(shift=settings.shift),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        _, _, frames, height, width = shape
        result = pipe(
            prompt=PROMPT, negative_prompt=NEGATIVE, height=height * 8, width=width * 8, num_frames=4 * frames - 3,
            num_inference_steps=settings.steps, guidance_scale=settings.cfg, output_type="pt",
            latents=draw_noise(shape, 0, settings).to(device),
        )  # fmt: skip
        images = result.frames[0].permute(0, 2, 3, 1).float().cpu()
        save_video(images, file)
        return images

    return run


def their_tokenizer(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>")


def their_text_encoder(models: Models):
    from transformers import UMT5Config, UMT5EncoderModel

    layout, device = models.words, models.setting.device
    with contestants.without_numbers():
        theirs = UMT5EncoderModel(UMT5Config(
            vocab_size=layout.vocabulary, d_model=layout.dim, d_kv=layout.attention_dim // layout.heads,
            d_ff=layout.ffn_dim, num_layers=layout.layers, num_heads=layout.heads, feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        ))  # fmt: skip
    ours = load_text_encoder(models.files["text"], device="cpu", tokenizer=str(models.tokenizer)).module
    theirs.load_state_dict(contestants.in_diffusers_names(ours, theirs), assign=True, strict=False)
    theirs.set_input_embeddings(nn.Embedding.from_pretrained(ours.token_embedding.weight))  # it has them twice
    return theirs.to(device, models.setting.dtype)


def g6(setting: Setting) -> list[Workload]:
    """10 steps with guidance, 480 x 832, 81 frames."""
    models = Models(setting)
    shape, settings = (1, 16, *setting.grid(81, 480, 832)), Settings(0, 2 if setting.toy else 10)
    with tempfile.TemporaryDirectory() as folder:
        racing = {OURS: ours(models, shape, settings, Path(folder) / "ours.mp4")}
        if contestants.installed("diffusers"):
            racing["diffusers"] = diffusers(models, shape, settings, Path(folder) / "theirs.mp4")
        name = f"1.3B from words to a file, {4 * shape[2] - 3} frames, {settings.steps} steps"
        results = race(name, racing, setting.rounds, IN_BF16, device=setting.device)
    return [Workload(name, results, target=0.6, time=setting.time)]
