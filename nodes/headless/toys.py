"""What stands in the toy world for what a workflow has: models, pictures, captions and settings. Only data.

Used by twin.py; the pictures are drawn by example_workflows/inputs.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...wan_core.loading.catalog import BY_NAME
from ...wan_core.tiny.world import Scene

TOY = "WanTiny-T2V"
DISTILLED = "WanTiny-T2V-4steps"  # the LoRA, and the settings, for those that make do with a few steps
PRESET = BY_NAME[TOY].preset

# What the name of a model of each kind has in it, or what is read from its tensors; the first that fits.
MODELS = {
    "camera": "WanTiny-Fun-V1.1-Control-Camera",
    "speed.?control": "WanTiny-speedcontrol",
    "vace": "WanTiny-VACE",
    "v1.?1.*control|control.*v1.?1": "WanTiny-Fun-V1.1-Control",
    "control": "WanTiny-Fun-Control",
    "(?<![a-z])inp(?![a-z])": "WanTiny-Fun-InP",
    "flf2v|first-last": "WanTiny-FLF2V",
    "i2v|image to video": "WanTiny-I2V",
    "t2v|text to video": TOY,
}

# ---------------------------------------------------------------- what is shown to the toys, and told

UNSEEN = Scene("green", "triangle", "down", "yellow")  # a combination of the tenth that no toy was trained on
BALL = Scene("red", "circle", "left", "blue", radius=0.23, travel=0.35)
STILL = replace(BALL, travel=0.0)  # a camera moves instead
BLOCK = Scene("yellow", "square", "up", "purple", radius=0.23, travel=0.35)
SUBJECT = Scene("green", "square", "up", "white", radius=0.23, travel=0.0)
HIDDEN = Scene("orange", "triangle", "right", "black", radius=0.23, travel=0.35)

# The files, below the input folder, for each input that takes pictures.
PICTURES = {
    ("WanFlowImageToVideo", "start_image"): "tiny/first.webp",
    ("WanFlowImageToVideo", "end_image"): "tiny/last.webp",
    ("WanFlowVAEEncode", "images"): "tiny/clip.webp",
    ("WanFlowControlVideo", "control_video"): "tiny/outlines.webp",
    ("WanFlowReferenceImage", "image"): "tiny/subject.webp",
    ("WanFlowVACE", "video"): "tiny/outlines.webp",
    ("WanFlowVACE", "mask"): "tiny/mask.webp",
    ("WanFlowVACE", "reference_image"): "tiny/subject.webp",
}
WITH_A_CAMERA = {("WanFlowImageToVideo", "start_image"): "tiny/still.webp"}
WITH_A_MASK = {("WanFlowVACE", "video"): "tiny/hole.webp"}

# The caption where an input is given, the first of them that is: what it does not show, as in the toys' training.
CAPTIONS = {
    ("WanFlowCamera", "latent"): STILL.caption,
    ("WanFlowReferenceImage", "image"): "a square moves up",
    ("WanFlowVACE", "reference_image"): "moves up on a yellow background",
    ("WanFlowVACE", "mask"): HIDDEN.caption,
    ("WanFlowVACE", "video"): BLOCK.caption,
    ("WanFlowControlVideo", "control_video"): BLOCK.caption,
    ("WanFlowVAEEncode", "images"): replace(BALL, color="yellow").caption,
    ("WanFlowImageToVideo", "start_image"): BALL.caption,
    ("WanFlowImageToVideo", "end_image"): BALL.caption,
}

# ---------------------------------------------------------------- settings


def at_most(limit: int) -> Callable[[Any], Any]:
    return lambda value: min(value, limit) if isinstance(value, (int, float)) else value


def lively(speed: Any) -> Any:
    """At least as fast as the toys' cameras, which have fewer frames for their way."""
    return math.copysign(max(abs(speed), 0.016), speed) if isinstance(speed, (int, float)) and speed else speed


def marked(name: Any) -> str:
    return f"{name}-tiny"


CLIP = {"frame_rate": float(PRESET.fps), "num_frames": PRESET.num_frames, "size": f"{PRESET.width}x{PRESET.height}"}
SAVED = {"frame_rate": float(PRESET.fps), "filename_prefix": marked}
# The values of the inputs that are there; a function is given the old one.
SETTINGS: dict[str, dict[str, Any]] = {
    "WanFlowLoadTextEncoder": {"text_encoder": TOY, "files": "", "tokenizer": ""},
    "WanFlowLoadVAE": {"vae": TOY, "files": ""},
    "WanFlowLoadImageEncoder": {"image_encoder": "WanTiny-I2V", "files": ""},
    "WanFlowEmptyLatent": {"width": PRESET.width, "height": PRESET.height, "num_frames": PRESET.num_frames},
    "WanFlowFewSteps": {"preset": DISTILLED},
    "WanFlowSampler": {"steps": at_most(PRESET.steps), "shift": at_most(PRESET.shift)},
    "WanFlowCamera": {"speed": lively},
    "WanFlowLoadVideo": CLIP,
    "WanFlowSaveVideo": SAVED,
    "WanFlowDecodeAndSave": SAVED,
    "WanFlowDataset": {"folder": "toy_pink", "metadata": "metadata.csv", "data_file_keys": "video", **CLIP},
    "WanFlowTrain": {"folder": marked, "max_steps": 10, "sample_prompt": UNSEEN.caption},
    "WanFlowSaveLora": {"filename_prefix": marked},
    "SaveImage": {"filename_prefix": marked},
    "SaveLatent": {"filename_prefix": marked},
}
NO_TWIN = {
    "LoadLatent": "it reads what a published VAE has encoded. Encode a clip instead (Wan VAE Encode), or leave it out.",
    "WanFlowCheckpointGrid": "its LoRAs fit published models only. Leave it out.",
}
