"""The bundled WanTiny shows what its captions say. `python -m comfyui_wanflow.wan_core.tiny.evaluate` measures it on
all 64 held-out captions; here a few of them have to do."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comfyui_wanflow.wan_core import tiny
from comfyui_wanflow.wan_core.loading.load import load_model, load_text_encoder, load_vae
from comfyui_wanflow.wan_core.tiny import evaluate

WEIGHTS = Path(tiny.__file__).parent / "weights"
CAPTIONS = 10


@pytest.fixture(scope="module")
def engines():
    return load_model("WanTiny-T2V"), load_text_encoder("WanTiny-T2V"), load_vae("WanTiny-T2V")


@pytest.fixture(scope="module")
def videos(engines):
    return evaluate.make_videos(*engines, evaluate.held_out_facts(CAPTIONS))


def test_published_names_in_fifteen_megabytes():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(WEIGHTS).as_posix() for path in files) == [
        "Wan2.1_VAE.safetensors",
        "diffusion_pytorch_model.safetensors",
        "google/umt5-xxl/tokenizer.json",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
    ]
    assert sum(path.stat().st_size for path in files) <= 15_000_000


@pytest.mark.parametrize("fact", ["color", "direction", "background"])  # which shape it is stays blurred
def test_held_out_captions_are_followed(videos, fact):
    shares = evaluate.scores(videos, evaluate.held_out_facts(CAPTIONS))
    assert shares[fact] >= 0.9


def test_the_negative_prompt_and_guidance_matter(engines, videos):
    facts = evaluate.held_out_facts(2)
    settings = replace(evaluate.SETTINGS, cfg=1.0)
    unguided = evaluate.make_videos(*engines, facts, settings)
    assert np.abs(unguided - videos[:2]).mean() > 1e-3


@pytest.mark.parametrize("frames", [9, 17])
def test_unseen_clips_survive_the_vae(engines, frames):
    assert evaluate.reconstruction_psnr(engines[2], 4, frames) >= 26
