"""Builds an engine from files: the architecture from the tensors' shapes, the weights straight from the mapped file.

A module is built on the meta device and each of its parameters assigned a view of the file, so that loading takes no
memory and hardly any time. Asked for another type, tensors are converted one by one: the file is never held twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from ..compute import compute_dtype, default_device
from ..errors import FileError, InputError
from ..model import WanImageEncoder, WanModel, WanTextEncoder, WanVAE
from ..models.attention import check_backend
from ..models.dit import DiT
from ..models.embedders import MotionController
from ..models.image_encoder import ImageEncoder, ImageEncoderLayout
from ..models.layout import DiTLayout
from ..models.network import Network
from ..models.packed import Packed, keep_packed, multiply_in_fp8
from ..models.text_encoder import UMT5Encoder, UMT5Layout
from ..models.tiny_vae import TinyVAE
from ..models.tokenizer import PieceVocabulary, Tokenizer
from ..models.vace import VACE, VACELayout
from ..models.vae import VideoVAE
from ..offload.options import Offload
from ..offload.quantize import UNSCALED, matrices, storage
from ..offload.residency import Residency
from . import catalog
from .checkpoint import Checkpoint, open_checkpoint
from .download import PLAIN, Library
from .identify import expect, identify
from .keymaps import UMT5_DECODER, is_marker
from .outline import Outline
from .resting import on_disk
from .rounding import kept
from .sources import resolve, tokenizer_folder
from .tiny import is_tiny, keeps_raw

EMBEDDED_TOKENIZER = "spiece_model"  # ComfyUI's repackaged text encoders hold it as a tensor of bytes
VACE_PREFIX = "vace_"  # of all its tensors, which lie beside the trunk's in whole models

Source = str | os.PathLike | Iterable | Checkpoint


def load_model(
    source: Source,
    weight_dtype: str = "auto",
    attention: str = "auto",
    device: torch.device | str | None = None,
    library: Library = PLAIN,
    offload: Offload | None = None,
    fp8_matmul: bool = False,
) -> WanModel:
    """Load a diffusion model.

    source: a path, a list of parts (or a text with one a line), a folder, a catalogued name, or "model_id:pattern";
    also a checkpoint that is open already (an outline gives an engine without numbers, see outline.py).
    library: where published models lie, and may be downloaded to.
    offload: where the weights rest, and how much of the compute device they may take.
    fp8_matmul: multiply what is in 8-bit floats in them, where the device can; elsewhere it is widened as without.
    Raises FileError or InputError in words for everything that can be wrong.
    """
    backend = check_backend(attention)
    checkpoint, weight_dtype = _at_rest(_open(source, "dit", library), weight_dtype, offload, library)
    layout = DiTLayout.from_shapes(checkpoint.shapes)
    trunk = build(lambda: DiT(layout), checkpoint.part(lambda name: not name.startswith(VACE_PREFIX)), weight_dtype)
    vace = _vace(checkpoint, weight_dtype)
    if fp8_matmul and not sum(multiply_in_fp8(part, matrices(part)) for part in (trunk, vace) if part):
        raise InputError(
            f"fp8_matmul multiplies weights in 8-bit floats, and {checkpoint.description} has none. "
            "Set weight_dtype to fp8_e4m3fn, or fp8_matmul to false."
        )
    row = catalog.BY_NAME.get(source) if isinstance(source, str) else None
    extras = {"preset": row.preset} if row else {}
    engine = _engine(trunk, source, checkpoint, device, offload=offload) | {"module": Network(trunk)}
    model = WanModel(layout=layout, attention=backend, **extras, **engine)
    if vace:
        model = model.with_module(vace)
    if row and "motion_controller" in row.files:
        model = add_module(model, source, weight_dtype, library)
    return model


def add_module(model: WanModel, source: Source, weight_dtype: str = "auto", library: Library = PLAIN) -> WanModel:
    """`model` with a VACE module or a motion speed controller, which comes in a file of its own.

    A whole VACE model is taken too: its VACE part is added. Other arguments as for `load_model`; raises FileError,
    and ModelError where the module was made for models of another size.
    """
    row = catalog.BY_NAME.get(source) if isinstance(source, str) else None
    kind = "dit" if row and "vace" in row.adapters else "motion_controller" if row else "vace_module"
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(resolve(source, kind, library), kind)
    if vace := _vace(checkpoint, weight_dtype):
        return model.with_module(vace)
    expect(identify(checkpoint.shapes), "motion_controller", checkpoint.description)
    dim, frequency_dim = checkpoint.shapes["linear.0.weight"]
    return model.with_module(build(lambda: MotionController(frequency_dim, dim), checkpoint, weight_dtype))


def _vace(checkpoint: Checkpoint, weight_dtype: str) -> VACE | None:
    layout = VACELayout.from_shapes(checkpoint.shapes)
    if layout is None:
        return None
    return build(lambda: VACE(layout), checkpoint.part(lambda name: name.startswith(VACE_PREFIX)), weight_dtype)


def load_text_encoder(
    source: Source,
    weight_dtype: str = "auto",
    device: torch.device | str | None = None,
    library: Library = PLAIN,
    offload: Offload | None = None,
    tokenizer: str = "",
) -> WanTextEncoder:
    """Load a text encoder; other arguments and errors as for `load_model`.

    tokenizer: a folder, or "model_id:pattern"; "" is the one in the encoder's file, beside it, or published with it.
    """
    checkpoint, weight_dtype = _at_rest(_open(source, "text_encoder", library), weight_dtype, offload, library)
    if isinstance(checkpoint, Outline):
        words = None  # nothing will be read with it
    elif EMBEDDED_TOKENIZER in checkpoint.shapes and not tokenizer:
        pieces = bytes(checkpoint.tensor(EMBEDDED_TOKENIZER).tolist())
        words = Tokenizer(PieceVocabulary(pieces, checkpoint.description))
    else:
        words = Tokenizer.open(tokenizer_folder(source, checkpoint.files, library, tokenizer))
    layout = UMT5Layout.from_shapes(checkpoint.shapes)
    encoder = checkpoint.part(lambda name: not name.startswith(UMT5_DECODER))
    module = build(lambda: UMT5Encoder(layout), encoder, weight_dtype)
    return WanTextEncoder(tokenizer=words, **_engine(module, source, checkpoint, device, offload=offload))


def load_vae(
    source: Source,
    weight_dtype: str = "auto",
    device: torch.device | str | None = None,
    library: Library = PLAIN,
    offload: Offload | None = None,
) -> WanVAE:
    """Load a VAE, full or tiny; arguments and errors as for `load_model`. There is no 8-bit type for it."""
    wanted = weight_dtype if offload is None else offload.weight_dtype(weight_dtype)
    if storage(wanted).is_narrow:
        raise InputError(
            f"weight_dtype '{wanted}' is for linear layers, and a VAE is made of convolutions. "
            f"Choose one of {', '.join(UNSCALED)}."
        )
    found = _open(source, "vae", library)
    family = partial(TinyVAE.from_shapes, raw=keeps_raw(found)) if is_tiny(found.shapes) else VideoVAE.from_shapes
    checkpoint, weight_dtype = _at_rest(found, weight_dtype, offload, library)
    module = build(lambda: family(checkpoint.shapes), checkpoint, weight_dtype)
    target = torch.device(device) if device is not None else default_device()
    # On a CPU its fast forms are those of fp32; 16 bits would save a quarter of the time and cost 1 % of the picture.
    dtype = torch.float32 if target.type == "cpu" else None
    return WanVAE(**_engine(module, source, checkpoint, target, dtype, offload))


def load_image_encoder(
    source: Source,
    weight_dtype: str = "auto",
    device: torch.device | str | None = None,
    library: Library = PLAIN,
    offload: Offload | None = None,
) -> WanImageEncoder:
    """Load a CLIP image encoder; arguments and errors as for `load_model`. What Wan does not use of it stays unread."""
    checkpoint, weight_dtype = _at_rest(_open(source, "image_encoder", library), weight_dtype, offload, library)
    layout = ImageEncoderLayout.from_shapes(checkpoint.shapes)
    module = build(lambda: ImageEncoder(layout), checkpoint.part(layout.reads), weight_dtype)
    return WanImageEncoder(**_engine(module, source, checkpoint, device, offload=offload))


def build(make: Callable[[], nn.Module], checkpoint: Checkpoint, weight_dtype: str = "auto") -> nn.Module:
    """`make()` with the checkpoint's tensors as its parameters, frozen, in evaluation mode.

    Raises FileError that names missing, unexpected or misshapen tensors; InputError for an unknown weight_dtype.
    """
    wanted = storage(weight_dtype)
    with torch.inference_mode(False), torch.device("meta"):
        module = make()
    _check_names({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, checkpoint)
    with torch.inference_mode(False), torch.no_grad():
        tensors, narrow = {}, matrices(module)
        for name in module.state_dict():
            found = checkpoint.stored(name)
            stored = kept(name, found, wanted, narrow)
            if stored is not found:  # converted: of file and copy only one shall take memory
                checkpoint.forget(name)
            if isinstance(stored, Packed):
                if keep_packed(module, name, stored):
                    continue
                stored = stored.numbers()
            tensors[name] = stored
        module.load_state_dict(tensors, assign=True, strict=False)  # the names were checked, packed ones are in place
    return module.requires_grad_(False).eval()


def _open(source: Source, kind: str, library: Library) -> Checkpoint:
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(resolve(source, kind, library), kind)
    expect(identify(checkpoint.shapes), kind, checkpoint.description)
    return checkpoint


def _at_rest(
    checkpoint: Checkpoint, weight_dtype: str, offload: Offload | None, library: Library
) -> tuple[Checkpoint, str]:
    """The checkpoint to load, and the type that loading shall convert its weights to.

    Weights that rest on disk are converted there; of an outline nothing is written.
    """
    if offload is None:
        return checkpoint, weight_dtype
    wanted = offload.weight_dtype(weight_dtype)
    storage(wanted)
    if offload.rest_on != "disk" or wanted == "auto" or isinstance(checkpoint, Outline):
        return checkpoint, wanted
    return on_disk(checkpoint, wanted, library), "auto"


def _engine(
    module: nn.Module,
    source: Source,
    checkpoint: Checkpoint,
    device: torch.device | str | None,
    dtype: torch.dtype | None = None,
    offload: Offload | None = None,
) -> dict:
    """The fields that all engines share; dtype computes, None for what the device is fast in."""
    target = torch.device(device) if device is not None else default_device()
    dtype = dtype or compute_dtype(target)
    named = isinstance(source, str) and source in catalog.BY_NAME
    return {
        "module": module,
        "name": source if named else checkpoint.files[0].stem,
        "device": target,
        "compute_dtype": dtype,
        "residency": Residency(module, dtype, offload.rest_on if offload else "disk"),
        "offload": offload,
    }


def _check_names(wanted: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    found = checkpoint.shapes
    problems = [
        _some("lacks", [name for name in wanted if name not in found]),
        _some("has the unknown", [name for name in found if name not in wanted and not is_marker(name)]),
        _some("has other sizes in", [name for name in wanted if name in found and found[name] != wanted[name]]),
    ]
    if any(problems):
        raise FileError(
            f"{checkpoint.description} does not fit the model that its tensors describe: "
            f"it {' and '.join(filter(None, problems))}. Take an unmodified file of the model."
        )


def _some(verb: str, names: list[str], shown: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{verb} {', '.join(names[:shown])}{more}"
