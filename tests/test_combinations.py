"""Every pair of conditions on every family of models: it runs and tells, or a sentence says why not."""

import itertools
import math

import pytest
import torch
from comfyui_wanflow.wan_core.errors import WanError
from comfyui_wanflow.wan_core.sampling.teacache import TeaCache
from comfyui_wanflow.wan_core.sampling.windows import Windows
from families import CONDITIONS, FAMILIES, model, relative_error, video

IMAGES = {"start image", "end image", "start and end image"}
TAKES = {
    "T2V": set(),
    "I2V": IMAGES,
    "FLF2V": IMAGES,
    "Control": {*IMAGES, "control video"},
    "Control V1.1": {*IMAGES, "control video", "reference image"},
    "Camera": {"start image", "camera"},
    "VACE": {"VACE video", "VACE pictures"},
    "speed": {"motion speed"},
    "VACE and speed": {"VACE video", "VACE pictures", "motion speed"},
}
FRAMES = {*IMAGES, "control video"}  # one of these at least, where a model reads something beside the latents
ADVICE = ("Load ", "Remove ", "remove ", "Connect ", "Add ", "Give ")


def is_legal(family, names):
    """What the models were made for, and one of each kind; VACE adds up, with one set of pictures."""
    images = [name for name in names if name in IMAGES]
    others = [name for name in names if name not in {*IMAGES, "VACE video"}]
    once = len(images) <= 1 and len(others) == len(set(others))
    enough = not TAKES[family] & FRAMES or FRAMES & set(names)
    return bool(once and enough and set(names) <= TAKES[family])


def test_nothing_is_forgotten():
    assert set(TAKES) == set(FAMILIES) and set().union(*TAKES.values()) == set(CONDITIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair(family):
    wan, made = model(family), {}
    names = list(CONDITIONS)
    for chosen in [(), *((name,) for name in names), *itertools.combinations_with_replacement(names, 2)]:
        if is_legal(family, chosen):
            made[chosen] = video(wan, *chosen, steps=1, cfg=1.0)
            assert made[chosen].isfinite().all(), chosen
        else:
            with pytest.raises(WanError) as refused:
                video(wan, *chosen, steps=1, cfg=1.0)
            sentence = str(refused.value)
            assert sentence.endswith(".") and any(word in sentence for word in ADVICE), (chosen, sentence)
    assert made
    for first, second in itertools.combinations(made, 2):
        assert relative_error(made[first], made[second]) > 1e-5, f"{first} makes what {second} makes"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_at_once_in_every_way_of_sampling(family):
    """With merged guidance, windows, a cache and several videos, the order of the conditions makes no difference."""
    wan = model(family)
    chosen = max(
        (names for n in range(5) for names in itertools.combinations(CONDITIONS, n) if is_legal(family, names)), key=len
    )
    cached = wan.with_windows(Windows(3, 2)).with_cache(TeaCache(0.3, "DiffSynth", "T2V-1.3B"))
    plain = video(cached, *chosen, steps=4)
    assert relative_error(video(cached, *reversed(chosen), steps=4), plain) < 1e-5
    assert relative_error(video(cached, *chosen, steps=4, cfg_merge=True), plain) < 1e-5
    latent = torch.randn(2, *plain.shape[1:], generator=torch.Generator().manual_seed(3))
    again = video(cached, *chosen, steps=4, latent=latent, denoise=0.5)
    assert again.shape == latent.shape and math.isfinite(again.sum())
