"""What a model can be given beside the caption: from a row's columns, or the clip itself, to inference's conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.camera import CameraCondition
from ..adapters.control import ControlCondition, control_condition
from ..adapters.image import Encode, ImageCondition, Look, image_condition
from ..adapters.injection import Condition
from ..adapters.reference import ReferenceCondition, reference_condition
from ..adapters.speed import SpeedCondition
from ..adapters.vace import VACECondition, vace_condition
from ..errors import InputError
from ..fit import fit_length, fit_pictures
from ..size import latent_shape, pixel_size
from ..trajectory import trajectory
from .clips import is_picture, read_clip, read_picture
from .dataset import Item
from .framing import Cut

USUAL_CAMERA_SPEED = 1 / 54


@dataclass(frozen=True)
class Input:
    """An extra input: the condition it belongs to, what it is, and whether a row can do without.

    form   clip: as long as the row's own; mask: that, of black and white; picture: brought to the clip's size;
           whole: pictures of which nothing is cut off; value: a number or text
    """

    condition: str
    form: str
    needed: bool = True


# By DiffSynth-Studio's names. input_image and end_image are the clip's first and last frame where no column has them.
INPUTS = {
    "input_image": Input("image", "picture", needed=False),
    "end_image": Input("image", "picture", needed=False),
    "control_video": Input("control", "clip"),
    "reference_image": Input("reference", "picture"),
    "camera_control_direction": Input("camera", "value"),
    "camera_control_speed": Input("camera", "value", needed=False),
    "camera_control_origin": Input("camera", "value", needed=False),
    "vace_video": Input("vace", "clip", needed=False),
    "vace_video_mask": Input("vace", "mask", needed=False),
    "vace_reference_image": Input("vace", "whole", needed=False),
    "motion_bucket_id": Input("speed", "value"),
}
FROM_CLIP = {"input_image": slice(0, 1), "end_image": slice(-1, None)}  # of its frames


def check_inputs(names: Sequence[str]) -> None:
    for name in names:
        if name not in INPUTS:
            raise InputError(f"There is no extra input '{name}'. Choose of {', '.join(INPUTS)}.")


def columns(names: Sequence[str]) -> dict[str, bool]:
    """The columns that these inputs are in, and whether files are in them."""
    return {name: INPUTS[name].form != "value" for name in names if name in INPUTS}


@dataclass(frozen=True)
class Piece:
    """A piece of an item's clip, and of what lies beside it; `mirrored`: left and right are exchanged."""

    item: Item
    cut: Cut
    frame_rate: float
    mirrored: bool = False

    def files(self, names: Sequence[str]) -> dict[str, tuple[Path, ...]]:
        """The files of those of the inputs that are pictures or clips."""
        given = {name: self.item.columns.get(name) for name in names if INPUTS[name].form != "value"}
        return {name: value if isinstance(value, tuple) else (value,) for name, value in given.items() if value}


@dataclass(frozen=True)
class Footage:
    """The pixels of a piece in 0..1: its clip (F, H, W, 3), and its extra inputs by name, as long or single frames."""

    clip: Tensor
    beside: Mapping[str, Tensor]

    @property
    def latent_size(self) -> tuple[int, int, int]:
        frames, height, width, _ = self.clip.shape
        return latent_shape(width, height, frames)[2:]


def read_footage(piece: Piece, names: Sequence[str]) -> Footage:
    """Raises FileError for what cannot be read."""

    def seen(pixels: Tensor) -> Tensor:
        return pixels.flip(2) if piece.mirrored else pixels

    clip = seen(read_piece(piece, piece.item.file))
    beside = {name: clip[FROM_CLIP[name]] for name in names if name in FROM_CLIP}
    for name, files in piece.files(names).items():
        beside[name] = seen(torch.cat([READERS[INPUTS[name].form](piece, file) for file in files]))
    return Footage(clip, beside)


def read_piece(piece: Piece, file: Path) -> Tensor:
    cut = piece.cut
    return read_clip(file, piece.frame_rate, cut.start, cut.frames, (cut.width, cut.height))


def read_mask(piece: Piece, file: Path) -> Tensor:
    """White where the video is made anew. A picture is for all frames."""
    return fit_length((read_piece(piece, file)[..., :1] > 0.5).float(), piece.cut.frames)


def read_fitted(piece: Piece, file: Path, fit: str = "cover", background: float = 0.0) -> Tensor:
    """A picture, or the first frame of a clip."""
    picture = read_picture(file) if is_picture(file) else read_clip(file, 0, 0, 1)
    return fit_pictures(picture, piece.cut.width, piece.cut.height, fit, background)


def read_whole(piece: Piece, file: Path) -> Tensor:
    return read_fitted(piece, file, "contain", background=1.0)


READERS: dict[str, Callable[[Piece, Path], Tensor]] = {
    "clip": read_piece,
    "mask": read_mask,
    "picture": read_fitted,
    "whole": read_whole,
}


# ---------------------------------------------------------------- conditions that were encoded, one row each

Make = Callable[[Footage, Encode, Look | None], Condition]


def image(footage: Footage, encode: Encode, look: Look | None) -> ImageCondition:
    given = (footage.beside.get(name) for name in ("input_image", "end_image"))
    return image_condition(*given, footage.latent_size, encode, look)


def control(footage: Footage, encode: Encode, look: Look | None) -> ControlCondition:
    return control_condition(footage.beside["control_video"], encode)


def reference(footage: Footage, encode: Encode, look: Look | None) -> ReferenceCondition:
    return reference_condition(footage.beside["reference_image"], encode, look)


def vace(footage: Footage, encode: Encode, look: Look | None) -> VACECondition:
    beside = footage.beside
    mask = beside["vace_video_mask"][..., 0] if "vace_video_mask" in beside else None
    video, pictures = beside.get("vace_video"), beside.get("vace_reference_image")
    return vace_condition(video, mask, pictures, footage.latent_size, encode)


@dataclass(frozen=True)
class Encoded:
    """How a condition is made, its class, and whether it is looked at by the image encoder too."""

    make: Make
    kind: type[Condition]
    looks: bool = False


ENCODED = {
    "image": Encoded(image, ImageCondition, looks=True),
    "control": Encoded(control, ControlCondition),
    "reference": Encoded(reference, ReferenceCondition, looks=True),
    "vace": Encoded(vace, VACECondition),
}


def looked_at(names: Sequence[str]) -> list[str]:
    """Those of the inputs that models look at with the image encoder."""
    return [name for name in names if (kind := ENCODED.get(INPUTS[name].condition)) and kind.looks]


# ---------------------------------------------------------------- conditions that are a few values


def camera(values: Mapping[str, Any], frames: int) -> CameraCondition:
    speed, origin = values.get("camera_control_speed"), values.get("camera_control_origin", "")
    speed = USUAL_CAMERA_SPEED if speed is None else number(speed, "camera_control_speed")
    origin = origin if isinstance(origin, str) else " ".join(map(str, origin))
    return CameraCondition(trajectory(str(values["camera_control_direction"]), speed, frames, origin))


def speed(values: Mapping[str, Any], frames: int) -> SpeedCondition:
    return SpeedCondition(number(values["motion_bucket_id"], "motion_bucket_id"))


VALUES: dict[str, Callable[[Mapping[str, Any], int], Condition]] = {"camera": camera, "speed": speed}


def value_conditions(values: Mapping[str, Any], latent_frames: int) -> list[Condition]:
    """The conditions that a row's values (by the names of their inputs) describe, for a clip of this length.

    Raises InputError for values that cannot be.
    """
    frames, _, _ = pixel_size(latent_frames, 1, 1)
    given = {INPUTS[name].condition for name in values}
    return [make(values, frames) for name, make in VALUES.items() if name in given]


def number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}, which is no number.") from error
