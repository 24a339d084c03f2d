"""Writes the example workflows: `python -m comfyui_wanflow.example_workflows.build [VIDEO ...]`.

Each is written twice from one description: `api/<name>.json` for `wanflow run` and ComfyUI's queue, `<name>.json` with
positions and wires for ComfyUI's editor, where it appears among the templates. A video that `wanflow run <name>` has
saved becomes the template's picture, `<name>.jpg`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..nodes import node_classes
from ..nodes.headless.core_nodes import LoadImage
from ..wan_core.loading import catalog
from ..wan_core.video import read_video

FOLDER = Path(__file__).parent
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, GAP, WIDTH = 400, 60, 340  # of the editor's layout, pixels

TOY = "WanTiny-T2V"
TOY_PROMPT = "a red circle moves left on a blue background"
CAT_PROMPT = (
    "A tabby cat walks along a garden wall in the morning sun, its tail upright, dew on the leaves behind it, "
    "the camera follows at eye level, shallow depth of field."
)
PICTURE_PROMPT = "The picture comes to life: a light wind moves hair, clothes and leaves, the light changes slowly."
PICTURE = "example.png"  # comes with ComfyUI
VIDEO = "video.mp4"  # the user's own


def workflows() -> dict[str, dict[str, Any]]:
    """Every example by name, in API format: one a model, under the model's name."""
    published = {row.name: example(row) for row in catalog.CATALOG if row.name != TOY}
    return {
        "quickstart": text_to_video(catalog.BY_NAME[TOY], TOY_PROMPT, "quickstart"),
        "video_to_video": video_to_video(catalog.BY_NAME["Wan2.1-T2V-1.3B"]),
        **published,
    }


def example(row: catalog.Row) -> dict[str, Any]:
    """A workflow that gives a model what it was made for."""
    prompt = PICTURE_PROMPT if "image" in row.adapters and "control" not in row.adapters else CAT_PROMPT
    workflow = text_to_video(row, prompt, f"WanFlow/{row.name}")
    if "control" in row.adapters:
        steer(workflow, row)
    elif "image" in row.adapters:
        begin_with_a_picture(workflow, row)
    if "camera" in row.adapters:
        condition(workflow, "Camera", "Camera", latent=["6", 0], direction="Left", speed=0.01)
    if "vace" in row.adapters:
        edit(workflow, row)
    if "speed" in row.adapters:
        module = add(workflow, node("AddModule", "Add Wan Module", model=["1", 0], module=row.name))
        workflow["7"]["inputs"]["model"] = module
        condition(workflow, "MotionSpeed", "Motion Speed", motion_bucket_id=100)
    return workflow


def begin_with_a_picture(workflow: dict[str, Any], row: catalog.Row) -> None:
    pictures = {"start_image": add(workflow, load_image("First Image"))}
    if "FLF2V" in row.name:
        pictures["end_image"] = add(workflow, load_image("Last Image"))
    encoder = add(workflow, load_image_encoder(row))
    condition(workflow, "ImageToVideo", "Wan First / Last Image", **CANVAS, **pictures, image_encoder=encoder)


def steer(workflow: dict[str, Any], row: catalog.Row) -> None:
    video = add(workflow, load_video("Control Video: lines, depth or poses", row))
    condition(workflow, "ControlVideo", "Wan Control Video", **CANVAS, control_video=video, extend="hold")
    if "reference" in row.adapters:
        picture, encoder = add(workflow, load_image("Reference Image")), add(workflow, load_image_encoder(row))
        condition(workflow, "ReferenceImage", "Wan Reference Image", **CANVAS, image=picture, image_encoder=encoder)


def edit(workflow: dict[str, Any], row: catalog.Row) -> None:
    video = add(workflow, load_video("Video: depth, poses, or one to change", row))
    picture = add(workflow, load_image("Reference Image"))
    condition(workflow, "VACE", "Wan VACE", **CANVAS, strength=1.0, extend="hold", mask_edges="hard", video=video,
              reference_image=picture)  # fmt: skip


def video_to_video(row: catalog.Row) -> dict[str, Any]:
    workflow = text_to_video(row, CAT_PROMPT, "WanFlow/video_to_video")
    video = add(workflow, load_video("Video to change", row))
    tiling = {"tiled": False, "tile_size": "30x52", "tile_stride": "15x26"}
    encoded = add(workflow, node("VAEEncode", "Wan VAE Encode", images=video, **CANVAS, **tiling))
    workflow["7"]["inputs"] |= {"latent": encoded, "denoise": 0.7}
    return workflow


def text_to_video(row: catalog.Row, prompt: str, prefix: str) -> dict[str, Any]:
    preset = row.preset
    size = {"width": preset.width, "height": preset.height, "num_frames": preset.num_frames}
    return {
        "1": node("LoadModel", "Load Wan Model", model=shared(row, "dit"), weight_dtype="auto", attention="auto"),
        "2": node("LoadTextEncoder", "Load Wan Text Encoder", text_encoder=shared(row, "text_encoder"),
                  weight_dtype="auto"),
        "3": node("LoadVAE", "Load Wan VAE", vae=shared(row, "vae"), weight_dtype="auto"),
        "4": node("TextEncode", "Prompt", text_encoder=["2", 0], text=prompt),
        "5": node("TextEncode", "Negative Prompt", text_encoder=["2", 0], text=preset.negative_prompt),
        "6": node("EmptyLatent", "Empty Wan Latent", **size, batch_size=1),
        "7": node("Sampler", "Wan Sampler", model=["1", 0], positive=["4", 0], latent=["6", 0], seed=42,
                  rand_device="cpu", steps=preset.steps, cfg=preset.cfg, cfg_merge=False, shift=preset.shift,
                  scheduler="euler", denoise=1.0, negative=["5", 0]),
        "8": node("VAEDecode", "Wan VAE Decode", vae=["3", 0], latent=["7", 0], tiled=False, tile_size="30x52",
                  tile_stride="15x26"),
        "9": node("SaveVideo", "Save Wan Video", images=["8", 0], filename_prefix=prefix,
                  frame_rate=float(preset.fps), format="mp4", quality=8),
    }  # fmt: skip


CANVAS = {"vae": ["3", 0], "latent": ["6", 0], "fit": "cover"}


def node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": f"WanFlow{kind}", "inputs": inputs, "_meta": {"title": title}}


def load_image(title: str) -> dict[str, Any]:
    return {"class_type": "LoadImage", "inputs": {"image": PICTURE}, "_meta": {"title": title}}


def load_video(title: str, row: catalog.Row) -> dict[str, Any]:
    size, frames = f"{row.preset.width}x{row.preset.height}", row.preset.num_frames
    return node("LoadVideo", title, video=VIDEO, frame_rate=float(row.preset.fps), num_frames=frames, size=size)


def load_image_encoder(row: catalog.Row) -> dict[str, Any]:
    name = shared(row, "image_encoder")
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


def shared(row: catalog.Row, kind: str) -> str:
    """The name under which the menus offer this model's file: that of the first model that has the same."""
    return next(name for name in catalog.names(kind) if catalog.BY_NAME[name].files[kind] == row.files[kind])


# ---------------------------------------------------------------- the editor's format


def editor_graph(workflow: dict[str, Any], infos: dict[str, dict]) -> dict[str, Any]:
    """The workflow as ComfyUI's editor stores it; `infos` are the nodes' entries of `/object_info`."""
    depths = {id: depth(workflow, id) for id in workflow}
    heights = dict.fromkeys(depths.values(), GAP)
    nodes, links = [], []
    for order, (id, entry) in enumerate(sorted(workflow.items(), key=lambda item: depths[item[0]])):
        info = infos[entry["class_type"]]
        drawn = editor_node(int(id), order, entry, info)
        drawn["pos"] = [GAP + COLUMN * depths[id], heights[depths[id]]]
        heights[depths[id]] += drawn["size"][1] + GAP
        nodes.append(drawn)
    by_id = {drawn["id"]: drawn for drawn in nodes}
    for drawn in nodes:
        for slot, socket in enumerate(drawn["inputs"]):
            value = workflow[str(drawn["id"])]["inputs"].get(socket["name"])
            if isinstance(value, list):
                source = by_id[int(value[0])]["outputs"][value[1]]
                socket["link"] = len(links) + 1
                source["links"].append(socket["link"])
                links.append([socket["link"], int(value[0]), value[1], drawn["id"], slot, source["type"]])
    return {
        "last_node_id": max(by_id), "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [],
        "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def editor_node(id: int, order: int, entry: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """One node, not yet placed or wired. Widget values are stored by position: required inputs, then optional ones."""
    inputs = {name: spec for group in ("required", "optional") for name, spec in info["input"].get(group, {}).items()}
    sockets, values, height = [], [], 40
    for name, (kind, options) in inputs.items():
        socket = {"name": name, "type": kind, "link": None}
        height += 24
        if kind in WIDGETS:
            socket["widget"] = {"name": name}
            values.append(entry["inputs"].get(name, options.get("default")))
            if options.get("control_after_generate"):
                values.append("fixed")
            height += 80 if options.get("multiline") else 0
        sockets.append(socket)
    pairs = zip(info["output_name"], info["output"], strict=True)
    outputs = [{"name": name, "type": kind, "links": []} for name, kind in pairs]
    return {
        "id": id, "type": entry["class_type"], "title": entry["_meta"]["title"], "size": [WIDTH, height], "flags": {},
        "order": order, "mode": 0, "inputs": sockets, "outputs": outputs,
        "properties": {"Node name for S&R": entry["class_type"]}, "widgets_values": values,
    }  # fmt: skip


def depth(workflow: dict[str, Any], id: str) -> int:
    """The longest way from a node without inputs, in wires."""
    sources = [value[0] for value in workflow[id]["inputs"].values() if isinstance(value, list)]
    return 1 + max((depth(workflow, source) for source in sources), default=-1)


def files() -> dict[Path, str]:
    """Every file to write, with its text."""
    infos = {info["name"]: info for info in (node.GET_NODE_INFO_V1() for node in (*node_classes(), LoadImage))}
    texts = {}
    for name, workflow in workflows().items():
        texts[FOLDER / "api" / f"{name}.json"] = workflow
        texts[FOLDER / f"{name}.json"] = editor_graph(workflow, infos)
    return {path: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for path, content in texts.items()}


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
    for video in sys.argv[1:]:
        print(picture(Path(video)))
