"""The toy tasks: what a sample shows is what its scores look for, and training sees what inference sees."""

from dataclasses import replace

import numpy as np
import pytest
from comfyui_wanflow.wan_core.tiny import measure, world
from comfyui_wanflow.wan_core.tiny.tasks import TASKS, Sample, fact_scores, outlines, samples, seen_drift
from comfyui_wanflow.wan_core.trajectory import trajectory


@pytest.mark.parametrize("name", TASKS)
def test_the_clips_themselves_score_full_marks_and_others_do_not(name):
    task = TASKS[name]
    given = samples(task, 12, seed=3, held_out=True)
    clips = [sample.clip for sample in given]
    scores = task.scores(clips, given)
    assert all(value > 60 if what.endswith("dB") else value == 1 for what, value in scores.items()), scores
    others = [sample.clip for sample in samples(task, 12, seed=4, held_out=True)]
    if name != "T2V":  # whose clips have two lengths
        wrong = task.scores(others, given)
        assert all(wrong[what] < (20 if what.endswith("dB") else 0.9) for what in scores), wrong


def test_what_a_sample_asks_for_is_looked_for_even_if_no_training_shows_it():
    scenes = [world.Scene("pink", "star", "left", "blue"), world.Scene("red", "circle", "up", "white")]
    given = [Sample(scene, (scene.caption,), world.render(scene)) for scene in scenes]
    assert set(fact_scores([sample.clip for sample in given], given).values()) == {1.0}
    red = replace(given[0], clip=world.render(replace(scenes[0], color="red", shape="circle")))
    assert fact_scores([red.clip], given[:1]) == {"color": 0, "shape": 0, "direction": 1, "background": 1}


@pytest.mark.parametrize("direction, way", [("Left", (1, 0)), ("RightUp", (-1, 1)), ("Down", (0, -1))])
def test_a_camera_that_turns_moves_the_scene_the_other_way(direction, way):
    drift = seen_drift(trajectory(direction, 0.02, 17).poses)
    assert np.array_equal(np.sign(np.where(abs(drift) < 1e-9, 0, drift)), way)
    assert abs(drift).max() == pytest.approx(0.946 * 0.32, rel=0.01)


def test_outlines_lie_on_the_edge_of_the_shape():
    clip = world.render(world.Scene("red", "square", "left", "blue"), 5)
    lines, mask = outlines(clip)[..., 0] > 0, measure.shape_mask(clip)
    assert lines.any() and not (lines & ~mask).any() and lines.sum() < mask.sum() / 2


def test_training_scenes_and_held_out_ones_are_apart():
    trained, unseen = (
        {s.scene.words for s in samples(TASKS["I2V"], 40, seed=1, held_out=held_out)} for held_out in (False, True)
    )
    assert not trained & unseen and not any(world.is_held_out(words) for words in trained)
