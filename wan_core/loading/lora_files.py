"""Reads LoRA files, whatever program made them, and writes them for any."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..errors import FileError, InputError
from ..lora import INPUT, Lora
from ..models.changes import Change, Decomposed, Difference, Hadamard, Kronecker, LowRank, Replacement, flat
from ..models.layout import PATCH
from ..saving import write_whole
from .checkpoint import Checkpoint, open_checkpoint
from .identify import expect, identify
from .lora_names import find, in_vace, seems_for_vace, split, to_diffusers

# Parts of names that no LoRA of a Wan model has, and what they are.
FOREIGN = {
    "_loras.": "an adapter of Stand-In, which is no LoRA",
    "oft_": "an orthogonal change (OFT), which WanFlow cannot make",
    "lora_te": "for a text encoder, which is no part of the model",
    "text_encoder": "for a text encoder, which is no part of the model",
}
ADAPTER_CONFIG = "lora_adapter_metadata"  # of Diffusers, among the metadata
DAMAGED = "damaged: tensors are missing or do not fit together"
OF_THE_FILE = ("format", ADAPTER_CONFIG)  # what metadata says of the tensors' form, which is another when saved again
ALPHA_CONFIG = "adapter_config.json"  # of peft, beside a file called adapter_model.safetensors

PARTS = ("auto", "model", "vace")  # whose blocks a LoRA changes, where its names do not tell

Tensors = dict[str, Tensor]  # of one layer, by their roles


class Unreadable(Exception):
    """Why the changes of one layer cannot be read."""


def load_lora(source: str | PathLike, part: str = "auto") -> Lora:
    """Read a LoRA, whose blocks are those of `part`: see PARTS. Raises FileError for a file of another kind."""
    if part not in PARTS:
        raise InputError(f"A LoRA is for no part '{part}'. Choose one of {', '.join(PARTS)}.")
    checkpoint = open_checkpoint(source)
    expect(identify(checkpoint.shapes), "lora", checkpoint.description)
    lora = read_changes(checkpoint, for_vace=part == "vace")
    if part == "auto" and (reason := seems_for_vace(checkpoint.shapes, lora.changes, lora.width)):
        remark = f"{reason}, so it is taken for a LoRA of VACE. If it is for the model itself, set part to model."
        return replace(read_changes(checkpoint, for_vace=True), remark=remark)
    return lora


def read_changes(checkpoint: Checkpoint, for_vace: bool) -> Lora:
    """All that can be read; `for_vace`: blocks without a word on whose they are belong to VACE."""
    scale_of = scaling(checkpoint)
    changes: dict[str, Change] = {}
    unread: dict[str, list[str]] = {}
    for layer, names in grouped(checkpoint.shapes).items():
        try:
            tensors = {role: checkpoint.tensor(name) for role, name in names.items()}
            found = list(read_layer(in_vace(layer) if for_vace else layer, tensors, scale_of))
            parts = [*changes, *(name for name, _ in found)]
            if not found or len(parts) > len(set(parts)):
                raise Unreadable("changed twice in this file" if found else DAMAGED)
        except Unreadable as reason:
            unread.setdefault(str(reason), []).append(layer)
        else:
            changes.update(found)
    return Lora(
        name=checkpoint.files[0].stem,
        changes=changes,
        unread={reason: tuple(layers) for reason, layers in unread.items()},
        metadata={key: value for key, value in checkpoint.metadata.items() if key not in OF_THE_FILE},
    )


def grouped(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Layer, as the file calls it -> role -> name of the tensor."""
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        layer, role = split(name)
        groups.setdefault(layer, {})[role] = name
    return groups


def scaling(checkpoint: Checkpoint) -> Callable[[float | None, int], float]:
    """The factor of a product of low rank, from the alpha stored beside it (None: none is) and its rank.

    peft and Diffusers store one alpha for all beside the tensors; and rsLoRA divides by the root of the rank
    (Kalajdzievski, arXiv 2312.03732).
    """
    beside = checkpoint.files[0].with_name(ALPHA_CONFIG)
    text = checkpoint.metadata.get(ADAPTER_CONFIG)
    if not text and checkpoint.files[0].stem == "adapter_model" and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    try:
        config = {name.removeprefix("transformer."): value for name, value in json.loads(text or "{}").items()}
    except ValueError as error:
        raise FileError(f"The settings of {checkpoint.description} are damaged. Download it again.") from error

    def scale(alpha: float | None, rank: int) -> float:
        alpha = config.get("lora_alpha", rank_divisor(rank)) if alpha is None else alpha
        return alpha / rank_divisor(rank)

    def rank_divisor(rank: int) -> float:
        return math.sqrt(rank) if config.get("use_rslora") else rank

    return scale


def read_layer(layer: str, tensors: Tensors, scale_of: Callable) -> Iterator[tuple[str, Change]]:
    """The changes of one layer, each with the published name of the parameter that it changes."""
    for part, what in FOREIGN.items():
        if any(part in f"{layer}.{role}" for role in tensors):
            raise Unreadable(what)
    weight, bias, modulation = find(layer, "", "_weight"), find(layer, "_bias"), find(layer, "", "_modulation")
    alpha = float(tensors.pop("alpha")) if "alpha" in tensors else None
    rank = next((tensors[role].shape[0] for role in RANKED if role in tensors), None)
    scale = 1.0 if rank is None else scale_of(alpha, rank)
    try:
        for read in READERS:
            if change := read(tensors, scale):
                if "reshape_weight" in tensors and flat(tensors.pop("reshape_weight").tolist()) != change.shape:
                    raise ValueError("widened to another shape than the change has")
                if "magnitude" in tensors:
                    change = Decomposed(change, tensors.pop("magnitude"))
                yield known(weight), change
        if "up_bias" in tensors:
            yield known(bias), Difference(tensors.pop("up_bias"), scale)
        if "bias_difference" in tensors:
            yield known(bias), Difference(tensors.pop("bias_difference"))
        if "modulation_difference" in tensors:
            yield known(modulation), Difference(tensors.pop("modulation_difference"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # what is absent, and what changes.py refuses
        raise Unreadable(DAMAGED) from error
    if tensors:
        raise Unreadable(f"of an unknown kind ({', '.join(tensors)})")


def known(name: str | None) -> str:
    if name is None:
        raise Unreadable("no part of Wan 2.1 is called so")
    return name


def read_low_rank(tensors: Tensors, scale: float) -> Change | None:
    if not {"up", "down"} & tensors.keys():
        return None
    return LowRank(tensors.pop("up"), tensors.pop("down"), scale)


def read_hadamard(tensors: Tensors, scale: float) -> Change | None:
    factors = taken(tensors, "hada_")
    return Hadamard(**factors, scale=scale) if factors else None


def read_kronecker(tensors: Tensors, scale: float) -> Change | None:
    factors = taken(tensors, "lokr_")
    return Kronecker(**factors, scale=scale) if factors else None


def read_difference(tensors: Tensors, scale: float) -> Change | None:
    return Difference(tensors.pop("difference")) if "difference" in tensors else None


def read_replacement(tensors: Tensors, scale: float) -> Change | None:
    return Replacement(tensors.pop("replacement")) if "replacement" in tensors else None


def taken(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors of one kind, out of the others; without their prefix."""
    return {role.removeprefix(prefix): tensors.pop(role) for role in list(tensors) if role.startswith(prefix)}


READERS = (read_low_rank, read_hadamard, read_kronecker, read_difference, read_replacement)
RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # whose first side is the rank


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class KeyFormat:
    """How a program names the parts: what is in front, the layer, the factors of a low rank; and whether it reads
    an alpha (for others the scale is multiplied in) and changes of other kinds."""

    front: str
    layer: Callable[[str], str]
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    alpha: bool = False


def as_it_is(layer: str) -> str:
    return layer


def with_underscores(layer: str) -> str:
    return layer.replace(".", "_")


KEY_FORMATS = {
    "comfyui": KeyFormat("diffusion_model.", as_it_is, alpha=True),
    "kohya": KeyFormat("lora_unet_", with_underscores, ".lora_down.weight", ".lora_up.weight", alpha=True),
    "diffusers": KeyFormat("transformer.", to_diffusers),
    "diffsynth": KeyFormat("", as_it_is, ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft": KeyFormat("base_model.model.", as_it_is),
}


def save_lora(lora: Lora, path: Path, key_format: str = "comfyui", metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA under the names that a program expects, one of `KEY_FORMATS`.

    Raises InputError for an unknown format, or a change that is not of low rank in a format other than ComfyUI's or
    kohya's.
    """
    if key_format not in KEY_FORMATS:
        raise InputError(f"There is no key_format '{key_format}'. Choose one of {', '.join(KEY_FORMATS)}.")
    tensors: dict[str, Tensor] = {}
    for name, change in lora.changes.items():
        tensors |= written(name, change, KEY_FORMATS[key_format])
    if lora.controls and KEY_FORMATS[key_format].alpha:  # ComfyUI widens an input only if it is told to
        shape = (lora.changes[INPUT].shape[0], lora.channels, *PATCH)
        tensors[key_of(INPUT, KEY_FORMATS[key_format]) + ".reshape_weight"] = torch.tensor(shape)
    texts = {**lora.metadata, **described(lora), **(metadata or {})}
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, texts)
    write_whole({path: lambda file: file.write_bytes(content)})


def described(lora: Lora) -> dict[str, str]:
    """What the metadata say of every LoRA: the fields of Stability's ModelSpec, and kohya's for rank and alpha where
    all parts share them."""
    texts = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": lora.name,
    }
    products = (change for change in lora.changes.values() if not isinstance(change, Difference))
    sizes = {(rank, scale * rank) for _, scale, rank in map(factors, products) if rank}
    if len(sizes) == 1:
        rank, alpha = sizes.pop()
        texts |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    return texts


def key_of(name: str, names: KeyFormat) -> str:
    """What the names of all tensors begin with that change a parameter."""
    return names.front + names.layer(name.rpartition(".")[0])


def written(name: str, change: Change, names: KeyFormat) -> dict[str, Tensor]:
    """The tensors of one change by their names in the file."""
    front, parameter = key_of(name, names), name.rpartition(".")[2]
    if isinstance(change, LowRank) and not names.alpha:
        return {front + names.down: change.down, front + names.up: change.up * change.scale}
    if not names.alpha:
        raise InputError(
            f"This format has no names for the change of '{name}', which is not of low rank. Choose comfyui or kohya."
        )
    if isinstance(change, Difference):
        end = {"weight": ".diff", "bias": ".diff_b"}.get(parameter)
        key = front + end if end else f"{names.front}{names.layer(name)}.diff"
        return {key: change.value * change.scale}
    roles, scale, rank = factors(change)
    low_rank = {"up": names.up, "down": names.down}
    tensors = {front + low_rank.get(role, f".{role}"): tensor for role, tensor in roles.items()}
    return tensors | ({f"{front}.alpha": torch.tensor(float(scale * rank))} if rank else {})


def factors(change: Change) -> tuple[Tensors, float, int | None]:
    """(tensors by their roles, scale, rank or None where there is no alpha)."""
    if isinstance(change, Decomposed):
        roles, scale, rank = factors(change.change)
        return roles | {"dora_scale": change.magnitude}, scale, rank
    if isinstance(change, Replacement):
        return {"set_weight": change.value}, 1.0, None
    prefix = {LowRank: "", Hadamard: "hada_", Kronecker: "lokr_"}[type(change)]
    roles = {f"{prefix}{name}": factor for name, factor in change.named_parameters(recurse=False)}
    rank = next((roles[role].shape[0] for role in RANKED if role in roles), None)
    return roles, change.scale, rank
