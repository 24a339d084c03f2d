"""MagCache: steps left out by how the size of what the blocks add falls, published or measured."""

import math

import pytest
import torch
from comfyui_wanflow.nodes.speed_up import CacheBySize
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.loading.lora_files import load_lora
from comfyui_wanflow.wan_core.sampling.easycache import EasyCache
from comfyui_wanflow.wan_core.sampling.loop import Settings, working_room
from comfyui_wanflow.wan_core.sampling.magcache import CURVES, MEASURED, MagCache, Measuring, curve_of
from comfyui_wanflow.wan_core.sampling.schedules import noise_levels
from comfyui_wanflow.wan_core.sampling.teacache import COEFFICIENTS
from comfyui_wanflow.wan_core.sampling.windows import Windows
from families import model, random, relative_error, video
from safetensors.torch import save_file

FAMILIES = {
    "T2V": (),
    "I2V": ("start image",),
    "Control V1.1": ("control video", "reference image"),
    "Camera": ("start image", "camera"),
    "VACE": ("VACE pictures",),
    "speed": ("motion speed",),
}
RUNS = {"T2V-1.3B": (50, 5.0), "T2V-14B": (50, 5.0), "I2V-14B-480P": (40, 3.0), "I2V-14B-720P": (40, 5.0)}
EAGER = MagCache(10.0, 3, "T2V-1.3B")  # three of four steps, from a fifth of the run


def calls(wan, *conditions, **settings):
    """The video, and how often the trunk's blocks were run."""
    count = []
    hook = wan.trunk.blocks[0].register_forward_pre_hook(lambda *_: count.append(1))
    result = video(wan, *conditions, **settings)
    hook.remove()
    return result, len(count)


# ---- which steps ------------------------------------------------------------------------------------------------


def authors_pattern(ratios, steps, threshold, most, retention):
    """The authors' loop over one prompt; ratios: from each step to the next."""
    ratio, error, row, skips = 1.0, 0.0, 0, []
    for i in range(steps):
        skip = False
        if i >= int(steps * retention):
            ratio, row = ratio * ratios[i - 1], row + 1
            error += abs(1 - ratio)
            skip = error < threshold and row <= most
            if not skip:
                ratio, error, row = 1.0, 0.0, 0
        skips.append(skip)
    return skips


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("threshold, most", [(0.12, 2), (0.12, 4), (0.24, 6), (0.02, 3), (0.5, 10)])
def test_the_authors_runs_skip_what_theirs_do(name, threshold, most):
    steps, shift = RUNS[name]
    curve = CURVES[name]
    ratios = [math.exp(later - log) for log, later in zip(curve.logs, curve.logs[1:], strict=False)]
    assert len(ratios) == steps - 1
    skipped = MagCache(threshold, most, name).skipped(noise_levels(steps, shift, 1.0)[:-1], curve)
    assert skipped == authors_pattern(ratios, steps, threshold, most, 0.2)
    assert sum(skipped) > steps / 10 and not any(skipped[: steps // 5])


def test_published_numbers():
    """Some of the authors' ratios, by the step that they lead to."""
    for name, step, ratio in [("T2V-1.3B", 1, 1.0124), ("T2V-1.3B", 49, 0.81838), ("T2V-14B", 25, 0.99216),
                              ("I2V-14B-480P", 38, 0.90955), ("I2V-14B-720P", 39, 0.8679)]:  # fmt: skip
        logs = CURVES[name].logs
        assert math.exp(logs[step] - logs[step - 1]) == pytest.approx(ratio)
    assert CURVES.keys() == COEFFICIENTS.keys()


def test_a_curve_is_straight_between_its_levels_and_beyond():
    curve = curve_of([1.0, 0.5, 0.25], [0.5, 0.25])
    for level, log in [(1.0, 0.0), (0.75, 0.5), (0.5, 1.0), (0.375, 2.0), (0.25, 3.0), (0.0, 5.0), (1.5, -1.0)]:
        assert curve.at(level) == pytest.approx(-log * math.log(2))
    assert curve.reaches([0.9, 0.3]) and not curve.reaches([1.1, 0.3]) and not curve.reaches([0.9, 0.2])


def test_other_numbers_of_steps_see_the_same_curve():
    """Half the steps are twice as far apart: the error of one is that of two of the whole run."""
    curve = CURVES["T2V-1.3B"]
    whole, half = (noise_levels(steps, 5.0, 1.0)[:-1] for steps in (50, 25))
    assert half == pytest.approx(whole[::2])
    for first, second in zip(half, half[1:], strict=False):
        assert curve.at(second) - curve.at(first) == pytest.approx(
            curve.at(whole[whole.index(second)]) - curve.at(whole[whole.index(first)])
        )
    counts = [sum(MagCache(0.12, 4, "T2V-1.3B").skipped(levels, curve)) for levels in (whole, half)]
    assert counts[1] < counts[0] / 2


def test_only_in_its_part_of_the_run():
    levels = noise_levels(20, 5.0, 1.0)[:-1]
    skipped = MagCache(10.0, 100, "T2V-1.3B", start=0.25, end=0.5).skipped(levels, CURVES["T2V-1.3B"])
    assert skipped == [5 <= i < 10 for i in range(20)]


def test_auto_takes_the_nearest_models_curve():
    wan = model("T2V")
    assert wan.with_cache(MagCache()).cache.curve == "T2V-1.3B"
    assert wan.with_cache(MagCache(curve="T2V-14B")).cache.curve == "T2V-14B"
    assert wan.with_cache(MagCache(curve=MEASURED)).cache.curve == MEASURED


# ---- in a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_allowed_is_the_plain_run_bit_for_bit(family):
    wan = model(family)
    plain = video(wan, *FAMILIES[family], steps=4)
    assert torch.equal(video(wan.with_cache(MagCache(0.0)), *FAMILIES[family], steps=4), plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windows", [None, Windows(3, 2)])
def test_skips_for_any_family_and_window(family, windows):
    heard = []
    wan = model(family).with_cache(EAGER).with_windows(windows)
    result, count = calls(wan, *FAMILIES[family], steps=10, say=heard.append)
    assert heard == ["MagCache (T2V-1.3B): skipped 6 of 10 steps."]  # computed: 0, 1, 5, 9
    assert result.isfinite().all() and count == 4 * 2 * (1 if windows is None else 2)
    merged, both = calls(wan, *FAMILIES[family], steps=10, cfg_merge=True)
    assert relative_error(merged, result) <= 1e-5 and 2 * both == count


def test_begins_anew_where_guidance_begins_or_ends():
    part = {"steps": 12, "cfg_start": 0.3, "cfg_end": 0.7}
    wan = model("VACE").with_cache(EAGER)
    apart, count = calls(wan, "VACE pictures", **part)
    assert count < 12 + 5
    assert relative_error(video(wan, "VACE pictures", **part, cfg_merge=True), apart) <= 1e-5


def test_room_for_what_is_kept():
    wan, latent, settings = model("T2V"), (1, 16, 21, 60, 104), Settings(0)
    plain = working_room(wan, latent, settings)
    assert working_room(wan.with_cache(EAGER), latent, settings) == plain + 2 * 21 * 30 * 52 * 256 * 4
    assert working_room(wan.with_cache(MagCache(device="cpu")), latent, settings) == plain


# ---- measured ---------------------------------------------------------------------------------------------------


def test_takes_the_size_of_what_the_blocks_add():
    measuring = Measuring(3)
    for step, (first, second) in enumerate([(4.0, 10.0), (2.0, 10.0), (1.0, 5.0)]):
        for key, size in (("a", first), ("b", second)):
            added = torch.tensor([[[0.6 * size, 0.8 * size]] * 5])
            before = random(1, 5, 2, seed=step)
            result = measuring.body(step, key)(lambda x, added=added: x.add_(added), before.clone())
            torch.testing.assert_close(result, before + added)
    torch.testing.assert_close(measuring.ratios(), torch.tensor([0.75, 0.5]))  # the means of 0.5 and 1, 0.5 and 0.5


def test_the_first_run_measures_and_the_next_skips():
    wan, heard = model("T2V"), []
    plain = video(wan, steps=10)
    cached = wan.with_cache(MagCache(10.0, 3, MEASURED))
    assert torch.equal(video(cached, steps=10, say=heard.append), plain)
    assert heard == ["MagCache measured this model in 10 steps and skipped none. The next run skips."]
    (curve,) = wan.curves.values()
    assert len(curve.levels) == 10 and all(math.isfinite(log) for log in curve.logs) and curve.logs[0] == 0
    video(cached, steps=10, say=heard.append)
    assert heard[-1] == "MagCache (measured): skipped 6 of 10 steps."
    video(wan.with_cache(MagCache(10.0, 2, MEASURED)), steps=8, say=heard.append)  # of another handle, with fewer steps
    assert "skipped" in heard[-1] and "measured this" not in heard[-1]
    video(cached, steps=20, say=heard.append)  # whose last level is lower than any that was seen
    assert "measured this model in 20 steps" in heard[-1]


def test_windows_and_merged_prompts_measure_alike():
    curves = []
    for merge in (False, True):
        wan = model("VACE").with_cache(MagCache(curve=MEASURED)).with_windows(Windows(3, 2))
        video(wan, "VACE pictures", steps=6, cfg_merge=merge)
        curves.append(torch.tensor(next(iter(wan.curves.values())).logs))
    torch.testing.assert_close(*curves, rtol=0.02, atol=0.01)


def test_a_lora_is_measured_by_itself(tmp_path):
    weights = {"blocks.0.ffn.0.lora_A.weight": random(4, 256, seed=1), "blocks.0.ffn.0.lora_B.weight": random(64, 4)}
    save_file({f"diffusion_model.{name}": value for name, value in weights.items()}, tmp_path / "lora.safetensors")
    wan, heard = model("T2V").with_cache(MagCache(curve=MEASURED)), []
    changed = wan.with_lora(load_lora(tmp_path / "lora.safetensors"))
    for handle in (wan, changed, changed):
        video(handle, steps=6, say=heard.append)
    assert ["measured this model" in sentence for sentence in heard] == [True, True, False]
    assert len(wan.curves) == 2


# ---- inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"threshold": -1.0}, "threshold is -1.0, but it has to be 0 or more"),
        ({"most": 0}, "max_skip is 0, but it has to be at least 1"),
        ({"curve": "5B"}, "no curve '5B'. Choose one of auto, measured, T2V-1.3B"),
        ({"start": 0.5, "end": 0.5}, "start has to be before end"),
    ],
)
def test_impossible_values_are_sentences(values, sentence):
    with pytest.raises(InputError, match=sentence):
        MagCache(**values)


def test_the_node():
    wan = model("T2V")
    (cached,) = CacheBySize.execute(wan, 0.24, 6, "auto", 0.1, 0.9, "cpu").args
    assert cached.cache == MagCache(0.24, 6, "T2V-1.3B", 0.1, 0.9, "cpu") and wan.cache is None
    with pytest.raises(InputError, match="already has Wan MagCache"):
        cached.with_cache(EasyCache())
