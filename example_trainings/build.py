"""Writes the example trainings from the catalog: `python -m comfyui_wanflow.example_trainings.build`.

Two a model, as DiffSynth-Studio publishes them: `full/<model>.toml` trains a whole part of it, `lora/<model>.toml` a
LoRA, each with its data set's table, its extra inputs and its validation. `wanflow train --config lora/<model>` takes
them from here; any argument given beside replaces theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..wan_core.loading.catalog import PUBLISHED, Row

FOLDER = Path(__file__).parent
DATA = "data/example_video_dataset"
KINDS = ("dit", "motion_controller", "text_encoder", "vae", "image_encoder")  # whose files a training names
LARGE = "14B"
PROMPT = "from sunset to night, a small town, light, house, river"
SHARED_OUT = "example_trainings/deepspeed_zero2_offload.yaml"

# What a model was trained to take -> its data set's table, and the extra inputs that come from the clip or a column.
FAMILIES: dict[frozenset[str], tuple[str, tuple[str, ...]]] = {
    frozenset(): ("metadata", ()),
    frozenset({"image"}): ("metadata", ("input_image",)),
    frozenset({"image", "last_image"}): ("metadata", ("input_image", "end_image")),
    frozenset({"control", "image"}): ("metadata_control", ("control_video",)),
    frozenset({"control", "image", "reference"}): ("metadata_reference_control", ("control_video", "reference_image")),
    frozenset({"image", "camera"}): ("metadata_camera_control",
                                     ("input_image", "camera_control_direction", "camera_control_speed")),
    frozenset({"vace"}): ("metadata_vace", ("vace_video", "vace_reference_image")),
    frozenset({"speed"}): ("metadata_motion_bucket_id", ("motion_bucket_id",)),
}  # fmt: skip
FILES_IN_COLUMNS = ("control_video", "reference_image", "vace_video", "vace_reference_image")

Config = dict[str, dict[str, Any]]


def configs() -> dict[str, str]:
    """The text of every file, by its path below this folder."""
    named = {}
    for row in PUBLISHED:
        for way in ("full", "lora"):
            named[f"{way}/{row.name}.toml"] = heading(row, way) + toml(config(row, way))
    return named


def config(row: Row, way: str) -> Config:
    table, inputs = FAMILIES[frozenset(row.adapters)]
    size = (720, 1280) if "720P" in row.name and "FLF2V" not in row.name else (480, 832)
    data: dict[str, Any] = {
        "dataset_base_path": DATA,
        "dataset_metadata_path": f"{DATA}/{table}.csv",
        "data_file_keys": ["video", *(name for name in inputs if name in FILES_IN_COLUMNS)],
        "height": size[0],
        "width": size[1],
        "num_frames": num_frames(row, way),
        "dataset_repeat": 100,
    }
    if inputs:
        data["extra_inputs"] = list(inputs)
    model: dict[str, Any] = {
        "model_id_with_origin_paths": [str(row.files[kind]) for kind in KINDS if kind in row.files],
        **({"trainable_models": [own_part(row)]} if way == "full" else {"lora_base_model": lora_part(row)}),
    }
    if way == "lora":
        model["lora_rank"] = 32
    training: dict[str, Any] = {
        "learning_rate": learning_rate(row, way),
        "num_epochs": 2 if way == "full" else 5,
        "use_gradient_checkpointing_offload": "vace" in row.adapters or size[0] == 720,
        "output_path": f"models/train/{row.name}_{way}",
    }
    return {"data": data, "models": model, "training": training, "validation": validation(row)}


def num_frames(row: Row, way: str) -> int:
    if "vace" in row.adapters:
        return 17 if LARGE in row.name else 49 if way == "full" else 81
    return 49 if row.name.endswith("I2V-14B-720P") else 81


def own_part(row: Row) -> str:
    """What makes this model what it is."""
    return "vace" if "vace" in row.adapters else "motion_controller" if "speed" in row.adapters else "dit"


def lora_part(row: Row) -> list[str]:
    return ["vace" if "vace" in row.adapters else "dit"]


def learning_rate(row: Row, way: str) -> float:
    if way == "full":
        return 1e-4 if "vace" in row.adapters else 1e-5
    return 1e-5 if "camera" in row.adapters else 1e-4


def validation(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"validation_prompt": PROMPT, "validation_seed": 1}
    if "FLF2V" in row.name:
        found["sigma_shift"] = 16.0
    if "camera" in row.adapters:
        found["validation_inputs"] = {"camera_control_speed": 0.0}
    return found


def heading(row: Row, way: str) -> str:
    """How to use the file, as comments."""
    name = f"{way}/{row.name}"
    what = f"a LoRA on the {lora_part(row)[0]} of" if way == "lora" else f"the whole {own_part(row)} of"
    commands = [f"#   wanflow {command} --config {name}" for command in ("train", "validate")]
    lines = [f"# Trains {what} {row.name}.", *commands]
    if way == "full" and LARGE in row.name:
        lines += [
            "# It needs several cards, among which the training is shared out:",
            f"#   accelerate launch --config_file {SHARED_OUT} -m comfyui_wanflow train --config {name}",
        ]
    return "\n".join([*lines, "", ""])


def toml(config: Config) -> str:
    tables = [
        "\n".join([f"[{title}]", *(f"{name} = {value(found)}" for name, found in values.items())])
        for title, values in config.items()
    ]
    return "\n\n".join(tables) + "\n"


def value(found: Any) -> str:
    if isinstance(found, dict):
        return "{ " + ", ".join(f"{name} = {value(item)}" for name, item in found.items()) + " }"
    if isinstance(found, list) and len(found) > 2:
        return "[\n" + "".join(f"    {value(item)},\n" for item in found) + "]"
    if isinstance(found, list):
        return "[" + ", ".join(map(value, found)) + "]"
    return json.dumps(found)  # numbers, switches and texts are written as in JSON


def main() -> None:
    for name, text in configs().items():
        file = FOLDER / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
