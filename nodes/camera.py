"""Menu WanFlow/conditions: how the camera moves."""

from __future__ import annotations

import hashlib

from ..wan_core.adapters.camera import CameraCondition
from ..wan_core.size import pixel_size
from ..wan_core.trajectory import DIRECTIONS, ORIGIN, Trajectory, read_trajectory, trajectory
from ..wan_core.viewfinder import view
from .condition import conditions_input, conditions_output, latent_input, latent_size
from .host import host, io

ORIGIN_TOOLTIP = (
    "The lens and the first pose: 19 numbers (time, fx, fy, cx, cy, 0, 0, then the 3x4 matrix from world to camera), "
    f"usually {' '.join(f'{number:g}' for number in ORIGIN)}. Empty: what is usual for the direction."
)


class Camera(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowCamera",
            display_name="Wan Camera",
            category="WanFlow/conditions",
            description="Moves the camera. For Control-Camera models, together with Wan First / Last Image, "
            "which gives the picture to start from.",
            inputs=[
                latent_input(),
                io.Combo.Input(
                    "direction",
                    options=list(DIRECTIONS),
                    default="Left",
                    tooltip="Left ... Out: the numbers of the Fun models. pan ... orbit: true camera moves. "
                    "ComfyUI ...: as ComfyUI's own camera node.",
                ),
                io.Float.Input(
                    "speed",
                    default=0.01,
                    min=-10.0,
                    max=10.0,
                    step=0.001,
                    round=0.00001,
                    tooltip="What every frame adds: 0.01 is gentle, 1/54 is DiffSynth's default. "
                    "For ComfyUI's moves the amount of the whole clip: 1 is usual.",
                ),
                io.String.Input("origin", optional=True, default="", tooltip=ORIGIN_TOOLTIP),
                io.String.Input(
                    "trajectory",
                    optional=True,
                    default="",
                    multiline=True,
                    tooltip="Your own way instead of a direction: lines of 19 numbers as in RealEstate10K and "
                    "CameraCtrl, or the name of a .txt file in the input folder that holds them.",
                ),
                conditions_input(),
            ],
            outputs=[
                conditions_output(),
                io.Image.Output(
                    display_name="preview", tooltip="What the camera sees on this way in a room with checkered walls."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, trajectory="", **_):
        return hashlib.sha256(trajectory_text(trajectory).encode()).hexdigest()

    @classmethod
    def execute(cls, latent, direction, speed, origin="", trajectory="", conditions=()):
        frames, height, width = pixel_size(*latent_size(latent))
        path = camera_path(direction, speed, origin, trajectory_text(trajectory), frames)
        pictures = view(path, height, width)
        return io.NodeOutput((*conditions, CameraCondition(path)), pictures.to(host.intermediate_device()))


def trajectory_text(given: str) -> str:
    """The text itself, or what is in the file that it names."""
    given = given.strip()
    if given.endswith(".txt") and "\n" not in given:
        return host.input_path(given).read_text(encoding="utf-8", errors="replace")
    return given


def camera_path(direction: str, speed: float, origin: str, text: str, frames: int) -> Trajectory:
    """The way that the text describes if there is one, else that of the direction."""
    if not text:
        return trajectory(direction, speed, frames, origin)
    path, note = read_trajectory(text, frames)
    if note:
        host.say(note)
    return path


NODES = [Camera]
