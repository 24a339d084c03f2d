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


def test_the_bundle_is_no_larger_than_allowed():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
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


LEAST = {"first frame, dB": 24.0, "last frame, dB": 24.0, "kept, dB": 24.0}  # of few samples: docs/wantiny.md has 64


@pytest.mark.parametrize("name", ["I2V", "FLF2V", "InP", "Control", "Control-Reference", "Control-Camera", "Speed"])
def test_what_is_given_is_followed(name):
    """At least as far as the few samples can tell: five of six, and pictures are kept."""
    given = samples(TASKS[name], 6, seed=1, held_out=True)
    found = TASKS[name].scores(Studio.of(name).perform(TASKS[name], given), given)
    assert len(found) > len(FACTS) - 1
    assert {key: score for key, score in found.items() if score < LEAST.get(key, 0.8)} == {}


def test_vace_keeps_what_is_not_masked_and_paints_what_is_told():
    task = TASKS["VACE"]
    given = [s for s in samples(task, 12, seed=1, held_out=True) if s.given[0] in ("box", "later")]
    found = task.scores(Studio.of("VACE").perform(task, given), given)
    assert len(given) >= 4
    assert {key: score for key, score in found.items() if score < LEAST.get(key, 0.8)} == {}
