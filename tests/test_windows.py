"""Schedules of sliding windows, how they are blended, and noise that they share. DiffSynth's: see test_speed_up.py."""

import pytest
import torch
from comfyui_wanflow.nodes.speed_up import SlideWindow
from comfyui_wanflow.wan_core.adapters.injection import Injection
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.sampling.easycache import EasyCache
from comfyui_wanflow.wan_core.sampling.loop import Settings, draw_noise, sample, working_room
from comfyui_wanflow.wan_core.sampling.magcache import MEASURED, MagCache
from comfyui_wanflow.wan_core.sampling.teacache import TeaCache
from comfyui_wanflow.wan_core.sampling.windows import FUSE_METHODS, SCHEDULES, Sliding, Windows, halving
from families import model, random, relative_error, video

MOVING = ("standard_uniform", "looped_uniform")
FAMILIES = {
    "T2V": (),
    "I2V": ("start image",),
    "Control V1.1": ("control video", "reference image"),
    "Camera": ("start image", "camera"),
    "VACE": ("VACE pictures",),
    "speed": ("motion speed",),
}
CACHES = [EasyCache(1.0), TeaCache(0.3, "DiffSynth", "T2V-1.3B"), MagCache(10.0, 3, "T2V-1.3B")]


# ---- where they lie ---------------------------------------------------------------------------------------------


def test_halving_fills_the_whole_evenly():
    assert [halving(step) for step in range(8)] == [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size, stride", [(21, 11), (7, 7), (5, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("frames", [21, 22, 41, 50])
def test_every_frame_is_seen_in_every_step(schedule, size, stride, frames):
    windows = Windows(size, stride, schedule)
    for step in range(12):
        spans = windows.spans(frames, step)
        seen = {place % frames for span in spans for place in range(*span)}
        assert seen == set(range(frames)) and len(set(spans)) == len(spans)
        assert all(1 <= stop - start <= min(size, frames) for start, stop in spans)
        assert schedule == "DiffSynth" or all(stop - start == min(size, frames) for start, stop in spans)
        if schedule != "looped_uniform":
            assert spans == sorted(spans) and spans[0][0] == 0 and spans[-1][1] == frames
            gaps = [later[0] - start for (start, _), later in zip(spans, spans[1:], strict=False)]
            assert all(gap <= stride for gap in gaps)


def test_where_they_lie():
    assert Windows(4, 3, "standard_static").spans(9) == [(0, 4), (3, 7), (5, 9)]
    uniform = Windows(6, 4, "standard_uniform")
    assert uniform.spans(14, 0) == [(0, 6), (4, 10), (8, 14)]
    assert uniform.spans(14, 1) == [(0, 6), (2, 8), (6, 12), (8, 14)]  # moved by half a stride
    looped = Windows(6, 4, "looped_uniform")
    assert looped.spans(12, 0) == [(0, 6), (4, 10), (8, 14)]  # the last goes round
    assert looped.spans(12, 2) == [(3, 9), (7, 13), (11, 17)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_moving_ones_move(schedule):
    spans = [tuple(Windows(21, 11, schedule).spans(61, step)) for step in range(8)]
    assert (len(set(spans)) > 4) == (schedule in MOVING)
    assert Windows(21, 11, schedule).spans(15) == [(0, 15)]


# ---- how they are blended ---------------------------------------------------------------------------------------


def test_weights():
    def weights(method, *span, schedule="DiffSynth"):
        return Windows(6, 4, schedule, method).weights(*span, 20).tolist()

    assert weights("overlap-linear", 0, 6) == [1, 1, 1, 1, 0.75, 0.25]
    assert weights("overlap-linear", 0, 6, schedule="looped_uniform") == [0.25, 0.75, 1, 1, 0.75, 0.25]
    assert weights("pyramid", 0, 6) == weights("pyramid", 4, 10) == [1, 2, 3, 3, 2, 1]
    assert weights("pyramid", 16, 20) == [1, 2, 2, 1]
    assert weights("flat", 4, 10) == [1] * 6


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", FUSE_METHODS)
def test_what_all_windows_agree_on_stays(schedule, method):
    sliding = Sliding(Windows(5, 3, schedule, method), Injection(prefix_frames=torch.zeros(1, 16, 2, 4, 4)), 11)
    x = random(1, 16, 13, 4, 4)
    for step in range(5):
        torch.testing.assert_close(sliding(lambda x, injection, number: 2 * x, x, step), 2 * x)


def test_a_window_that_goes_round_is_put_back_where_it_was_cut():
    control = torch.arange(12.0).view(1, 1, 12, 1, 1).expand(1, 16, 12, 4, 4)
    x, seen = control.clone(), []

    def predict(x, injection, number):
        assert torch.equal(injection.concat["control"], x)  # cut alike
        seen.append(x[0, 0, :, 0, 0].int().tolist())
        return x

    result = Sliding(Windows(6, 4, "looped_uniform"), Injection(concat={"control": control}), 12)(predict, x)
    assert seen == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9], [8, 9, 10, 11, 0, 1]]
    torch.testing.assert_close(result, x)


# ---- in a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", MOVING)
def test_any_family(family, schedule):
    wan, given = model(family).with_windows(Windows(3, 2, schedule, "pyramid", True)), FAMILIES[family]
    apart = video(wan, *given, steps=3)
    assert apart.isfinite().all()
    assert relative_error(video(wan, *given, steps=3, cfg_merge=True), apart) <= 1e-5
    assert relative_error(video(wan.with_windows(Windows(3, 2)), *given, steps=3), apart) > 1e-3


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_caches(cache, schedule):
    wan, heard = model("VACE").with_windows(Windows(3, 2, schedule)).with_cache(cache), []
    apart = video(wan, "VACE pictures", steps=10, say=heard.append)
    assert "skipped 0 " not in heard[0]
    assert relative_error(video(wan, "VACE pictures", steps=10, cfg_merge=True), apart) <= 1e-5


def test_what_is_added_again_is_of_the_same_frames(monkeypatch):
    """In a step that is left out the windows lie as in the one that was computed."""
    monkeypatch.setattr(TeaCache, "plan", lambda *_: [False, True, True, False, True])
    seen, spans = [], Windows.spans
    monkeypatch.setattr(Windows, "spans", lambda self, frames, step=0: seen.append(step) or spans(self, frames, step))
    wan = model("T2V").with_windows(Windows(3, 2, "looped_uniform"))
    video(wan.with_cache(CACHES[1]), steps=5, cfg=1.0)
    assert seen[-5:] == [0, 0, 0, 3, 3]


def test_a_curve_is_measured_in_moving_windows():
    wan = model("T2V").with_windows(Windows(3, 2, "standard_uniform")).with_cache(MagCache(curve=MEASURED))
    video(wan, steps=6)
    assert all(torch.tensor(curve.logs).isfinite().all() for curve in wan.curves.values()) and len(wan.curves) == 1


def test_the_memory_of_the_model_does_not_grow_with_the_video():
    """What the blocks hold is that of one window; only the latents themselves grow."""
    wan, settings = model("T2V"), Settings(0, cfg=1.0)
    for schedule in SCHEDULES:
        windowed = wan.with_windows(Windows(21, 11, schedule))
        rooms = [working_room(windowed, (1, 16, frames, 60, 104), settings) for frames in (41, 81, 161)]
        latents = 16 * 40 * 60 * 104 * 4
        assert rooms[2] - rooms[1] == 2 * (rooms[1] - rooms[0]) <= 2 * 10 * latents


# ---- shared noise -----------------------------------------------------------------------------------------------


def test_the_windows_share_the_noise_of_the_first():
    windows, plain = Windows(4, 3, freenoise=True), random(1, 16, 12, 2, 2)
    shared = windows.shared(plain, seed=3)
    assert torch.equal(shared[:, :, :4], plain[:, :, :4]) and torch.equal(plain, random(1, 16, 12, 2, 2))
    generator = torch.Generator().manual_seed(3)
    for start, count in ((0, 3), (3, 3), (6, 2)):  # each stride of frames: those a window before, in another order
        order = start + torch.randperm(count, generator=generator)
        assert torch.equal(shared[:, :, start + 4 : start + 4 + count], shared[:, :, order])
    first = {tuple(frame.flatten().tolist()) for frame in plain[0, :, :4].unbind(1)}
    assert {tuple(frame.flatten().tolist()) for frame in shared[0].unbind(1)} == first
    assert Windows(4, 3).shared(plain, 3) is plain
    assert torch.equal(windows.shared(plain[:, :, :4], 3), plain[:, :, :4])


def test_the_noise_of_a_run_is_shared():
    settings, windows = Settings(5), Windows(2, 1, freenoise=True)
    plain, shared = (draw_noise((1, 16, 5, 4, 4), 2, settings, windows=given) for given in (None, windows))
    assert torch.equal(shared[:, :, :4], plain[:, :, :4])  # the prefix, and the first window
    assert torch.equal(shared[:, :, 2:], windows.shared(plain[:, :, 2:], 5)) and not torch.equal(shared, plain)


@pytest.mark.parametrize("scheduler", ["euler", "lcm"])
def test_free_noise_in_a_run(scheduler):
    wan, given = model("T2V"), (random(1, 4, 8, seed=7), None, torch.zeros(1, 16, 6, 4, 4))
    settings = Settings(1, 3, cfg=1.0, scheduler=scheduler)
    with_it, without = (
        sample(wan.with_windows(Windows(3, 3, freenoise=shared)), *given, settings) for shared in (True, False)
    )
    assert torch.equal(with_it[:, :, :3], without[:, :, :3])  # windows that do not overlap know nothing of each other
    assert not torch.equal(with_it[:, :, 3:], without[:, :, 3:])


# ---- inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, sentence", [
    (("static",), "no schedule 'static'. Choose one of DiffSynth, standard_static"),
    (("DiffSynth", "ramp"), "no fuse_method 'ramp'. Choose one of overlap-linear, pyramid, flat"),
])  # fmt: skip
def test_impossible_values_are_sentences(values, sentence):
    with pytest.raises(InputError, match=sentence):
        Windows(21, 11, *values)


def test_the_node():
    wan = model("T2V")
    (windowed,) = SlideWindow.execute(wan, 21, 11, "looped_uniform", "pyramid", True).args
    assert windowed.windows == Windows(21, 11, "looped_uniform", "pyramid", True)
    assert SlideWindow.execute(wan, 21, 11).args[0].windows == Windows(21, 11)
