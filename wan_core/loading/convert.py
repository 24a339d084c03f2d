"""A checkpoint in another type, in one file or several, under the published names: what `wanflow convert` does.

Scaled fp8 is written as ComfyUI's loaders know it. Until 2025-11 that was `scale_weight` beside each weight and a
tensor `scaled_fp8` of the type that is meant; since then it is `weight_scale` and a note in the metadata. Newer loaders
read the older form too, but take all of it for e4m3fn: e5m2 gets both. A scale a row is read by WanFlow and by kohya's
musubi-tuner, not by ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError, InputError
from ..models.dit import DiT
from ..models.image_encoder import ImageEncoder, ImageEncoderLayout
from ..models.layout import DiTLayout
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
    check_kind(checkpoint)
    conversion = Conversion(checkpoint, storage, rules)
    done = total = 0

    def make(name: str, size: int) -> dict[str, Tensor]:
        nonlocal done
        tensors = conversion.tensors(name)
        done += size
        on_written(done // MEGABYTE, total // MEGABYTE)
        return tensors

    pieces = []
    for name in checkpoint.shapes:
        if name != MARKER:
            outline = conversion.outline(name)
            size = sum(tensor.nbytes for tensor in outline.values())
            pieces.append(Piece(outline, partial(make, name, size)))
    for name, tensor in {**beside, **conversion.marker()}.items():
        pieces.append(Piece({name: tensor.to("meta")}, partial(dict, {name: tensor})))
    total = sum(piece.bytes for piece in pieces)
    shards = in_shards(pieces, largest)
    _check_target(target, len(shards), total)
    files = write_shards(target, shards, conversion.metadata())
    return Written(files, sum(file.stat().st_size for file in files), conversion.errors)


class Conversion:
    """What each tensor of a checkpoint becomes: told beforehand, and made.

    `narrow` names what is rounded to eight bits with scales, `errors` tells by how much what was made has changed.
    """

    def __init__(self, checkpoint: Checkpoint, storage: Storage, rules: Iterable[tuple[str, str]] = ()):
        self.checkpoint, self.storage, self.rules = checkpoint, storage, rules
        self.narrow = narrow_names(checkpoint) if storage.scales else set()
        self.unpacked = torch.bfloat16 if storage.dtype is None or storage.is_narrow else storage.dtype
        self.errors: dict[str, float] = {}

    def outline(self, name: str) -> dict[str, Tensor]:
        """What will be written for a name, on the meta device, without reading its numbers."""
        if is_marker(name):  # small, and of a vocabulary only its reading tells the size
            return self.named(name, self.checkpoint.tensor(name).to("meta"))
        if name in self.narrow:
            return self.named(name, self.rounded_outline(name))
        packed = isinstance(self.checkpoint.stored(name), Packed)
        dtype = self.unpacked if packed else self.checkpoint.dtype(name)
        empty = torch.empty(self.checkpoint.shapes[name], dtype=dtype, device="meta")
        return self.named(name, kept(name, empty, self.storage, self.narrow))

    def rounded_outline(self, name: str) -> Packed:
        return rounded(torch.empty(self.checkpoint.shapes[name], device="meta"), self.storage)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What is written for a name. Raises InputError where numbers are too large for the type."""
        source = self.source(name)
        result = kept(name, source, self.storage, self.narrow)
        if result is not source:
            self.errors[name] = result.error if isinstance(result, Packed) else cast_error(name, source, result)
        return self.named(name, result)

    def source(self, name: str) -> Tensor | Packed:
        """What is stored under a name, unpacked unless it is in the wanted form already."""
        stored = self.checkpoint.stored(name)
        if name in self.narrow and is_in(stored, self.storage.dtype):
            if isinstance(stored, Tensor):
                return Packed(tuple(stored.shape), {"weight": stored, "scale": torch.ones(())}, unpack_scaled)
            found, wanted = stored.parts["scale"], self.rounded_outline(name).parts["scale"]
            if found.shape == wanted.shape:
                return Packed(stored.shape, {**stored.parts, "scale": found.to(wanted.dtype)}, unpack_scaled)
        return stored.numbers(self.unpacked) if isinstance(stored, Packed) else stored

    def named(self, name: str, result: Tensor | Packed) -> dict[str, Tensor]:
        """By the names that they have in the file."""
        tensors = {name: result}
        if isinstance(result, Packed):
            layer, scale = name.removesuffix("weight"), result.parts["scale"]
            tensors = {name: result.parts["weight"], f"{layer}scale_weight": scale}
            if self.is_said_twice():
                tensors[f"{layer}weight_scale"] = scale
        return {renamed(name, self.rules): tensor for name, tensor in tensors.items()}

    def is_said_twice(self) -> bool:
        return self.storage.dtype == torch.float8_e5m2 and self.storage.scales == "tensor"

    def marker(self) -> dict[str, Tensor]:
        if not self.narrow or self.storage.dtype not in FLOATS_OF_8_BITS:
            return {}
        return {MARKER: torch.zeros(FULL_PRECISION, dtype=self.storage.dtype)}

    def metadata(self) -> dict[str, str]:
        texts = {name: text for name, text in self.checkpoint.metadata.items() if name not in (NOTES, "format")}
        if self.is_said_twice():
            note = {"format": type_name(self.storage.dtype), "full_precision_matrix_mult": True}
            layers = {renamed(name, self.rules).removesuffix(".weight"): note for name in sorted(self.narrow)}
            texts[NOTES] = json.dumps({"format_version": "1.0", "layers": layers})
        return texts


def changes(checkpoint: Checkpoint, storage: Storage) -> bool:
    """Whether loading with this storage would keep anything in another type than it is stored in."""
    if storage.scales:
        return any(not is_in(checkpoint.stored(name), storage.dtype) for name in narrow_names(checkpoint))
    names = [name for name in checkpoint.shapes if not is_marker(name)]
    return any(
        isinstance(stored := checkpoint.stored(name), Packed)
        or kept(name, torch.empty_like(stored, device="meta"), storage, ()).dtype != stored.dtype
        for name in names
    )


def narrow_names(checkpoint: Checkpoint) -> set[str]:
    """The weights that scales are for. Raises InputError where there are none."""
    identity = identify(checkpoint.shapes)
    narrow: set[str] = set()
    with torch.device("meta"):
        for network, layout in NETWORKS[identity.kind]:
            if described := layout.from_shapes(checkpoint.shapes):
                narrow |= matrices(network(described))
    if not narrow:
        raise InputError(f"{checkpoint.description} is {identity.summary}, which has no matrices for fp8. Take bf16.")
    return narrow & checkpoint.shapes.keys()


def cast_error(name: str, source: Tensor, result: Tensor) -> float:
    """By how much of its size a tensor changed."""
    if not torch.isfinite(result.float()).all():
        raise InputError(f"'{name}' holds numbers that {type_name(result.dtype)} cannot. Take bf16.")
    some = sampled(len(source)) if source.ndim else ...
    return relative_error(result[some], source[some])


def check_kind(checkpoint: Checkpoint) -> None:
    identity = identify(checkpoint.shapes)
    if identity.kind not in NETWORKS:
        found = identity.summary if identity.kind == "relative" else f"{checkpoint.description} is {identity.summary}."
        raise FileError(f"{found} Only models, their encoders and VAEs can be converted.")


def _check_target(target: Path, shards: int, needed: int) -> None:
    if target.suffix not in (".safetensors", ".sft"):
        raise InputError(f"{target} will be a safetensors file. Let its name end in .safetensors.")
    for path in shard_paths(target, shards):
        if path.exists():
            raise FileError(f"{path} is there already. Name another file, or delete this one.")
    advice = "Nothing was written. Free some space, or name another folder."
    check_room(target.parent, needed, str(target), advice)
