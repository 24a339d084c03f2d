"""Menu WanFlow/loaders: a checkpoint, in any published layout, becomes an engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..wan_core.loading import catalog
from ..wan_core.loading.load import load_image_encoder, load_model, load_text_encoder, load_vae
from ..wan_core.loading.rounding import rounding_note
from ..wan_core.models.attention import BACKENDS
from ..wan_core.models.fp8 import has_products
from ..wan_core.offload.quantize import STORAGE, UNSCALED
from .host import host, io
from .library import library_input, library_of
from .wires import WanImageEncoder, WanModel, WanOffload, WanTextEncoder, WanVAE

WEIGHT_DTYPE_TOOLTIP = "How the weights are kept in memory. auto keeps the file's own type."
NARROW_TOOLTIP = (
    " int8 and fp8 take half of bf16: the matrices of the blocks are rounded, int8 with a scale for every 32 numbers "
    "(the closest to bf16), fp8 with one a row (_tensor: one a matrix). _cast rounds everything without scales, as "
    "other programs do."
)
FILES_TOOLTIP = (
    "Overrides the choice above. A path, several paths (one shard a line), a folder, "
    "or model_id:pattern, which is downloaded from ModelScope when it is not on this machine."
)


TINY = (
    "{} is a tiny VAE, for previews and drafts. Its latents are taken to be {}; if colours are wrong, give the file "
    "the name it was published under."
)
RAW, NORMALISED = "raw, as those of lighttaew2_1", "normalised, as those of taew2_1"


def offered(kind: str, folder: str) -> list[str]:
    """The names to choose from: catalogued models first, then what lies in the host's folder."""
    return list(dict.fromkeys([*catalog.names(kind), *host.model_files(folder)]))


def chosen(folder: str, name: str, files: str) -> str | Path:
    """What to load: `files` if there are any, else the catalogued model or the host's file called `name`."""
    if files.strip():
        return files
    return name if name in catalog.BY_NAME else host.find_model(folder, name)


def place(folder: str, library=None) -> dict:
    """Where an engine computes, and where published models lie or come to."""
    return {"device": host.device(), "library": library_of(folder, library)}


def files_input() -> io.String.Input:
    return io.String.Input("files", optional=True, default="", multiline=True, tooltip=FILES_TOOLTIP)


def offload_input() -> io.Custom.Input:
    return WanOffload.Input("offload", optional=True, tooltip="From Wan Offload: limits on memory. Without: automatic.")


def dtype_input(choices: Iterable[str] = UNSCALED) -> io.Combo.Input:
    tooltip = f"{WEIGHT_DTYPE_TOOLTIP}{NARROW_TOOLTIP if choices is STORAGE else ''}"
    return io.Combo.Input("weight_dtype", options=list(choices), default="auto", tooltip=tooltip)


def told(engine):
    """The engine, after a line on what its weights lost while they were loaded."""
    if note := rounding_note(engine.module, engine.name):
        host.say(note)
    return engine


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowLoadModel",
            display_name="Load Wan Model",
            category="WanFlow/loaders",
            description="Loads a Wan 2.1 diffusion model. Which variant it is, is read from the file's tensors.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=offered("dit", "diffusion_models"),
                    default="WanTiny-T2V",
                    tooltip="A catalogued model or a file in models/diffusion_models. WanTiny are built-in toys.",
                ),
                dtype_input(STORAGE),
                io.Combo.Input(
                    "attention",
                    options=list(BACKENDS),
                    default="auto",
                    tooltip="How attention is computed. auto tries the exact ones once on this machine and takes the "
                    "fastest. sage is faster still on many cards, but rounds to 8 bits.",
                ),
                files_input(),
                offload_input(),
                library_input(),
                io.Boolean.Input(
                    "fp8_matmul",
                    optional=True,
                    default=False,
                    tooltip="Multiply fp8 weights in fp8: faster on cards from the RTX 40 series on, but the pictures "
                    "change a little more. Elsewhere without effect.",
                ),
            ],
            outputs=[WanModel.Output(display_name="model", tooltip="For Wan Sampler.")],
        )

    @classmethod
    def execute(cls, model, weight_dtype, attention, files="", offload=None, library=None, fp8_matmul=False):
        source = chosen("diffusion_models", model, files)
        options = {"offload": offload, "fp8_matmul": fp8_matmul, **place("diffusion_models", library)}
        if fp8_matmul and not has_products(options["device"]):
            host.say(f"fp8_matmul is without effect: {options['device']} does not multiply 8-bit floats.")
        return io.NodeOutput(told(load_model(source, weight_dtype, attention, **options)))


class LoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowLoadTextEncoder",
            display_name="Load Wan Text Encoder",
            category="WanFlow/loaders",
            description="Loads the UMT5 text encoder and its tokenizer.",
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=offered("text_encoder", "text_encoders"),
                    default="WanTiny-T2V",
                    tooltip="The encoder of a catalogued model, or a file in models/text_encoders. "
                    "WanTiny has its own; all other Wan 2.1 models share one.",
                ),
                dtype_input(STORAGE),
                files_input(),
                offload_input(),
                library_input(),
                io.String.Input(
                    "tokenizer",
                    optional=True,
                    default="",
                    tooltip="A folder with tokenizer.json or spiece.model, or model_id:pattern. Empty: the one in the "
                    "encoder's file, beside it, or published with it.",
                ),
            ],
            outputs=[WanTextEncoder.Output(display_name="text_encoder", tooltip="For Wan Prompt.")],
        )

    @classmethod
    def execute(cls, text_encoder, weight_dtype, files="", offload=None, library=None, tokenizer=""):
        source = chosen("text_encoders", text_encoder, files)
        options = {"offload": offload, "tokenizer": tokenizer.strip(), **place("text_encoders", library)}
        return io.NodeOutput(told(load_text_encoder(source, weight_dtype, **options)))


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowLoadVAE",
            display_name="Load Wan VAE",
            category="WanFlow/loaders",
            description="Loads the video VAE, which turns pictures into latents and back.",
            inputs=[
                io.Combo.Input(
                    "vae",
                    options=offered("vae", "vae"),
                    default="WanTiny-T2V",
                    tooltip="The VAE of a catalogued model, or a file in models/vae. "
                    "WanTiny has its own; all other Wan 2.1 models share one.",
                ),
                dtype_input(),
                files_input(),
                library_input(),
                offload_input(),
            ],
            outputs=[WanVAE.Output(display_name="vae", tooltip="For Wan VAE Encode and Wan VAE Decode.")],
        )

    @classmethod
    def execute(cls, vae, weight_dtype, files="", library=None, offload=None):
        engine = load_vae(chosen("vae", vae, files), weight_dtype, offload=offload, **place("vae", library))
        if engine.tiny:
            host.say(TINY.format(engine.name, RAW if engine.module.raw else NORMALISED))
        return io.NodeOutput(engine)


class LoadImageEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowLoadImageEncoder",
            display_name="Load Wan Image Encoder",
            category="WanFlow/loaders",
            description="Loads the CLIP image encoder, with which image models look at pictures.",
            inputs=[
                io.Combo.Input(
                    "image_encoder",
                    options=offered("image_encoder", "clip_vision"),
                    default="Wan2.1-I2V-14B-480P",
                    tooltip="The encoder of a catalogued model, or a file in models/clip_vision. "
                    "WanTiny has its own; all other Wan 2.1 models share one.",
                ),
                dtype_input(),
                files_input(),
                library_input(),
                offload_input(),
            ],
            outputs=[
                WanImageEncoder.Output(
                    display_name="image_encoder", tooltip="For Wan First / Last Image and Wan Reference Image."
                )
            ],
        )

    @classmethod
    def execute(cls, image_encoder, weight_dtype, files="", library=None, offload=None):
        source = chosen("clip_vision", image_encoder, files)
        options = {"offload": offload, **place("clip_vision", library)}
        return io.NodeOutput(load_image_encoder(source, weight_dtype, **options))


NODES = [LoadModel, LoadTextEncoder, LoadVAE, LoadImageEncoder]
