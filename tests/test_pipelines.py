"""Whole runs, from pictures and noise to pixels, against diffusers' pipelines with the same small random weights."""

import numpy as np
import pytest
import torch
from comfyui_wanflow.wan_core.adapters.image import image_condition
from comfyui_wanflow.wan_core.loading.load import load_model, load_vae
from comfyui_wanflow.wan_core.sampling.loop import Settings, draw_noise, sample
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

WIDTH, HEIGHT, FRAMES = 48, 32, 9
SIZE = (3, 4, 6)  # T, h, w of such a video's latents
SETTINGS = Settings(seed=3, steps=3, cfg=4.0, shift=3.0)
TEXT_DIM = 24


class Euler(FlowMatchEulerDiscreteScheduler):
    """With the noise levels of Wan's own code: evenly spaced from 1 to 0, then shifted."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1], device=device)


def seeded(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith(("weight", "gamma")) else 0.0
        fan_in = max(1, parameter[0].numel())
        parameter.data.normal_(mean, 0.1 if parameter.ndim == 1 else fan_in**-0.5, generator=generator)
    return module.eval().requires_grad_(False)


def transformer(**options):
    return seeded(WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=TEXT_DIM, freq_dim=32, ffn_dim=64, num_layers=2,
        cross_attn_norm=True, **options,
    ), seed=0)  # fmt: skip


IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 128}


@pytest.fixture(scope="module")
def their_vae():
    return seeded(AutoencoderKLWan(base_dim=8, z_dim=16), seed=1)


@pytest.fixture
def run(their_vae, tmp_path):
    """`run(pipeline class, transformer, …)` -> our pixels and diffusers', (FRAMES, 3, HEIGHT, WIDTH) in 0..1."""

    def run(kind, theirs, start=None, end=None, features=None):
        theirs.save_pretrained(tmp_path / "transformer")
        their_vae.save_pretrained(tmp_path / "vae")
        model, vae = load_model(tmp_path / "transformer", device="cpu"), load_vae(tmp_path / "vae", device="cpu")
        generator = torch.Generator().manual_seed(2)
        positive, negative = (torch.randn(1, 512, TEXT_DIM, generator=generator) for _ in range(2))
        positive[:, 9:], negative[:, 5:] = 0, 0

        conditions = []
        if start is not None:
            looks = iter(features)  # of the start image first
            conditions = [image_condition(start, end, SIZE, vae.encode, lambda picture: next(looks)[None])]
        latent = torch.zeros(1, 16, *SIZE)
        raw = sample(model, positive, negative, latent, SETTINGS, conditions)
        ours = (vae.decode(raw) / 2 + 0.5).clamp(0, 1)[0].movedim(1, 0)

        pipeline = kind(
            tokenizer=None, text_encoder=None, vae=their_vae, transformer=theirs, scheduler=Euler(shift=SETTINGS.shift)
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.encode_image = lambda images, device: features
        pictures = {"image": start, "last_image": end}
        pictures = {name: picture.movedim(-1, 1) for name, picture in pictures.items() if picture is not None}
        result = pipeline(
            prompt_embeds=positive, negative_prompt_embeds=negative, height=HEIGHT, width=WIDTH, num_frames=FRAMES,
            num_inference_steps=SETTINGS.steps, guidance_scale=SETTINGS.cfg, output_type="pt",
            latents=draw_noise(latent.shape, 0, SETTINGS), **pictures,
        )  # fmt: skip
        return ours, result.frames[0]

    return run


def check(ours, theirs):
    assert ours.shape == theirs.shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert theirs.std() > 0.05  # a picture, not one colour
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5


def random(*shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_text_to_video(run):
    check(*run(WanPipeline, transformer()))


def test_image_to_video(run):
    start, features = random(1, HEIGHT, WIDTH, 3, seed=4), random(1, 257, 1280, seed=5)
    check(*run(WanImageToVideoPipeline, transformer(**IMAGE), start, None, features))


def test_first_and_last_frame_to_video(run):
    start, end = random(1, HEIGHT, WIDTH, 3, seed=4), random(1, HEIGHT, WIDTH, 3, seed=6)
    features = random(2, 257, 1280, seed=5)
    theirs = transformer(**IMAGE, pos_embed_seq_len=514)
    check(*run(WanImageToVideoPipeline, theirs, start, end, features))
