"""Turn the trained WanTiny files into the bundled ones: `python -m comfyui_wanflow.wan_core.tiny.pack --out DIR`.

Everything is stored in fp16. A tensor that several diffusion models have is stored once: a model's folder holds what no
earlier one has, and an index that says where each of its tensors lies.
"""

from __future__ import annotations

import argparse
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..loading.download import BUNDLED
from ..loading.hub import in_words
from ..loading.shards import INDEX_SUFFIX, write_index

MODEL = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Bundled:
    """A diffusion model: its folder, the trainings whose tensors it has, and which of them it leaves out."""

    folder: str
    trainings: tuple[str, ...]
    without: tuple[str, ...] = ()


MODELS = (
    Bundled("", ("T2V",)),
    Bundled("Fun-InP", ("InP",)),
    Bundled("I2V", ("InP",)),
    Bundled("FLF2V", ("FLF2V",)),
    Bundled("Fun-V1.1-Control", ("Control-Reference",)),
    Bundled("Fun-Control", ("Control-Reference",), without=("ref_conv.",)),
    Bundled("Fun-V1.1-Control-Camera", ("Control-Camera",)),
    Bundled("VACE", ("T2V", "VACE")),
)
# Bundled files that stand alone, and where they were trained.
ALONE = {
    "Wan2.1_VAE.safetensors": "Wan2.1_VAE.safetensors",
    "models_t5_umt5-xxl-enc-bf16.safetensors": "models_t5_umt5-xxl-enc-bf16.safetensors",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors":
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
    "speedcontrol/model.safetensors": f"Speed/{MODEL}",
    "WanTiny-T2V-4steps.safetensors": "fewstep/WanTiny-T2V-4steps.safetensors",
}  # fmt: skip
TOKENIZER = "google/umt5-xxl"

Stored = dict[str, list[tuple[str, Tensor]]]  # of a name, every tensor and the file it lies in


def pack(out: Path, weights: Path = BUNDLED) -> list[str]:
    """Pack what was trained into the folder `out`. `weights` then holds that alone. Returns the files of trainings that
    are missing."""
    shutil.rmtree(weights, ignore_errors=True)
    shutil.copytree(out / TOKENIZER, weights / TOKENIZER)
    missing = []
    for name, trained in ALONE.items():
        if (out / trained).exists():
            write(weights / name, *halved(out / trained))
        else:
            missing.append(trained)
    stored: Stored = defaultdict(list)
    for model in MODELS:
        files = [f"{training}/{MODEL}" for training in model.trainings]
        if absent := [file for file in files if not (out / file).exists()]:
            missing += absent
        else:
            pack_model(model, [out / file for file in files], weights, stored)
    return list(dict.fromkeys(missing))


def pack_model(model: Bundled, files: list[Path], weights: Path, stored: Stored) -> None:
    """Write what is not stored yet of a model. Of one name, the last file's tensor is taken."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        found, metadata = halved(file)
        tensors |= {name: tensor for name, tensor in found.items() if not name.startswith(model.without)}
    own: dict[str, Tensor] = {}
    places = {}
    for name, tensor in tensors.items():
        shared = next((place for place, other in stored[name] if is_same(tensor, other)), None)
        places[name] = f"../{shared}" if shared else MODEL
        if not shared:
            own[name] = tensor
            stored[name].append((f"{model.folder}/{MODEL}".lstrip("/"), tensor))
    folder = weights / model.folder
    folder.mkdir(parents=True, exist_ok=True)
    if own:
        write(folder / MODEL, own, metadata)
    if own.keys() != places.keys():
        write_index(folder / (MODEL + INDEX_SUFFIX), places, sum(tensor.nbytes for tensor in tensors.values()))


def halved(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file in fp16, and its metadata."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name).half() for name in opened.keys()}, opened.metadata() or {}


def is_same(first: Tensor, second: Tensor) -> bool:
    """To the bit."""
    return torch.equal(first.view(torch.int16), second.view(torch.int16))


def write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), file, {"format": "pt", **metadata})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder that was trained into")
    parser.add_argument("--weights", type=Path, default=BUNDLED, help="the folder to pack into, instead of the bundled")
    arguments = parser.parse_args()
    missing = pack(arguments.out, arguments.weights)
    sizes = {file: file.stat().st_size for file in sorted(arguments.weights.rglob("*")) if file.is_file()}
    for file, size in sizes.items():
        print(f"{in_words(size):>10}  {file.relative_to(arguments.weights)}")
    print(f"{in_words(sum(sizes.values())):>10}  in {arguments.weights}")
    if missing:
        print(f"Not trained yet, and left out: {', '.join(missing)}.")


if __name__ == "__main__":
    main()
