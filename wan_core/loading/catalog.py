"""The published models and the toys, one row each. Only data: adding a model is adding a row.

Facts: the model pages of Wan-AI, PAI, iic and DiffSynth-Studio on ModelScope; settings of the official inference code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from ..errors import FileError

# The negative prompt of the official inference code, which the models were tuned with.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Preset:
    """Settings a model works well with. Sizes in pixels, fps as trained."""

    width: int = 832
    height: int = 480
    num_frames: int = 81
    steps: int = 50
    shift: float = 5.0
    cfg: float = 5.0
    fps: int = 16
    negative_prompt: str = NEGATIVE_PROMPT


@dataclass(frozen=True)
class Source:
    """Files of a model repository. An empty model id means: inside this package."""

    model_id: str
    pattern: str

    def __str__(self) -> str:
        return f"{self.model_id}:{self.pattern}" if self.model_id else f"the bundled {self.pattern}"


@dataclass(frozen=True)
class Row:
    """A model. `files` maps kinds (see identify.KINDS, and "tokenizer") to sources.

    `adapters` names what it was trained to take beside text: image, last_image, control, reference, camera, vace or
    speed.
    """

    name: str
    files: dict[str, Source]
    adapters: tuple[str, ...] = ()
    preset: Preset = field(default_factory=Preset)


WEIGHTS = "diffusion_pytorch_model*.safetensors"
BASE = "Wan-AI/Wan2.1-T2V-1.3B"
TEXT = {
    "text_encoder": Source(BASE, "models_t5_umt5-xxl-enc-bf16.pth"),
    "tokenizer": Source(BASE, "google/umt5-xxl/"),
    "vae": Source(BASE, "Wan2.1_VAE.pth"),
}
IMAGE = TEXT | {
    "image_encoder": Source(
        "Wan-AI/Wan2.1-I2V-14B-480P", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    ),
}  # fmt: skip
TINY = {
    "dit": Source("", "diffusion_pytorch_model.safetensors"),
    "text_encoder": Source("", "models_t5_umt5-xxl-enc-bf16.safetensors"),
    "tokenizer": Source("", "google/umt5-xxl/"),
    "vae": Source("", "Wan2.1_VAE.safetensors"),
}
TINY_IMAGE = TINY | {
    "image_encoder": Source("", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors"),
}

VIDEO = Preset()
VIDEO_720P = replace(VIDEO, width=1280, height=720)
IMAGE_480P = replace(VIDEO, steps=40, shift=3.0)
IMAGE_720P = replace(VIDEO_720P, steps=40)
FIRST_LAST = replace(VIDEO_720P, shift=16.0)
CONTROL = replace(VIDEO, num_frames=49)
TOY = Preset(width=64, height=64, num_frames=17, steps=20, shift=3.0, cfg=6.0, fps=8, negative_prompt="")
TOLD_BY_MORE = replace(TOY, cfg=1.0)  # what pictures say, guidance by the caption only blurs


def _row(model_id: str, files: dict[str, Source], adapters: tuple[str, ...] = (), preset: Preset = VIDEO) -> Row:
    return Row(model_id.split("/")[1], {"dit": Source(model_id, WEIGHTS)} | files, adapters, preset)


def _toy(task: str, files: dict[str, Source], adapters: tuple[str, ...]) -> Row:
    """A toy with a folder of its own, whose index leads to what it shares with others (see tiny/pack.py)."""
    index = Source("", f"{task}/diffusion_pytorch_model.safetensors.index.json")
    return Row(f"WanTiny-{task}", files | {"dit": index}, adapters, TOLD_BY_MORE)


PUBLISHED = (
    _row("Wan-AI/Wan2.1-T2V-1.3B", TEXT),
    _row("Wan-AI/Wan2.1-T2V-14B", TEXT),
    _row("Wan-AI/Wan2.1-I2V-14B-480P", IMAGE, ("image",), IMAGE_480P),
    _row("Wan-AI/Wan2.1-I2V-14B-720P", IMAGE, ("image",), IMAGE_720P),
    _row("Wan-AI/Wan2.1-FLF2V-14B-720P", IMAGE, ("image", "last_image"), FIRST_LAST),
    _row("PAI/Wan2.1-Fun-1.3B-InP", IMAGE, ("image", "last_image")),
    _row("PAI/Wan2.1-Fun-1.3B-Control", IMAGE, ("control", "image"), CONTROL),
    _row("PAI/Wan2.1-Fun-14B-InP", IMAGE, ("image", "last_image")),
    _row("PAI/Wan2.1-Fun-14B-Control", IMAGE, ("control", "image"), CONTROL),
    _row("PAI/Wan2.1-Fun-V1.1-1.3B-Control", IMAGE, ("control", "image", "reference"), CONTROL),
    _row("PAI/Wan2.1-Fun-V1.1-14B-Control", IMAGE, ("control", "image", "reference"), CONTROL),
    _row("PAI/Wan2.1-Fun-V1.1-1.3B-InP", IMAGE, ("image", "last_image")),
    _row("PAI/Wan2.1-Fun-V1.1-14B-InP", IMAGE, ("image", "last_image")),
    _row("PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera", IMAGE, ("image", "camera")),
    _row("PAI/Wan2.1-Fun-V1.1-14B-Control-Camera", IMAGE, ("image", "camera")),
    _row("iic/VACE-Wan2.1-1.3B-Preview", TEXT, ("vace",)),
    _row("Wan-AI/Wan2.1-VACE-1.3B", TEXT, ("vace",)),
    _row("Wan-AI/Wan2.1-VACE-14B", TEXT, ("vace",)),
    Row(
        "Wan2.1-1.3b-speedcontrol-v1",
        {"dit": Source(BASE, WEIGHTS),
         "motion_controller": Source("DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1", "model.safetensors")} | TEXT,
        ("speed",),
    ),
)  # fmt: skip
TOYS = (
    _toy("I2V", TINY_IMAGE, ("image",)),
    _toy("FLF2V", TINY_IMAGE, ("image", "last_image")),
    _toy("Fun-InP", TINY_IMAGE, ("image", "last_image")),
    _toy("Fun-Control", TINY_IMAGE, ("control", "image")),
    _toy("Fun-V1.1-Control", TINY_IMAGE, ("control", "image", "reference")),
    _toy("Fun-V1.1-Control-Camera", TINY_IMAGE, ("image", "camera")),
    _toy("VACE", TINY, ("vace",)),
    Row("WanTiny-speedcontrol", TINY | {"motion_controller": Source("", "speedcontrol/model.safetensors")},
        ("speed",), TOY),
)  # fmt: skip
CATALOG = (Row("WanTiny-T2V", TINY, preset=TOY), *PUBLISHED, *TOYS)
BY_NAME = {row.name: row for row in CATALOG}
LORAS = {"WanTiny-T2V-4steps": Source("", "WanTiny-T2V-4steps.safetensors")}


def names(kind: str) -> list[str]:
    """Names to offer for a kind of file, each distinct source once, under the first row that has it."""
    first: dict[Source, str] = {}
    for row in CATALOG:
        if kind in row.files:
            first.setdefault(row.files[kind], row.name)
    return list(first.values())


def offered_as(name: str, kind: str) -> str:
    """Under which of `names` this model's file of the kind is. Raises FileError if it has none."""
    source = source_of(name, kind)
    return next(other for other in names(kind) if BY_NAME[other].files[kind] == source)


def source_of(name: str, kind: str) -> Source:
    """Where the files of this kind for a catalogued model are. Raises FileError if it has none."""
    row = BY_NAME.get(name)
    if row is None:
        near = get_close_matches(name, BY_NAME, n=1, cutoff=0.3)
        hint = f" The nearest name is {near[0]}." if near else ""
        raise FileError(f"'{name}' is no file, folder or catalogued model.{hint} Choose one of: {', '.join(BY_NAME)}.")
    if kind not in row.files:
        raise FileError(f"{name} has no {kind.replace('_', ' ')}. Choose one of: {', '.join(names(kind))}.")
    return row.files[kind]
