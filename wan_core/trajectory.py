"""The ways a camera can move: pose and lens of every frame, from a named move or from a text.

Coordinates are those of OpenCV: x to the right, y down, z ahead. A pose (4, 4) leads from the camera of its frame to
the camera of frame 0, which stands at the origin. A lens is (fx, fy, cx, cy) in fractions of the picture's width and
height, for a picture of 16:9; 'fitted' to a canvas of another shape it keeps what it sees of the shorter way.

Three families of moves, all with weights that were trained on rays in this form:

- `PRESETS`, the numbers of DiffSynth-Studio and VideoX-Fun ("Left"): they bend the pose's rotation block, which is
  close to a turn while it is small, but no rotation;
- `MOVES`, rigid moves as camera operators name them;
- `COMFYUI`, rigid moves too, with the names, lens and measure of ComfyUI's WanCameraEmbedding.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError

LENS = (0.532139961, 0.946026558, 0.5, 0.5)
COMFYUI_LENS = (0.5, 0.5, 0.5, 0.5)
LENS_ASPECT = 1280 / 720  # of the pictures that lenses are given for

# RealEstate10K's line: time, lens, two zeros, and the upper three rows of the matrix from world to camera.
ORIGIN = (0.0, *LENS, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)

# What is added to the world-to-camera matrix in every frame: (row, column), sign.
BENDS = {"Left": (0, 2, 1), "Right": (0, 2, -1), "Up": (1, 2, 1), "Down": (1, 2, -1), "In": (2, 3, -1),
         "Out": (2, 3, 1)}  # fmt: skip
PRESETS = ("Left", "Right", "Up", "Down", "LeftUp", "LeftDown", "RightUp", "RightDown", "In", "Out")


@dataclass(frozen=True)
class Move:
    """What the camera does in one unit of way: turn (radians about an axis), shift, and zoom (in e-folds).

    It turns about a point `pivot` ahead of it, 0 for itself.
    """

    turn: tuple[float, float, float] = (0, 0, 0)
    shift: tuple[float, float, float] = (0, 0, 0)
    zoom: float = 0
    pivot: float = 0


MOVES = {
    "still": Move(),
    "pan left": Move(turn=(0, -1, 0)),
    "pan right": Move(turn=(0, 1, 0)),
    "tilt up": Move(turn=(1, 0, 0)),
    "tilt down": Move(turn=(-1, 0, 0)),
    "roll left": Move(turn=(0, 0, -1)),
    "roll right": Move(turn=(0, 0, 1)),
    "truck left": Move(shift=(-1, 0, 0)),
    "truck right": Move(shift=(1, 0, 0)),
    "pedestal up": Move(shift=(0, -1, 0)),
    "pedestal down": Move(shift=(0, 1, 0)),
    "dolly in": Move(shift=(0, 0, 1)),
    "dolly out": Move(shift=(0, 0, -1)),
    "zoom in": Move(zoom=1),
    "zoom out": Move(zoom=-1),
    "orbit left": Move(turn=(0, 1, 0), pivot=1),
    "orbit right": Move(turn=(0, -1, 0), pivot=1),
    "orbit up": Move(turn=(-1, 0, 0), pivot=1),
    "orbit down": Move(turn=(1, 0, 0), pivot=1),
}
# Of the whole clip at speed 1.
COMFYUI = {
    "ComfyUI Static": Move(),
    "ComfyUI Pan Up": Move(shift=(0, -1.5, 0)),
    "ComfyUI Pan Down": Move(shift=(0, 1.5, 0)),
    "ComfyUI Pan Left": Move(shift=(-1.5, 0, 0)),
    "ComfyUI Pan Right": Move(shift=(1.5, 0, 0)),
    "ComfyUI Zoom In": Move(shift=(0, 0, 3)),
    "ComfyUI Zoom Out": Move(shift=(0, 0, -3)),
    "ComfyUI Anti Clockwise (ACW)": Move(turn=(0, 0, -math.pi / 3)),
    "ComfyUI ClockWise (CW)": Move(turn=(0, 0, math.pi / 3)),
}
DIRECTIONS = (*PRESETS, *MOVES, *COMFYUI)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """`poses` (F, 4, 4) and `lenses` (F, 4), fp64, one a frame."""

    poses: Tensor
    lenses: Tensor

    def __len__(self) -> int:
        return len(self.poses)

    def rays(self, start: int, stop: int, height: int, width: int) -> Tensor:
        """Pluecker coordinates (stop - start, height, width, 6) fp32 of the rays through the centres of all pixels.

        A ray from o with direction d is (o x d, d). Sitzmann et al., "Light Field Networks", arXiv 2106.02634; as
        camera control: He et al., "CameraCtrl", arXiv 2404.02101.
        """
        poses = self.poses[start:stop].float()
        fx, fy, cx, cy = fitted(self.lenses[start:stop], height, width).float().unbind(1)
        x = (torch.arange(width) + 0.5 - cx[:, None]) / fx[:, None]  # (F, width)
        y = (torch.arange(height) + 0.5 - cy[:, None]) / fy[:, None]
        frames = len(poses)
        x, y = x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)
        directions = torch.stack([x, y, torch.ones(frames, height, width)], dim=-1)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        directions = torch.einsum("fij,fhwj->fhwi", poses[:, :3, :3], directions)
        origins = poses[:, None, None, :3, 3].expand_as(directions)
        return torch.cat([torch.linalg.cross(origins, directions), directions], dim=-1)


def fitted(lenses: Tensor, height: int, width: int) -> Tensor:
    """Lenses (F, 4) in fractions, for 16:9 -> in pixels, for a picture of this size."""
    fx, fy, cx, cy = lenses.unbind(1)
    if width / height < LENS_ASPECT:
        fx = fx * (height * LENS_ASPECT / width)
    else:
        fy = fy * (width / LENS_ASPECT / height)
    return torch.stack([fx * width, fy * height, cx * width, cy * height], dim=1)


def trajectory(direction: str, speed: float, frames: int, origin: str = "") -> Trajectory:
    """`frames` frames of a named move.

    speed is what a frame adds: of a preset to the matrix, of a move to its turn in radians or its shift in units of
    the scene. ComfyUI's moves take it for the whole clip instead, as ComfyUI does, and 1 is usual.
    origin: a line as in RealEstate10K, with the lens and (for presets) the first matrix; empty for the family's own.
    """
    if not math.isfinite(speed):
        raise InputError(f"speed is {speed}. Enter a number; 0.01 moves gently.")
    if direction not in DIRECTIONS:
        raise InputError(f"There is no direction {direction!r}. Choose one of {', '.join(DIRECTIONS)}.")
    usual = (0.0, *COMFYUI_LENS, *ORIGIN[5:]) if direction in COMFYUI else ORIGIN
    line = numbers(origin, "origin") if origin.strip() else usual
    lenses, way = lens_of(line, frames), torch.arange(frames, dtype=torch.float64) * speed
    if direction in PRESETS:
        return Trajectory(relative(bent_matrices(direction, way, line)), lenses)
    if direction in COMFYUI:
        return moved(COMFYUI[direction], way / frames, lenses)
    return moved(MOVES[direction], way, lenses)


def bent_matrices(direction: str, way: Tensor, line: tuple[float, ...]) -> Tensor:
    """World to camera, (F, 4, 4): the line's matrix, with some entries growing by the way (F,)."""
    matrices = matrix_of(line).repeat(len(way), 1, 1)
    for part in re.findall("[A-Z][a-z]+", direction):
        row, column, sign = BENDS[part]
        matrices[:, row, column] += sign * way
    return matrices


def moved(move: Move, way: Tensor, lenses: Tensor) -> Trajectory:
    """The move after each of the ways (F,)."""
    turns = rotations(move.turn, way)
    pivot = torch.tensor([0, 0, move.pivot], dtype=torch.float64)
    poses = torch.eye(4, dtype=torch.float64).repeat(len(way), 1, 1)
    poses[:, :3, :3] = turns
    poses[:, :3, 3] = way[:, None] * torch.tensor(move.shift, dtype=torch.float64) + pivot - turns @ pivot
    zoom = torch.exp(move.zoom * way)
    return Trajectory(poses, lenses * torch.stack([zoom, zoom, torch.ones_like(way), torch.ones_like(way)], dim=1))


def rotations(axis: tuple[float, float, float], angles: Tensor) -> Tensor:
    """(F, 3, 3) for angles (F,) in radians; a right hand's thumb along the axis shows the sense."""
    x, y, z = axis
    spin = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(angles[:, None, None] * spin)


def relative(world_to_camera: Tensor) -> Tensor:
    """(F, 4, 4) from the world to each camera -> from each camera to that of frame 0."""
    poses = world_to_camera[0] @ torch.linalg.inv(world_to_camera)
    poses[0] = torch.eye(4, dtype=poses.dtype)
    return poses


def read_trajectory(text: str, frames: int) -> tuple[Trajectory, str | None]:
    """A text as RealEstate10K and CameraCtrl write it, spread over `frames` frames, and a sentence if it had more or
    fewer. One line a pose, as `ORIGIN`; a first line with an address, empty lines and lines after "#" are left out.
    """
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip() and line.lstrip()[0] != "#"]
    if lines and re.match(r"\s*[A-Za-z]", lines[0][1]):
        lines = lines[1:]
    if not lines:
        raise InputError(f"The trajectory holds no pose. Give lines of {len(ORIGIN)} numbers, as RealEstate10K has.")
    poses = [numbers(line, f"Line {i} of the trajectory") for i, line in lines]
    matrices = torch.stack([matrix_of(pose) for pose in poses])
    if (matrices.det().abs() < 1e-9).any():
        raise InputError("The trajectory holds a matrix that cannot be inverted. Export the poses again.")
    path = Trajectory(relative(matrices), torch.cat([lens_of(pose, 1) for pose in poses]))
    if len(path) == frames:
        return path, None
    note = f"The trajectory of {len(path)} poses was spread over the {frames} frames of the video."
    return spread(path, frames), note


def spread(path: Trajectory, frames: int) -> Trajectory:
    """The same way in another number of frames, at an even pace."""
    places = torch.linspace(0, len(path) - 1, frames, dtype=torch.float64)
    before = places.floor().long()
    after = (before + 1).clamp(max=len(path) - 1)
    share = (places - before)[:, None]
    lenses = torch.lerp(path.lenses[before], path.lenses[after], share)
    poses = torch.lerp(path.poses[before], path.poses[after], share[:, None])
    between = share[:, 0] > 0
    left, _, right = torch.linalg.svd(poses[between, :3, :3])  # the mean of two rotations, made one again
    poses[between, :3, :3] = left @ right
    return Trajectory(poses, lenses)


def numbers(line: str, name: str) -> tuple[float, ...]:
    """The 19 numbers of a line, between blanks or commas; `name` says in errors where it comes from."""
    words = re.split(r"[\s,;]+", line.strip().strip("()[]").strip())
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        values = ()
    if len(values) != len(ORIGIN) or not all(map(math.isfinite, values)) or values[1] <= 0 or values[2] <= 0:
        raise InputError(
            f"{name} must be {len(ORIGIN)} numbers (time, fx, fy, cx, cy, 0, 0, and the 3x4 matrix from world to "
            f"camera row by row), with fx and fy above 0, but it is '{line.strip()[:60]}'."
        )
    return values


def matrix_of(line: tuple[float, ...]) -> Tensor:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3] = torch.tensor(line[7:], dtype=torch.float64).view(3, 4)
    return matrix


def lens_of(line: tuple[float, ...], frames: int) -> Tensor:
    return torch.tensor([line[1:5]], dtype=torch.float64).repeat(frames, 1)
