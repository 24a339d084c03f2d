"""The ways of a camera: against the reference's rays, against ComfyUI's, and as rigid moves."""

import math
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.trajectory import COMFYUI, DIRECTIONS, LENS, MOVES, ORIGIN, read_trajectory, trajectory
from comfyui_wanflow.wan_core.viewfinder import view
from safetensors.torch import load_file

RAYS = load_file(Path(__file__).parent / "data" / "golden" / "camera_rays.safetensors")
PLUECKER = {name.removeprefix("plucker_"): rays for name, rays in RAYS.items() if name.startswith("plucker_")}

# (o x d, d) of frame 8 of 9 at row 40, column 7 of a picture 48 high and 32 wide, speed 1.3, from ComfyUI's
# WanCameraEmbedding.
COMFYUI_RAYS = {
    "ComfyUI Static": [0.0, 0.0, 0.0, -0.161996, 0.559046, 0.813157],
    "ComfyUI Pan Up": [-1.409473, 0.0, -0.280793, -0.161996, 0.559046, 0.813157],
    "ComfyUI Pan Down": [1.409473, 0.0, 0.280793, -0.161996, 0.559046, 0.813157],
    "ComfyUI Pan Left": [0.0, 1.409473, -0.969013, -0.161996, 0.559046, 0.813157],
    "ComfyUI Pan Right": [0.0, -1.409473, 0.969013, -0.161996, 0.559046, 0.813157],
    "ComfyUI Zoom In": [-1.938025, -0.561587, 0.0, -0.161996, 0.559046, 0.813157],
    "ComfyUI Zoom Out": [1.938025, 0.561587, 0.0, -0.161996, 0.559046, 0.813157],
    "ComfyUI Anti Clockwise (ACW)": [0.0, 0.0, 0.0, 0.465897, 0.348876, 0.813157],
    "ComfyUI ClockWise (CW)": [0.0, 0.0, 0.0, -0.580244, 0.045733, 0.813157],
}


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("direction", PLUECKER)
def test_presets_are_the_reference_s_rays(direction):
    got = trajectory(direction, 0.01, 9).rays(0, 9, 32, 48)[:, ::4, ::4]  # every fourth pixel was kept
    assert relative_error(got, PLUECKER[direction]) < 1e-6


@pytest.mark.parametrize("direction", COMFYUI)
def test_comfyui_s_moves_are_comfyui_s_rays(direction):
    got = trajectory(direction, 1.3, 9).rays(8, 9, 48, 32)[0, 40, 7]
    torch.testing.assert_close(got, torch.tensor(COMFYUI_RAYS[direction]), rtol=0, atol=2e-6)


def seen(direction, point, speed=0.1, frames=5):
    """Where in the last frame (x, y in pixels, of 160 x 90) a point of the scene is seen."""
    path = trajectory(direction, speed, frames)
    inside = torch.linalg.inv(path.poses[-1]) @ torch.tensor([*point, 1.0], dtype=torch.float64)
    x, y, z = (inside[:3] / inside[2]).tolist()
    assert inside[2] > 0 and z == 1
    focal = path.lenses[-1]
    return x * focal[0].item() * 160 + 80, y * focal[1].item() * 90 + 45


AHEAD = (0.0, 0.0, 5.0)


@pytest.mark.parametrize(
    ("direction", "axis", "sign"),
    [
        ("pan left", 0, 1), ("pan right", 0, -1), ("tilt up", 1, 1), ("tilt down", 1, -1),
        ("truck left", 0, 1), ("truck right", 0, -1), ("pedestal up", 1, 1), ("pedestal down", 1, -1),
        ("Left", 0, 1), ("Right", 0, -1), ("Up", 1, 1), ("Down", 1, -1),
        ("ComfyUI Pan Left", 0, 1), ("ComfyUI Pan Up", 1, 1),
    ],
)  # fmt: skip
def test_the_scene_moves_against_the_camera(direction, axis, sign):
    moved = seen(direction, AHEAD)
    assert sign * (moved[axis] - (80, 45)[axis]) > 1
    assert moved[1 - axis] == pytest.approx((80, 45)[1 - axis])


@pytest.mark.parametrize("direction", ["dolly in", "zoom in", "In", "ComfyUI Zoom In"])
def test_things_grow_when_the_camera_comes_near(direction):
    out = {"dolly in": "dolly out", "zoom in": "zoom out", "In": "Out", "ComfyUI Zoom In": "ComfyUI Zoom Out"}
    beside = (1.0, 0.0, 5.0)
    still = "ComfyUI Static" if direction.startswith("ComfyUI") else "still"  # each with its own lens
    assert seen(direction, beside)[0] > seen(still, beside)[0] > seen(out[direction], beside)[0] > 80


def test_rolling_turns_the_picture_the_other_way():
    right = (1.0, 0.0, 5.0)
    assert seen("roll right", right)[1] < 45 < seen("roll left", right)[1]
    assert seen("ComfyUI ClockWise (CW)", right)[1] < 45


@pytest.mark.parametrize("direction", ["orbit left", "orbit right", "orbit up", "orbit down"])
def test_orbits_look_at_their_middle(direction):
    assert seen(direction, (0.0, 0.0, 1.0)) == pytest.approx((80, 45))
    axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[direction.split()[1]]
    place = trajectory(direction, 0.1, 5).poses[-1, :3, 3]
    assert place[axis] * sign > 0.3 and (place - torch.tensor([0, 0, 1])).norm() == pytest.approx(1)


@pytest.mark.parametrize("direction", [*MOVES, *COMFYUI])
def test_moves_are_rigid_and_begin_at_rest(direction):
    path = trajectory(direction, 0.05, 9)
    turns = path.poses[:, :3, :3]
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3, dtype=torch.float64).expand(9, -1, -1))
    assert turns.det() == pytest.approx(torch.ones(9))
    torch.testing.assert_close(path.poses[0], torch.eye(4, dtype=torch.float64))
    still = torch.equal(path.rays(8, 9, 9, 16), path.rays(0, 1, 9, 16))
    assert still == (direction in ("still", "ComfyUI Static"))


def test_speed_is_what_a_frame_adds():
    poses = trajectory("pan right", 0.02, 81).poses
    angles = torch.atan2(poses[:, 0, 2], poses[:, 2, 2])
    torch.testing.assert_close(angles, 0.02 * torch.arange(81, dtype=torch.float64))
    assert trajectory("dolly in", -0.02, 3).poses[2, 2, 3] == pytest.approx(-0.04)


# ---- texts ------------------------------------------------------------------------------------------------------


def line_of(world_to_camera, time=0):
    return " ".join(map(str, [time, *LENS, 0, 0, *world_to_camera[:3].flatten().tolist()]))


def test_a_text_gives_the_same_rays_as_the_move_it_describes():
    """RealEstate10K's matrices lead from any world to the camera; only what changes against frame 0 counts."""
    move = trajectory("orbit left", 0.05, 9)
    world = trajectory("tilt up", 0.3, 3).poses[2]
    world[:3, 3] = torch.tensor([4.0, -2.0, 1.0])
    lines = [line_of(torch.linalg.inv(world @ pose), i * 40000) for i, pose in enumerate(move.poses)]
    path, note = read_trajectory("https://www.youtube.com/watch?v=x\n\n# times\n" + "\n".join(lines), 9)
    assert note is None
    torch.testing.assert_close(path.rays(0, 9, 9, 16), move.rays(0, 9, 9, 16), rtol=1e-5, atol=1e-6)


def test_other_lengths_are_spread_over_the_video():
    move = trajectory("pan left", 0.1, 5)
    path, note = read_trajectory("\n".join(line_of(torch.linalg.inv(pose)) for pose in move.poses), 17)
    assert "5 poses was spread over the 17 frames" in note
    torch.testing.assert_close(path.poses, trajectory("pan left", 0.1 / 4, 17).poses, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(path.poses[::4], move.poses)
    fewer, _ = read_trajectory("\n".join(line_of(torch.linalg.inv(pose)) for pose in move.poses), 3)
    torch.testing.assert_close(fewer.poses, move.poses[::2])
    still, _ = read_trajectory(line_of(torch.eye(4)), 5)
    torch.testing.assert_close(still.poses, torch.eye(4, dtype=torch.float64).expand(5, -1, -1))


def test_origin_sets_lens_and_first_pose():
    usual = trajectory("Up", 0.01, 5)
    said = trajectory("Up", 0.01, 5, "(" + ", ".join(map(str, ORIGIN)) + ")")
    torch.testing.assert_close(said.poses, usual.poses)
    wide = trajectory("pan left", 0.01, 5, line_of(torch.eye(4)).replace(str(LENS[0]), "0.25"))
    assert wide.lenses[:, 0].tolist() == [0.25] * 5
    assert trajectory("ComfyUI Pan Left", 1, 5).lenses[0].tolist() == [0.5] * 4


def test_a_lens_keeps_what_it_sees_of_the_shorter_way():
    path = trajectory("still", 0, 1)
    wide, tall = path.rays(0, 1, 90, 160), path.rays(0, 1, 160, 90)
    assert wide[0, 45, -1, 3] / wide[0, 45, -1, 5] == pytest.approx((159.5 - 80) / (LENS[0] * 160))
    # of a tall picture the height sees what it saw, and pixels stay square (this lens's are within a thousandth)
    assert tall[0, -1, 45, 4] / tall[0, -1, 45, 5] == pytest.approx((159.5 - 80) / (LENS[1] * 160))
    assert tall[0, 80, -1, 3] / tall[0, 80, -1, 5] == pytest.approx((89.5 - 45) / (LENS[1] * 160), rel=1e-3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no pose"),
        ("https://example.org\n", "holds no pose"),
        ("0 1 1 0.5", "Line 1 of the trajectory must be 19 numbers .* it is '0 1 1 0.5'"),
        (line_of(torch.eye(4)) + "\n" + line_of(torch.eye(4)) + " 7", "Line 2 of the trajectory"),
        (line_of(torch.eye(4)).replace("0.5", "half"), "Line 1"),
        (line_of(torch.eye(4)).replace("0.5", "nan"), "Line 1"),
        (line_of(torch.eye(4)).replace(str(LENS[0]), "0"), "fx and fy above 0"),
        (line_of(torch.zeros(4, 4)), "cannot be inverted"),
    ],
)
def test_broken_texts_are_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        read_trajectory(text, 5)


def test_broken_choices_are_refused():
    with pytest.raises(InputError, match="no direction 'sideways'. Choose one of Left, "):
        trajectory("sideways", 0.01, 5)
    with pytest.raises(InputError, match="speed is nan"):
        trajectory("Left", math.nan, 5)
    with pytest.raises(InputError, match="origin must be 19 numbers"):
        trajectory("Left", 0.01, 5, "1 2 3")


# ---- the room ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_move_can_be_looked_at(direction):
    pictures = view(trajectory(direction, 0.37, 5), 480, 832)
    assert pictures.shape == (5, 148, 256, 3) and 0 <= pictures.min() and pictures.max() <= 1
    moved = (pictures[4] - pictures[0]).abs().mean() > 0.02
    assert moved == (direction not in ("still", "ComfyUI Static"))


def test_the_room_shows_what_the_rays_say():
    """Coming nearer, the tiles of the wall ahead grow: fewer edges are left in the middle row."""

    def edges(direction):
        row = view(trajectory(direction, 0.6, 5), 144, 256)[4, 72].mean(dim=-1)
        return (row.diff().abs() > 0.1).sum()

    assert edges("dolly in") < edges("still") <= edges("dolly out")
