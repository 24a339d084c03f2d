"""The bundled WanTiny shows what its captions say. `python -m comfyui_wanflow.wan_core.tiny.evaluate` measures it on
64 held-out samples; here a few of them have to do."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comfyui_wanflow.wan_core import tiny
from comfyui_wanflow.wan_core.tiny import evaluate
from comfyui_wanflow.wan_core.tiny.perform import Studio
from comfyui_wanflow.wan_core.tiny.tasks import FACTS, TASKS, fact_scores, samples

WEIGHTS = Path(tiny.__file__).parent / "weights"
GIVEN = samples(TASKS["I2V"], 10, seed=1, held_out=True)  # whose shapes all move
CAPTIONS = [sample.captions[0] for sample in GIVEN]


@pytest.fixture(scope="module")
def studio():
    return Studio.of("T2V")


@pytest.fixture(scope="module")
def videos(studio):
    return studio.videos(CAPTIONS)


def test_published_names_in_less_than_the_allowed_megabytes():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sorted(path.relative_to(WEIGHTS).as_posix() for path in files) == [
        "Wan2.1_VAE.safetensors",
        "WanTiny-T2V-4steps.safetensors",
        "diffusion_pytorch_model.safetensors",
        "google/umt5-xxl/tokenizer.json",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
    ]
    assert sum(path.stat().st_size for path in files) <= 45_000_000


@pytest.mark.parametrize("fact", FACTS)
def test_held_out_captions_are_followed(videos, fact):
    assert fact_scores(videos, GIVEN)[fact] >= 0.9


def test_the_negative_prompt_and_guidance_matter(studio, videos):
    unguided = replace(studio, settings=replace(studio.settings, cfg=1.0)).videos(CAPTIONS[:2])
    assert np.abs(unguided - videos[:2]).mean() > 1e-3


@pytest.mark.parametrize("frames", [9, 17])
def test_unseen_clips_survive_the_vae(studio, frames):
    assert evaluate.reconstruction(studio.encoders.vae, 4, frames) >= 30
