"""Sizes that the models cannot make are rounded up and said; impossible ones are refused."""

import pytest
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.size import latent_shape, pixel_size, snap_size


def test_a_possible_size_is_left_alone():
    assert snap_size(832, 480, 81) == (832, 480, 81, None)


def test_sides_and_frames_are_rounded_up_and_said():
    width, height, num_frames, note = snap_size(830, 465, 80)
    assert (width, height, num_frames) == (832, 480, 81)
    assert "830x465" in note and "832x480" in note and "80 frames" in note and "81" in note


@pytest.mark.parametrize("asked, made", [(1, 1), (2, 5), (5, 5), (80, 81), (82, 85)])
def test_frames_as_the_reference_rounds_them(asked, made):
    assert snap_size(16, 16, asked)[2] == made


@pytest.mark.parametrize("size, name", [((0, 16, 1), "width"), ((16, -16, 1), "height"), ((16, 16, 0), "num_frames")])
def test_zero_and_negative_sizes_are_refused_by_name(size, name):
    with pytest.raises(InputError, match=f"{name} is "):
        snap_size(*size)


def test_latent_shape():
    assert latent_shape(832, 480, 81) == (1, 16, 21, 60, 104)
    assert latent_shape(64, 48, 1, batch_size=3) == (3, 16, 1, 6, 8)
    assert pixel_size(21, 60, 104) == (81, 480, 832) and pixel_size(1, 6, 8) == (1, 48, 64)
    with pytest.raises(InputError, match="64x64 with 9 frames"):
        latent_shape(64, 60, 9)
    with pytest.raises(InputError, match="batch_size is 0"):
        latent_shape(64, 64, 9, batch_size=0)
