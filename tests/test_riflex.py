"""RIFLEx: the frequency that would turn round within a long video is slowed, and no other."""

import math

import numpy as np
import pytest
import torch
from comfyui_wanflow.nodes.speed_up import SlowPositions
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.models.rope import rope_table
from comfyui_wanflow.wan_core.sampling.windows import Windows
from families import model, relative_error, video

CPU = torch.device("cpu")
WITHIN = {4: 22, 5: 33, 6: 50, 7: 77}  # latent frames in one turn


def by_the_paper(frames, height, width, number):
    """Equation 8 with the authors' nine tenths, in numpy: the angles of every token, (frames * height * width, 64)."""
    bands = [10000.0 ** (-2 * np.arange(count) / (2 * count)) for count in (22, 21, 21)]
    if frames > 2 * np.pi / bands[0][number - 1]:
        bands[0][number - 1] = 0.9 * 2 * np.pi / frames
    rows = [
        np.concatenate([frame * bands[0], row * bands[1], column * bands[2]])
        for frame in range(frames) for row in range(height) for column in range(width)
    ]  # fmt: skip
    return np.array(rows)


@pytest.mark.parametrize("frames, number", [(21, 6), (50, 6), (51, 6), (81, 6), (33, 5), (34, 5), (81, 7), (41, 4)])
def test_the_numbers_of_the_paper(frames, number):
    angles = by_the_paper(frames, 2, 3, number)
    found = rope_table(frames, 2, 3, 128, CPU, number)[:, 0].numpy()
    np.testing.assert_allclose(found, np.exp(1j * angles), atol=2e-6)


@pytest.mark.parametrize("number", WITHIN)
def test_only_that_one_and_only_in_long_videos(number):
    for frames, slowed in ((WITHIN[number], False), (WITHIN[number] + 1, True)):
        plain, found = (rope_table(frames, 1, 2, 128, CPU, riflex) for riflex in (0, number))
        different = (plain != found).any(dim=0).flatten().nonzero().flatten().tolist()
        assert different == ([number - 1] if slowed else [])
        if slowed:
            turn = found[-1, 0, number - 1].angle() % (2 * math.pi)
            assert turn.item() == pytest.approx(0.9 * 2 * math.pi * (frames - 1) / frames, abs=1e-4)


def test_in_a_run():
    """The first frequency turns round in 6.3 frames."""
    wan, long = model("T2V"), torch.zeros(1, 16, 7, 4, 6)
    slowed = wan.with_riflex(1)
    assert relative_error(video(slowed, latent=long), video(wan, latent=long)) > 1e-3
    short = long[:, :, :6]
    assert torch.equal(video(slowed, latent=short), video(wan, latent=short))
    cut = Windows(5, 4)  # in windows what counts is what the model sees at once
    assert torch.equal(video(slowed.with_windows(cut), latent=long), video(wan.with_windows(cut), latent=long))
    assert torch.equal(video(slowed.with_riflex(0), latent=long), video(wan, latent=long))


@pytest.mark.parametrize("condition, longer", [("VACE video", False), ("VACE pictures", True)])
def test_pictures_in_front_count(condition, longer):
    """5 latent frames, with two pictures 7."""
    wan = model("VACE")
    assert torch.equal(video(wan.with_riflex(1), condition), video(wan, condition)) != longer


def test_the_node():
    wan = model("T2V")
    (slowed,) = SlowPositions.execute(wan, 6).args
    assert slowed.riflex == 6 and wan.riflex == 0
    with pytest.raises(InputError, match="frequency 23, but 12 of this model's.*from 1 to 12"):
        SlowPositions.execute(wan, 23)
