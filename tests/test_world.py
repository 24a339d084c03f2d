"""The toy world and the code that reads it back."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from comfyui_wanflow.wan_core.tiny import measure, world
from comfyui_wanflow.wan_core.tiny.drift import Drift, drift
from comfyui_wanflow.wan_core.tiny.train_text import TEMPLATES, captions


def scenes(count: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    facts = world.all_facts()
    return [world.random_scene(generator, facts[i]) for i in generator.integers(len(facts), size=count)]


def test_every_combination_once_with_two_colors():
    facts = world.all_facts()
    assert len(facts) == len(set(facts)) == 8 * 7 * 3 * 4
    assert all(color != background for color, _, _, background in facts)


def test_held_out_combinations_leave_every_word_in_training():
    facts = world.all_facts()
    unseen = [f for f in facts if world.is_held_out(f)]
    assert 0.08 < len(unseen) / len(facts) < 0.12
    for place in range(4):
        trained = {f[place] for f in facts if not world.is_held_out(f)}
        assert trained == {f[place] for f in facts}


def test_a_held_out_pair_is_held_out_in_all_directions():
    for color, shape, _, background in filter(world.is_held_out, world.all_facts()):
        assert all(world.is_held_out((color, shape, d, background)) for d in world.DIRECTIONS)


def test_rendering_is_deterministic_and_bounded():
    scene = scenes(1)[0]
    clip = world.render(scene, 9)
    assert clip.shape == (9, 64, 64, 3) and clip.dtype == np.float32
    assert clip.min() >= 0 and clip.max() <= 1
    np.testing.assert_array_equal(clip, world.render(scene, 9))


def test_the_caption_says_what_the_scene_is():
    scene = world.Scene("red", "circle", "left", "blue")
    assert scene.caption == "a red circle moves left on a blue background" == captions(scene.words)[0]
    assert all(word in text for text in captions(scene.words) for word in scene.words)
    assert len(set(captions(scene.words))) == len(TEMPLATES)


@pytest.mark.parametrize("frames", [9, 17])
def test_facts_are_read_back_from_pixels(frames):
    for scene in scenes(40, seed=frames):
        reading = measure.read(world.render(scene, frames))
        assert (reading.color, reading.shape, reading.direction, reading.background) == scene.words


def test_what_no_training_shows_is_read_where_it_may_be():
    clip = world.render(world.Scene("pink", "star", "left", "blue"), 9)
    reading = measure.read(clip, (*world.COLORS, "pink"), (*world.SHAPES, "star"))
    assert (reading.color, reading.shape, reading.direction, reading.background) == ("pink", "star", "left", "blue")
    assert measure.read(clip).color in world.COLORS and measure.read(clip).shape in world.SHAPES


def test_noise_does_not_fool_the_reading():
    generator = np.random.default_rng(5)
    for scene in scenes(10, seed=5):
        clip = np.clip(world.render(scene, 9) + generator.normal(0, 0.04, (9, 64, 64, 3)), 0, 1)
        reading = measure.read(clip.astype(np.float32))
        assert (reading.color, reading.shape, reading.direction, reading.background) == scene.words


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_shape_with_a_bump_and_a_soft_corner_is_still_told(shape):
    """A thin bump makes the bounding box a quarter larger and the shape hardly."""
    scene = world.Scene("red", shape, "up", "white", radius=0.22, travel=0.0)
    clip = world.render(scene, 3)
    mask = measure.shape_mask(clip)[0]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    clip[:, rows[-1] - 4 : rows[-1] - 1, columns[-1] : columns[-1] + 7] = clip[:, 32:33, 32:33]
    clip[:, rows[-1] - 1 : rows[-1] + 1, columns[0] : columns[0] + 3] = clip[:, :1, :1]
    assert measure.read_shape(clip) == shape


def test_an_empty_picture_has_no_shape():
    reading = measure.read(np.full((9, 64, 64, 3), np.array(world.COLORS["blue"]) / 255, np.float32))
    assert reading == measure.Reading(None, None, None, "blue")


def test_a_shape_at_rest_has_no_direction():
    scene = world.Scene("red", "square", "up", "white", travel=0.0)
    assert measure.read(world.render(scene, 9)).direction is None


def test_displacement_is_the_travel():
    scene = world.Scene("red", "square", "right", "white", travel=0.4)
    np.testing.assert_allclose(measure.displacement(world.render(scene, 17)), [0.4, 0], atol=0.01)


def test_psnr():
    assert measure.psnr(np.zeros(4), np.full(4, 0.1)) == pytest.approx(20)


def test_drift_is_what_changes_after_the_first_part():
    scene = world.Scene("red", "circle", "left", "blue", travel=0.0)
    steady = np.concatenate([world.render(scene, 16)] * 3)
    assert drift(steady) == Drift(0.0, 0.0, 0.0, 0.0)
    for name, value in (("color", "orange"), ("background", "purple"), ("radius", 0.24)):
        strayed = steady.copy()
        strayed[16:32] = world.render(replace(scene, **{name: value}), 16)  # and back
        found = {key: value > 0.05 for key, value in asdict(drift(strayed)).items()}
        assert found == {"color": name == "color", "background": name == "background", "size": name == "radius",
                         "jump": True}  # fmt: skip
    gone = steady.copy()
    gone[32:] = gone[0, 0, 0]
    assert drift(gone).size == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="16 frames"):
        drift(steady[:16])
