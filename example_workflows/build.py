"""Writes the example workflows, their inputs and the front pages' table of models, from the catalog:
`python -m comfyui_wanflow.example_workflows.build [VIDEO ...]`.

Each workflow is written twice from one description: `api/<name>.json` for `wanflow run` and ComfyUI's queue,
`<name>.json` with positions and wires for ComfyUI's editor, where it appears among the templates. Its picture there,
`<name>.jpg`, is a card; the quickstart's is made from the video that `wanflow run quickstart` has saved.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..wan_core.loading import catalog
from ..wan_core.loading.catalog import offered_as
from ..wan_core.video import read_video
from . import pink
from .cards import card
from .editor import editor_graph
from .front_page import front_pages
from .inputs import DEPTH_VIDEO, FIRST_IMAGE, LAST_IMAGE, MASK, REFERENCE_IMAGE, VIDEO, inputs, write_inputs

FOLDER = Path(__file__).parent

TOY = "WanTiny-T2V"
DISTILLED = "WanTiny-T2V-4steps"
TOY_PROMPT = "a red circle moves left on a blue background"
CAT_PROMPT = (
    "A tabby cat walks along a garden wall in the morning sun, its tail upright, dew on the leaves behind it, "
    "the camera follows at eye level, shallow depth of field."
)
# What the pictures of inputs.py show, or may become.
BALL_PROMPT = "A red rubber ball rolls slowly to the left in front of a plain blue wall, soft even light."
ORANGE_PROMPT = "A ripe orange rolls slowly to the left in front of a plain blue wall, a photograph in soft even light."
PINK_PROMPT = "a pink circle moves up on a blue background"
PYRAMID_PROMPT = "A green pyramid glides slowly to the left in front of a plain blue wall, soft even light."

CANVAS = {"vae": ["3", 0], "latent": ["6", 0], "fit": "cover"}
TILES = {"tiled": False, "tile_size": "30x52", "tile_stride": "15x26"}


def workflows() -> dict[str, dict[str, Any]]:
    """Every example by name, in API format: one a model, under the model's name, and what else it can do."""
    named = {"quickstart": text_to_video(catalog.BY_NAME[TOY], TOY_PROMPT)}
    for row in catalog.PUBLISHED:
        named |= examples(row)
    named["video_to_video"] = video_to_video(catalog.BY_NAME["Wan2.1-T2V-1.3B"])
    named["quickstart_4_steps"] = few_steps(catalog.BY_NAME[TOY], DISTILLED, "Apply Wan LoRA", DISTILLED, TOY_PROMPT)
    named["few_steps"] = few_steps(catalog.BY_NAME["Wan2.1-T2V-14B"], "lightx2v 14B",
                                   "Apply Wan LoRA (choose lightx2v's)", "none", CAT_PROMPT)
    named["train_and_use"] = train_and_use(catalog.BY_NAME[TOY])
    for name, workflow in named.items():
        workflow["9"]["inputs"]["filename_prefix"] = "quickstart" if name == "quickstart" else f"WanFlow/{name}"
    return named


def examples(row: catalog.Row) -> dict[str, dict[str, Any]]:
    """A workflow for each thing that the model was made for."""
    if "vace" in row.adapters:
        return {
            row.name: vace(row, video=DEPTH_VIDEO, reference=REFERENCE_IMAGE),
            f"{row.name}-edit": vace(row, video=VIDEO, mask=MASK),
            f"{row.name}-reference": vace(row, reference=REFERENCE_IMAGE),
        }
    recipes = {"control": control, "camera": camera, "image": image, "speed": speed}
    recipe = next((recipes[adapter] for adapter in recipes if adapter in row.adapters), text_to_video)
    return {row.name: recipe(row)}


# ---------------------------------------------------------------- recipes, one a family


def text_to_video(row: catalog.Row, prompt: str = CAT_PROMPT) -> dict[str, Any]:
    """What all workflows have; the others add nodes and links to it."""
    preset = row.preset
    size = {"width": preset.width, "height": preset.height, "num_frames": preset.num_frames}
    return {
        "1": node("LoadModel", "Load Wan Model", model=offered_as(row.name, "dit"), weight_dtype="auto",
                  attention="auto"),
        "2": node("LoadTextEncoder", "Load Wan Text Encoder", text_encoder=offered_as(row.name, "text_encoder"),
                  weight_dtype="auto"),
        "3": node("LoadVAE", "Load Wan VAE", vae=offered_as(row.name, "vae"), weight_dtype="auto"),
        "4": node("TextEncode", "Prompt", text_encoder=["2", 0], text=prompt),
        "5": node("TextEncode", "Negative Prompt", text_encoder=["2", 0], text=preset.negative_prompt),
        "6": node("EmptyLatent", "Empty Wan Latent", **size, batch_size=1),
        "7": node("Sampler", "Wan Sampler", model=["1", 0], positive=["4", 0], latent=["6", 0], seed=42,
                  rand_device="cpu", steps=preset.steps, cfg=preset.cfg, cfg_merge=False, shift=preset.shift,
                  scheduler="euler", denoise=1.0, negative=["5", 0]),
        "8": node("VAEDecode", "Wan VAE Decode", vae=["3", 0], latent=["7", 0], **TILES),
        "9": node("SaveVideo", "Save Wan Video", images=["8", 0], filename_prefix="",
                  frame_rate=float(preset.fps), format="mp4", quality=8),
    }  # fmt: skip


def video_to_video(row: catalog.Row) -> dict[str, Any]:
    workflow = text_to_video(row, ORANGE_PROMPT)
    video = add(workflow, load_video("Video to Change", VIDEO, row))
    encoded = add(workflow, node("VAEEncode", "Wan VAE Encode", images=video, **CANVAS, **TILES))
    workflow["7"]["inputs"] |= {"latent": encoded, "denoise": 0.7}
    return workflow


def few_steps(row: catalog.Row, preset: str, title: str, lora_name: str, prompt: str) -> dict[str, Any]:
    """With a LoRA that makes few steps enough, and the settings for it."""
    workflow = text_to_video(row, prompt)
    sampler = workflow["7"]["inputs"]
    sampler["model"] = add(workflow, node("ApplyLora", title, model=["1", 0], lora_name=lora_name, strength=1.0))
    settings, _ = add(workflow, node("FewSteps", "Wan Few Steps", preset=preset))
    for slot, name in enumerate(("steps", "cfg", "shift", "scheduler", "timesteps")):
        sampler[name] = [settings, slot]
    del sampler["negative"], workflow["5"]
    return workflow


def train_and_use(row: catalog.Row) -> dict[str, Any]:
    """A LoRA is trained on a folder of clips, saved, and used on a caption that was not among them."""
    workflow = text_to_video(row, PINK_PROMPT)
    preset, fronts = row.preset, {"model": ["1", 0], "vae": ["3", 0], "text_encoder": ["2", 0]}
    data = add(workflow, node("Dataset", "Wan Training Data", folder=pink.FOLDER, metadata=pink.TABLE,
                              data_file_keys="video", size=f"{preset.width}x{preset.height}",
                              num_frames=preset.num_frames, frame_rate=float(preset.fps), repeat=20, caption_prefix="",
                              caption_dropout=0.1, flip=False, sampling="head", samples=1, buckets=False))  # fmt: skip
    lora = add(workflow, node("Train", "Wan Train", **fronts, dataset=data, folder="training/pink", mode="lora",
                              parts="dit", rank=16, alpha=0.0, targets="q,k,v,o,ffn.0,ffn.2", learning_rate=1e-3,
                              epochs=3, max_steps=0, batch_size=8, train_seed=0, extra_inputs="", memory="fastest",
                              save_every=0, sample_every=30, sample_prompt=PINK_PROMPT, also_full="", accumulation=1,
                              optimizer="adamw", schedule="cosine", warmup_steps=10, weight_decay=0.01, ema_decay=0.0,
                              max_grad_norm=1.0, lora_plus=1.0, timesteps="shifted", weighting="bell",
                              shift=preset.shift))  # fmt: skip
    add(workflow, node("SaveLora", "Save Wan LoRA", lora=lora, filename_prefix="loras/pink", key_format="comfyui"))
    applied = node("ApplyLora", "Apply Wan LoRA", model=["1", 0], lora_name="none", strength=1.0, lora=lora)
    workflow["7"]["inputs"]["model"] = add(workflow, applied)
    return workflow


def image(row: catalog.Row) -> dict[str, Any]:
    """A first image; a last one too, where the model was trained with it."""
    workflow = text_to_video(row, BALL_PROMPT)
    pictures = {"start_image": add(workflow, load_image("First Image", FIRST_IMAGE))}
    if "last_image" in row.adapters:
        pictures["end_image"] = add(workflow, load_image("Last Image", LAST_IMAGE))
    encoder = add(workflow, load_image_encoder(row))
    condition(workflow, "ImageToVideo", "Wan First / Last Image", **CANVAS, **pictures, image_encoder=encoder)
    return workflow


def camera(row: catalog.Row) -> dict[str, Any]:
    workflow = image(row)
    condition(workflow, "Camera", "Wan Camera", latent=["6", 0], direction="Left", speed=0.01)
    return workflow


def control(row: catalog.Row) -> dict[str, Any]:
    """A video to follow; who or what to show, where the model has an eye for it."""
    workflow = text_to_video(row, PYRAMID_PROMPT if "reference" in row.adapters else BALL_PROMPT)
    video = add(workflow, load_video("Control Video: Depth, Lines or Poses", DEPTH_VIDEO, row))
    condition(workflow, "ControlVideo", "Wan Control Video", **CANVAS, control_video=video, extend="hold")
    if "reference" in row.adapters:
        picture = add(workflow, load_image("Reference Image", REFERENCE_IMAGE))
        encoder = add(workflow, load_image_encoder(row))
        condition(workflow, "ReferenceImage", "Wan Reference Image", **CANVAS, image=picture, image_encoder=encoder)
    return workflow


def vace(row: catalog.Row, video: str = "", mask: str = "", reference: str = "") -> dict[str, Any]:
    workflow, given = text_to_video(row, PYRAMID_PROMPT), {}
    if video:
        title = "Video to Change" if mask else "Video to Follow: Depth, Lines or Poses"
        given["video"] = add(workflow, load_video(title, video, row))
    if mask:
        given["mask"] = add(workflow, core_node("LoadImageMask", "Mask: White Is Made Anew", image=mask, channel="red"))
    if reference:
        given["reference_image"] = add(workflow, load_image("Reference Image", reference))
    condition(workflow, "VACE", "Wan VACE", **CANVAS, strength=1.0, extend="hold", mask_edges="hard", **given)
    return workflow


def speed(row: catalog.Row) -> dict[str, Any]:
    workflow = text_to_video(row)
    module = add(workflow, node("AddModule", "Add Wan Module", model=["1", 0], module=row.name))
    workflow["7"]["inputs"]["model"] = module
    condition(workflow, "MotionSpeed", "Wan Motion Speed", motion_bucket_id=100)
    return workflow


# ---------------------------------------------------------------- nodes


def core_node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    """One of ComfyUI's own nodes."""
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


def node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    return core_node(f"WanFlow{kind}", title, **inputs)


def load_image(title: str, file: str) -> dict[str, Any]:
    return core_node("LoadImage", title, image=file)


def load_video(title: str, file: str, row: catalog.Row) -> dict[str, Any]:
    size, frames = f"{row.preset.width}x{row.preset.height}", row.preset.num_frames
    return node("LoadVideo", title, video=file, frame_rate=float(row.preset.fps), num_frames=frames, size=size)


def load_image_encoder(row: catalog.Row) -> dict[str, Any]:
    name = offered_as(row.name, "image_encoder")
    return node("LoadImageEncoder", "Load Wan Image Encoder", image_encoder=name, weight_dtype="auto")


def add(workflow: dict[str, Any], entry: dict[str, Any]) -> list:
    """Put one more node into the workflow; the link to its first output."""
    id = str(len(workflow) + 1)
    workflow[id] = entry
    return [id, 0]


def condition(workflow: dict[str, Any], kind: str, title: str, **inputs: Any) -> None:
    """Put a condition between those there are and the sampler."""
    sampler = workflow["7"]["inputs"]
    before = {"conditions": sampler["conditions"]} if "conditions" in sampler else {}
    sampler["conditions"] = add(workflow, node(kind, title, **inputs, **before))


# ---------------------------------------------------------------- files


def files() -> dict[Path, str]:
    """Every text file to write, with what is in it."""
    contents = {}
    for name, workflow in workflows().items():
        contents[FOLDER / "api" / f"{name}.json"] = workflow
        contents[FOLDER / f"{name}.json"] = editor_graph(workflow)
    texts = {path: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for path, content in contents.items()}
    return texts | front_pages()


def cards() -> dict[Path, Image.Image]:
    """The pictures of all workflows but the quickstart, which has shown what it makes."""
    pictures, named = inputs(), workflows()
    del named["quickstart"]
    return {FOLDER / f"{name}.jpg": card(name, workflow, pictures) for name, workflow in named.items()}


def picture(video: Path, count: int = 4, side: int = 256) -> Path:
    """`count` frames of `<name>_00001_.mp4` side by side, each of `side` pixels, as `<name>.jpg`."""
    frames, _ = read_video(video)
    chosen = frames[torch.linspace(0, len(frames) - 1, count).round().int()]  # (count, H, W, 3)
    strip = (chosen.movedim(0, 1).flatten(1, 2) * 255).round().to(torch.uint8)  # (H, count * W, 3)
    path = FOLDER / f"{video.stem.rstrip('_0123456789')}.jpg"
    Image.fromarray(strip.numpy()).resize((count * side, side), Image.Resampling.LANCZOS).save(path, quality=90)
    return path


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path)
    for path, drawn in cards().items():
        drawn.save(path, quality=85)
        print(path)
    print(*write_inputs(), sep="\n")
    for video in sys.argv[1:]:
        print(picture(Path(video)))
