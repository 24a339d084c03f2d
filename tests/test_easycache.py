"""Doing less by what the run itself shows (EasyCache), and guidance in a part of the run only."""

import pytest
import torch
from comfyui_wanflow.nodes.speed_up import CacheByItself, CacheSteps
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.loading.lora_files import load_lora
from comfyui_wanflow.wan_core.sampling import loop
from comfyui_wanflow.wan_core.sampling.easycache import KEPT_LATENTS, EasyCache, Skipping
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample, working_room
from comfyui_wanflow.wan_core.sampling.teacache import TeaCache
from comfyui_wanflow.wan_core.sampling.windows import Windows
from families import model, random, relative_error, video
from safetensors.torch import save_file

BOTH = [EasyCache(0.5), TeaCache(0.3, "DiffSynth", "T2V-1.3B")]
FAMILIES = {
    "T2V": (),
    "I2V": ("start image",),
    "Control V1.1": ("control video", "reference image"),
    "Camera": ("start image", "camera"),
    "VACE": ("VACE pictures",),
    "speed": ("motion speed",),
}


def skipped(heard):
    """How many steps were skipped, by what was said last."""
    return int(heard[-1].split("skipped ")[1].split(" of")[0])


def calls(wan, *conditions, **settings):
    """The video, and how many rows the trunk's first block saw in each call."""
    rows = []
    hook = wan.trunk.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    result = video(wan, *conditions, **settings)
    hook.remove()
    return result, rows


# ---- which steps are left out -----------------------------------------------------------------------------------


def expected_pattern(xs, answers, threshold, first):
    """The rule, written out for numbers: the answers are known for all steps."""
    skips, change, rate, computed = [], 0.0, None, None
    for i, x in enumerate(xs):
        skip = False
        if i >= first and i < len(xs) - 1 and rate is not None and sum(skips[-5:]) < 5:
            change += rate * abs(x - xs[i - 1]) / abs(computed[1])
            skip = change < threshold
        if not skip:
            if computed is not None:
                rate = abs(answers[i] - computed[1]) / abs(x - computed[0])
            computed, change = (x, answers[i]), 0.0
        skips.append(skip)
    return skips


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1, 0.3, 1.0])
def test_skips_while_the_budget_lasts(threshold):
    xs = [4 - 0.15 * i - 0.01 * i * i for i in range(20)]
    answers = [2 + 0.1 * (i % 5) + 0.02 * i for i in range(20)]
    asked = []

    def velocity(x, timestep, step):
        asked.append(step)
        return torch.full((1, 2), answers[step])

    skipping = Skipping(EasyCache(threshold), velocity, [False] + [True] * 19)
    times = [1000 - 40.0 * i - i * i for i in range(20)]
    given = [skipping(torch.full((1, 2), x), torch.tensor([t]), i)[0, 0].item()
             for i, (x, t) in enumerate(zip(xs, times, strict=True))]
    assert skipping.skipped == expected_pattern(xs, answers, threshold, first=4)
    assert asked == [i for i, skip in enumerate(skipping.skipped) if not skip]
    assert not any(skipping.skipped[:4]) and not skipping.skipped[-1]
    assert any(skipping.skipped) == (threshold > 0.02)
    older = last = 0
    for i, skip in enumerate(skipping.skipped):  # half as far as the last two went, then it stays
        older, last = (last, i) if not skip else (older, last)
        slope = (answers[last] - answers[older]) / (times[last] - times[older]) if last else 0.0
        way = max(times[i] - times[last], times[last] - times[older])
        assert given[i] == pytest.approx(answers[last] + slope * way / 2, rel=1e-5)


def test_the_row_that_changes_most_decides():
    """Two videos, of which one stands still: the budget holds for the other too."""
    def run_with(*speeds):
        def velocity(x, timestep, step):
            return torch.tensor([[1 + speed * step] for speed in speeds])

        skipping = Skipping(EasyCache(0.2, start=0.0), velocity, [False] + [True] * 9)
        for i in range(10):
            skipping(torch.tensor([[5.0 - 0.1 * i]] * len(speeds)), torch.tensor([1000.0 - i]), i)
        return skipping.skipped

    assert run_with(0.0, 0.09) == run_with(0.09) != run_with(0.0)


@pytest.mark.parametrize("numbers", [(float("nan"),), (0.0,)])
def test_what_cannot_be_measured_is_computed(numbers):
    skipping = Skipping(EasyCache(9.0, start=0.0), lambda *_: torch.tensor([numbers]), [False] + [True] * 5)
    for i in range(6):
        skipping(torch.tensor([numbers]), torch.tensor([1000.0 - i]), i)
    assert not any(skipping.skipped)


# ---- in a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_allowed_is_the_plain_run_bit_for_bit(family):
    wan = model(family)
    plain = video(wan, *FAMILIES[family], steps=6)
    assert torch.equal(video(wan.with_cache(EasyCache(0.0)), *FAMILIES[family], steps=6), plain)
    assert torch.equal(video(wan.with_cache(EasyCache(0.5)).with_cache(None), *FAMILIES[family], steps=6), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skipped_step_calls_nothing_for_any_family(family):
    wan = model(family).with_cache(EasyCache(1.0))
    for windows in (None, Windows(3, 2)):
        heard = []
        result, rows = calls(wan.with_windows(windows), *FAMILIES[family], steps=8, say=heard.append)
        assert result.isfinite().all() and 0 < skipped(heard) < 7
        assert len(rows) == (8 - skipped(heard)) * 2 * (1 if windows is None else 2)
    assert heard[-1] == f"EasyCache (1): skipped {skipped(heard)} of 8 steps."


@pytest.mark.parametrize("windows", [None, Windows(3, 2)])
def test_merged_guidance_skips_the_same_steps(windows):
    wan = model("VACE").with_cache(EasyCache(1.0)).with_windows(windows)
    apart, rows = calls(wan, "VACE pictures", steps=8)
    merged, both = calls(wan, "VACE pictures", steps=8, cfg_merge=True)
    assert relative_error(merged, apart) <= 1e-5
    assert len(rows) == 2 * len(both) and set(both) == {2}


def test_equal_videos_of_a_batch_are_the_one(monkeypatch):
    wan = model("T2V").with_cache(EasyCache(1.0))
    noise = random(1, 16, 3, 4, 6, seed=3)
    monkeypatch.setattr(loop, "draw_noise", lambda shape, *_: noise.expand(shape[0], -1, -1, -1, -1))
    one, three = (video(wan, latent=torch.zeros(n, 16, 3, 4, 6), steps=8) for n in (1, 3))
    assert relative_error(three, one.expand_as(three)) <= 1e-5


def test_with_a_lora(tmp_path):
    weights = {"blocks.0.ffn.0.lora_A.weight": random(4, 256, seed=1), "blocks.0.ffn.0.lora_B.weight": random(64, 4)}
    save_file({f"diffusion_model.{name}": value for name, value in weights.items()}, tmp_path / "lora.safetensors")
    plain, heard = model("T2V"), []
    changed = plain.with_lora(load_lora(tmp_path / "lora.safetensors"))
    cached = video(changed.with_cache(EasyCache(1.0)), steps=8, say=heard.append)
    assert skipped(heard) > 0
    assert torch.equal(video(changed.with_cache(EasyCache(0.0)), steps=8), video(changed, steps=8))
    assert relative_error(cached, video(plain.with_cache(EasyCache(1.0)), steps=8)) > 1e-3


def test_a_step_that_is_done_again(monkeypatch):
    wan = model("T2V").with_cache(EasyCache(1.0))
    expected = video(wan, steps=8)
    monkeypatch.setattr(type(wan), "relieve", lambda _: True)
    count = 0

    def shortage(*_):
        nonlocal count
        count += 1
        if count in (3, 6):
            raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB.")

    hook = wan.trunk.blocks[1].register_forward_pre_hook(shortage)
    try:
        assert torch.equal(video(wan, steps=8), expected)
    finally:
        hook.remove()
    assert count > 6


def test_a_larger_threshold_skips_more():
    wan, counts = model("T2V"), []
    for threshold in (0.0, 0.2, 1.0, 5.0):
        heard = []
        video(wan.with_cache(EasyCache(threshold)), steps=12, say=heard.append)
        counts.append(skipped(heard))
    assert counts == sorted(counts) and counts[0] == 0 < counts[-1]


def test_only_in_its_part_of_the_run():
    _, early = calls(model("T2V").with_cache(EasyCache(9.0, 0.0, 0.5)), steps=8, cfg=1.0)
    assert len(early) == 2 + 4  # two to learn from, and the second half


def test_room_for_what_is_kept():
    wan, latent = model("T2V"), (2, 16, 21, 60, 104)
    kept = KEPT_LATENTS * 2 * 16 * 21 * 60 * 104 * 4
    assert working_room(wan.with_cache(BOTH[0]), latent, Settings(0)) == working_room(wan, latent, Settings(0)) + kept


@pytest.mark.parametrize(
    "values, sentence",
    [
        ((-1.0,), "threshold is -1.0, but it has to be 0 or more"),
        ((float("nan"),), "threshold is nan"),
        ((0.1, 0.5, 0.5), "start has to be before end"),
    ],
)
def test_impossible_values_are_sentences(values, sentence):
    with pytest.raises(InputError, match=sentence):
        EasyCache(*values)


def test_one_cache_at_a_time():
    wan = model("T2V")
    (easy,) = CacheByItself.execute(wan, 0.05, 0.2, 1.0).args
    assert easy.cache == EasyCache(0.05, 0.2, 1.0) and wan.cache is None
    with pytest.raises(InputError, match="already has Wan EasyCache.*Remove Wan EasyCache or Wan TeaCache"):
        CacheSteps.execute(easy, 0.1, "warm-up", "auto", 0.0, 1.0, "auto")
    with pytest.raises(InputError, match="already has Wan TeaCache.*Remove Wan TeaCache or Wan EasyCache"):
        wan.with_cache(BOTH[1]).with_cache(BOTH[0])
    assert easy.with_cache(EasyCache(0.1)).cache.threshold == 0.1


# ---- guidance in a part of the run ------------------------------------------------------------------------------


def by_hand(wan, guided, steps, cfg):
    """Euler's walk, guided in some steps."""
    x = torch.randn(LATENT, generator=torch.Generator().manual_seed(1))
    settings = Settings(1, steps)
    sigmas = settings.levels()
    positive, negative = random(1, 4, 8, seed=7), random(1, 6, 8, seed=8)
    with torch.no_grad(), wan.attached() as network:
        for i in range(steps):
            v, t = {}, torch.tensor([1000 * sigmas[i]])
            for name, text in (("positive", positive), ("negative", negative)):
                v[name] = network.trunk(x, t, text)
            scale = cfg if guided[i] else 1.0
            x = x + (sigmas[i + 1] - sigmas[i]) * (v["negative"] + scale * (v["positive"] - v["negative"]))
    return loop.unnormalised(x)


LATENT = (1, 16, 3, 4, 6)


@pytest.mark.parametrize("start, end, guided", [
    (0.0, 0.5, [True, True, True, False, False, False]),
    (0.3, 1.0, [False, False, True, True, True, True]),
    (0.1, 0.6, [False, True, True, True, False, False]),
    (0.9, 1.0, [False] * 6),
])  # fmt: skip
@pytest.mark.parametrize("merge", [False, True])
def test_guided_steps_only(start, end, guided, merge):
    wan = model("T2V")
    settings = Settings(1, 6, cfg=3.0, cfg_merge=merge, cfg_start=start, cfg_end=end)
    assert [settings.guided(i) for i in range(6)] == guided
    rows = []
    hook = wan.trunk.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    got = sample(wan, random(1, 4, 8, seed=7), random(1, 6, 8, seed=8), torch.zeros(LATENT), settings)
    hook.remove()
    assert sum(rows) == 6 + sum(guided) and (set(rows) == {1} or merge)
    assert relative_error(got, by_hand(wan, guided, 6, 3.0)) <= 1e-5


def test_the_whole_run_is_the_default():
    wan = model("T2V")
    assert torch.equal(video(wan, cfg_start=0.0, cfg_end=1.0), video(wan))


@pytest.mark.parametrize("cache", BOTH)
@pytest.mark.parametrize("windows", [None, Windows(3, 2)])
def test_caches_begin_anew_where_guidance_begins_or_ends(cache, windows):
    wan = model("VACE").with_cache(cache).with_windows(windows)
    part = {"steps": 12, "cfg_start": 0.3, "cfg_end": 0.7}
    heard = []
    apart = video(wan, "VACE pictures", **part, say=heard.append)
    assert skipped(heard) > 0
    assert relative_error(video(wan, "VACE pictures", **part, cfg_merge=True), apart) <= 1e-5
    assert relative_error(apart, video(wan, "VACE pictures", steps=12)) > 1e-3


@pytest.mark.parametrize("values", [{"cfg_start": 0.5, "cfg_end": 0.5}, {"cfg_end": 1.5}, {"cfg_start": -0.1}])
def test_impossible_parts_are_sentences(values):
    with pytest.raises(InputError, match="cfg_start has to be before cfg_end"):
        Settings(0, **values)


# ---- new noise in every step ------------------------------------------------------------------------------------


def test_lcm_by_hand():
    wan, settings = model("T2V"), Settings(5, 3, cfg=1.0, scheduler="lcm", timesteps=(1000.0, 757.0, 522.0))
    got = sample(wan, random(1, 4, 8, seed=7), None, torch.zeros(LATENT), settings)
    x, sigmas = torch.randn(LATENT, generator=torch.Generator().manual_seed(5)), [1.0, 0.757, 0.522, 0.0]
    with torch.no_grad(), wan.attached() as network:
        for i in range(3):
            clean = x - sigmas[i] * network.trunk(x, torch.tensor([1000 * sigmas[i]]), random(1, 4, 8, seed=7))
            noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(5 + i + 1))
            x = (1 - sigmas[i + 1]) * clean + sigmas[i + 1] * noise
    assert relative_error(got, loop.unnormalised(x)) <= 1e-5
    assert torch.equal(got, sample(wan, random(1, 4, 8, seed=7), None, torch.zeros(LATENT), settings))


def test_the_highest_seed_has_noise_after_it():
    settings = {"seed": loop.HIGHEST_SEED, "scheduler": "lcm", "steps": 4}
    assert video(model("VACE"), "VACE pictures", **settings).isfinite().all()
