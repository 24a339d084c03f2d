"""A checkpoint in another type, in one file or several, under the published names: what `wanflow convert` does.

Scaled fp8 is written as ComfyUI's loaders know it. Until 2025-11 that was `scale_weight` beside each weight and a
tensor `scaled_fp8` of the type that is meant; since then it is `weight_scale` and a note in the metadata. Newer loaders
read the older form too, but take all of it for e4m3fn: e5m2 gets both. A scale a row is read by WanFlow and by kohya's
musubi-tuner, not by ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError, InputError
from ..models.dit import DiT, DiTLayout
from ..models.image_encoder import ImageEncoder, ImageEncoderLayout
from ..models.packed import FLOATS_OF_8_BITS, Packed
from ..models.packings import unpack_scaled
from ..models.text_encoder import UMT5Encoder, UMT5Layout
from ..models.vace import VACE, VACELayout
from ..offload.quantize import Storage, matrices, relative_error, sampled
from .checkpoint import Checkpoint
from .download import check_room
from .identify import identify
from .keymaps import is_marker, renamed
from .mapped import type_name
from .rounding import is_in, kept, rounded
from .written import Piece, in_shards, shard_paths, write_shards

# What the parts of a kind of file are made from; kinds without linear layers in blocks have none.
NETWORKS = {
    "dit": ((DiT, DiTLayout), (VACE, VACELayout)),
    "vace_module": ((VACE, VACELayout),),
    "text_encoder": ((UMT5Encoder, UMT5Layout),),
    "image_encoder": ((ImageEncoder, ImageEncoderLayout),),
    "vae": (),
    "motion_controller": (),
}
MARKER = "scaled_fp8"
NOTES = "_quantization_metadata"  # metadata of ComfyUI since 2025-11
MEGABYTE = 10**6
NOTHING: Mapping[str, Tensor] = {}
FULL_PRECISION = 2  # numbers in the marker: "do not multiply in fp8", for which these files have no input scales


@dataclass(frozen=True)
class Written:
    """What came of it: the files, their bytes, and for each weight that changed by how much of its size."""

    files: list[Path]
    bytes: int
    errors: Mapping[str, float]


def convert(
    checkpoint: Checkpoint,
    storage: Storage,
    target: Path,
    largest: int | None = None,
    on_written: Callable[[int, int], None] = lambda done, total: None,
    rules: Iterable[tuple[str, str]] = (),
    beside: Mapping[str, Tensor] = NOTHING,
) -> Written:
    """Write `checkpoint` to `target`, in parts of at most `largest` bytes; one tensor at a time is in memory.

    rules change the names (see keymaps), beside: what the file shall hold besides.
    on_written(done, total) hears of the progress, in megabytes. Raises FileError for what is no model, does not fit on
    the disk or would overwrite something, InputError for a type that this kind of model or the numbers do not allow.
    """
    narrow = _narrow_names(checkpoint, storage)
    errors: dict[str, float] = {}
    names = [name for name in checkpoint.shapes if name != MARKER]
    done = total = 0

    def make(name: str, outline: Mapping[str, Tensor]) -> dict[str, Tensor]:
        nonlocal done
        source = _readable(name, checkpoint, storage, narrow)
        result = kept(name, source, storage, narrow)
        if (error := _error(name, source, result)) is not None:
            errors[name] = error
        done += sum(tensor.nbytes for tensor in outline.values())
        on_written(done // MEGABYTE, total // MEGABYTE)
        return named(_tensors(name, result))

    def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {renamed(name, rules): tensor for name, tensor in tensors.items()}

    outlines = {name: named(_outline(name, checkpoint, storage, narrow)) for name in names}
    pieces = [Piece(outline, partial(make, name, outline)) for name, outline in outlines.items()]
    scaled = {name for name in names if name in narrow and storage.scales}
    metadata = {name: text for name, text in checkpoint.metadata.items() if name not in (NOTES, "format")}
    if scaled and storage.dtype in FLOATS_OF_8_BITS:
        beside = {**beside, MARKER: torch.zeros(FULL_PRECISION, dtype=storage.dtype)}
        metadata |= _notes({renamed(name, rules) for name in scaled}, storage)
    pieces += [Piece({name: tensor.to("meta")}, partial(dict, {name: tensor})) for name, tensor in beside.items()]
    total = sum(piece.bytes for piece in pieces)
    shards = in_shards(pieces, largest)
    _check_target(target, len(shards), total)
    files = write_shards(target, shards, metadata)
    return Written(files, sum(file.stat().st_size for file in files), errors)


def changes(checkpoint: Checkpoint, storage: Storage) -> bool:
    """Whether anything would not be kept as it is stored."""
    narrow = _narrow_names(checkpoint, storage)
    for name, shape in checkpoint.shapes.items():
        if is_marker(name):
            continue
        stored = checkpoint.stored(name)
        if storage.scales:
            if name in narrow and not is_in(stored, storage.dtype):
                return True
        elif isinstance(stored, Packed):
            return True
        elif kept(name, torch.empty(shape, dtype=stored.dtype, device="meta"), storage, narrow).dtype != stored.dtype:
            return True
    return False


def _narrow_names(checkpoint: Checkpoint, storage: Storage) -> set[str]:
    identity = identify(checkpoint.shapes)
    if identity.kind not in NETWORKS:
        found = identity.summary if identity.kind == "relative" else f"{checkpoint.description} is {identity.summary}."
        raise FileError(f"{found} Only models, their encoders and VAEs can be converted.")
    narrow: set[str] = set()
    with torch.device("meta"):
        for network, layout in NETWORKS[identity.kind]:
            if described := layout.from_shapes(checkpoint.shapes):
                narrow |= matrices(network(described))
    if storage.scales and not narrow:
        raise InputError(f"{checkpoint.description} is {identity.summary}, which has no matrices for fp8. Take bf16.")
    return narrow & checkpoint.shapes.keys()


def _readable(name: str, checkpoint: Checkpoint, storage: Storage, narrow: Collection[str]) -> Tensor | Packed:
    """What is stored under a name, unpacked unless it is in the wanted form already."""
    stored = checkpoint.stored(name)
    if storage.scales and name in narrow and is_in(stored, storage.dtype):
        if isinstance(stored, Tensor):
            return Packed(tuple(stored.shape), {"weight": stored, "scale": torch.ones(())}, unpack_scaled)
        found, wanted = stored.parts["scale"], _rounded_outline(stored.shape, storage).parts["scale"]
        if found.shape == wanted.shape:
            return Packed(stored.shape, {**stored.parts, "scale": found.to(wanted.dtype)}, unpack_scaled)
    return stored.numbers(_unpacked(storage)) if isinstance(stored, Packed) else stored


def _outline(name: str, checkpoint: Checkpoint, storage: Storage, narrow: Collection[str]) -> dict[str, Tensor]:
    """What will be written for a name, on the meta device, without reading its numbers."""
    if is_marker(name):  # small, and of a vocabulary only its reading tells the size
        return {name: checkpoint.tensor(name).to("meta")}
    shape = checkpoint.shapes[name]
    if storage.scales and name in narrow:
        return _tensors(name, _rounded_outline(shape, storage))
    packed = isinstance(checkpoint.stored(name), Packed)
    dtype = _unpacked(storage) if packed else checkpoint.dtype(name)
    return {name: kept(name, torch.empty(shape, dtype=dtype, device="meta"), storage, narrow)}


def _rounded_outline(shape: tuple[int, ...], storage: Storage) -> Packed:
    return rounded(torch.empty(shape, device="meta"), storage)


def _unpacked(storage: Storage) -> torch.dtype:
    """The type for what comes packed in a way that is not written."""
    return torch.bfloat16 if storage.dtype is None or storage.is_narrow else storage.dtype


def _tensors(name: str, result: Tensor | Packed) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {name: result}
    weight, scale, layer = result.parts["weight"], result.parts["scale"], name.removesuffix("weight")
    named = {name: weight, f"{layer}scale_weight": scale}
    return named | ({f"{layer}weight_scale": scale} if weight.dtype == torch.float8_e5m2 and not scale.ndim else {})


def _notes(scaled: Collection[str], storage: Storage) -> dict[str, str]:
    if storage.dtype != torch.float8_e5m2 or storage.scales != "tensor":
        return {}
    note = {"format": type_name(storage.dtype), "full_precision_matrix_mult": True}
    layers = {name.removesuffix(".weight"): note for name in sorted(scaled)}
    return {NOTES: json.dumps({"format_version": "1.0", "layers": layers})}


def _error(name: str, source: Tensor | Packed, result: Tensor | Packed) -> float | None:
    """By how much of its size a tensor changed; None where it did not. Raises InputError where numbers became too
    large."""
    if result is source or isinstance(source, Packed):
        return None
    if isinstance(result, Packed):
        return result.error
    if result.dtype == source.dtype:
        return None
    if not torch.isfinite(result if result.dtype not in FLOATS_OF_8_BITS else result.float()).all():
        raise InputError(f"'{name}' holds numbers that {type_name(result.dtype)} cannot. Take bf16.")
    some = sampled(len(source)) if source.ndim else ...
    return relative_error(result[some], source[some])


def _check_target(target: Path, shards: int, needed: int) -> None:
    if target.suffix not in (".safetensors", ".sft"):
        raise InputError(f"{target} will be a safetensors file. Let its name end in .safetensors.")
    for path in shard_paths(target, shards):
        if path.exists():
            raise FileError(f"{path} is there already. Name another file, or delete this one.")
    advice = "Nothing was written. Free some space, or name another folder."
    check_room(target.parent, needed, str(target), advice)
