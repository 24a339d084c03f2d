"""Stand-ins for the few nodes of ComfyUI that workflows need around ours: same ids, inputs, files and conventions."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy
import safetensors.torch
import torch
from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import PngInfo

from ...wan_core.errors import FileError
from ...wan_core.saving import write_whole
from ..host import schema as io
from ..host.standalone import OutputFile, host

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SD_LATENT_SCALE = 0.18215  # .latent files without a version mark hold scaled Stable Diffusion latents


def input_files(endings: tuple[str, ...]) -> list[str]:
    """Names of the files lying directly in the input folder."""
    folder = host.input_dir()
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name for name in names if name.lower().endswith(endings))


def file_exists(name: str) -> bool | str:
    """True, or the sentence that says where the file was looked for."""
    try:
        host.input_path(name)
    except FileError as error:
        return str(error)
    return True


def file_hash(name: str) -> str:
    return hashlib.sha256(host.input_path(name).read_bytes()).hexdigest()


def open_image(name: str) -> Image.Image:
    path = host.input_path(name)
    try:
        return Image.open(path)
    except OSError as error:
        raise FileError(f"{path} is no image that can be read ({error}). Use a PNG, JPEG or WebP file.") from error


def to_8_bit(image: Image.Image) -> Image.Image:
    """Upright, and with 16-bit grey brought down as ComfyUI does it."""
    image = ImageOps.exif_transpose(image)
    return image.point(lambda value: value * (1 / 255)) if image.mode == "I" else image


def channel_tensor(image: Image.Image, channel: str) -> torch.Tensor:
    """One channel as (height, width), 0..1."""
    return torch.from_numpy(numpy.array(image.getchannel(channel)).astype(numpy.float32) / 255.0)


def mask_of(image: Image.Image) -> torch.Tensor:
    """(1, height, width), 1 where the image is transparent; 64x64 zeros for an image without alpha."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if "A" not in image.getbands():
        return torch.zeros(1, 64, 64)
    return 1.0 - channel_tensor(image, "A")[None]


class LoadImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadImage",
            display_name="Load Image",
            category="image",
            inputs=[io.Combo.Input("image", input_files(IMAGE_ENDINGS), upload=io.UploadType.image)],
            outputs=[io.Image.Output(), io.Mask.Output()],
        )

    @classmethod
    def validate_inputs(cls, image: str) -> bool | str:
        return file_exists(image)

    @classmethod
    def fingerprint_inputs(cls, image: str) -> str:
        return file_hash(image)

    @classmethod
    def execute(cls, image: str) -> io.NodeOutput:
        with open_image(image) as file:
            frames = [to_8_bit(frame) for frame in ImageSequence.Iterator(file)]
        frames = [frame for frame in frames if frame.size == frames[0].size]
        if file.format == "MPO":  # a stereo photograph: the other frames are no film
            frames = frames[:1]
        pixels = [numpy.array(frame.convert("RGB")).astype(numpy.float32) / 255.0 for frame in frames]
        return io.NodeOutput(torch.from_numpy(numpy.stack(pixels)), torch.cat([mask_of(frame) for frame in frames]))


class LoadImageMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadImageMask",
            display_name="Load Image (as Mask)",
            category="mask",
            inputs=[
                io.Combo.Input("image", input_files(IMAGE_ENDINGS), upload=io.UploadType.image),
                io.Combo.Input("channel", ["alpha", "red", "green", "blue"]),
            ],
            outputs=[io.Mask.Output()],
        )

    @classmethod
    def validate_inputs(cls, image: str) -> bool | str:
        return file_exists(image)

    @classmethod
    def fingerprint_inputs(cls, image: str, channel: str) -> str:
        return file_hash(image)

    @classmethod
    def execute(cls, image: str, channel: str) -> io.NodeOutput:
        with open_image(image) as file:
            rgba = to_8_bit(file).convert("RGBA")
        mask = channel_tensor(rgba, channel[0].upper())[None]
        return io.NodeOutput(1.0 - mask if channel == "alpha" else mask)


def save_pngs(images: Iterable[torch.Tensor], prefix: str, place: str, compression: int, graph: dict) -> list[dict]:
    """Write (height, width, 3) images of 0..1 to numbered files in the "output" or "temp" folder.

    Returns what `ui` says of them.
    """
    entries = []
    tags = PngInfo()
    for key, value in graph.items():
        tags.add_text(key, json.dumps(value))
    for number, image in enumerate(images):
        height, width = image.shape[:2]
        name = prefix.replace("%width%", str(width)).replace("%height%", str(height))
        name = name.replace("%batch_num%", str(number))
        file = host.output_path(name, "png", temporary=place == "temp")
        pixels = numpy.clip(255.0 * image.cpu().numpy(), 0, 255).astype(numpy.uint8)  # cut, not rounded, like ComfyUI
        save = partial(Image.fromarray(pixels).save, format="png", pnginfo=tags, compress_level=compression)
        write_whole({file.path: save})
        entries.append(ui_entry(file, place))
    return entries


def ui_entry(file: OutputFile, place: str) -> dict[str, str]:
    return {"filename": file.filename, "subfolder": file.subfolder, "type": place}


class SaveImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveImage",
            display_name="Save Image",
            category="image",
            description="Saves the input images to the output folder.",
            is_output_node=True,
            inputs=[io.Image.Input("images"), io.String.Input("filename_prefix", default="ComfyUI")],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, filename_prefix: str) -> io.NodeOutput:
        graph = host.metadata(cls.hidden)
        return io.NodeOutput(ui={"images": save_pngs(images, filename_prefix, "output", 4, graph)})


class PreviewImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PreviewImage",
            display_name="Preview Image",
            category="image",
            description="Saves the input images to the temporary folder.",
            is_output_node=True,
            inputs=[io.Image.Input("images")],
        )

    @classmethod
    def execute(cls, images: torch.Tensor) -> io.NodeOutput:
        graph = host.metadata(cls.hidden)
        return io.NodeOutput(ui={"images": save_pngs(images, "ComfyUI_temp", "temp", 1, graph)})


class SaveLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveLatent",
            display_name="Save Latent",
            category="_for_testing",
            is_output_node=True,
            inputs=[io.Latent.Input("samples"), io.String.Input("filename_prefix", default="latents/ComfyUI")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], filename_prefix: str) -> io.NodeOutput:
        file = host.output_path(filename_prefix, "latent")
        tensors = {"latent_tensor": samples["samples"].contiguous(), "latent_format_version_0": torch.tensor([])}
        graph = {name: json.dumps(value) for name, value in host.metadata(cls.hidden).items()}
        write_whole({file.path: lambda path: path.write_bytes(safetensors.torch.save(tensors, metadata=graph))})
        return io.NodeOutput(ui={"latents": [ui_entry(file, "output")]})


class LoadLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadLatent",
            display_name="Load Latent",
            category="_for_testing",
            inputs=[io.Combo.Input("latent", input_files((".latent",)))],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def validate_inputs(cls, latent: str) -> bool | str:
        return file_exists(latent)

    @classmethod
    def fingerprint_inputs(cls, latent: str) -> str:
        return file_hash(latent)

    @classmethod
    def execute(cls, latent: str) -> io.NodeOutput:
        path = host.input_path(latent)
        try:
            tensors = safetensors.torch.load_file(path, device="cpu")
            samples = tensors["latent_tensor"].float()
        except (safetensors.SafetensorError, KeyError) as error:
            raise FileError(f"{path} is no file of the Save Latent node ({error}).") from error
        scale = 1.0 if "latent_format_version_0" in tensors else 1.0 / SD_LATENT_SCALE
        return io.NodeOutput({"samples": samples * scale})


class Primitive(io.ComfyNode):
    """A value that several inputs share."""

    @classmethod
    def execute(cls, value: Any) -> io.NodeOutput:
        return io.NodeOutput(value)


class PrimitiveInt(Primitive):
    @classmethod
    def define_schema(cls) -> io.Schema:
        value = io.Int.Input("value", min=-sys.maxsize, max=sys.maxsize, control_after_generate=True)
        return io.Schema(node_id="PrimitiveInt", display_name="Int", category="utils/primitive",
                         inputs=[value], outputs=[io.Int.Output()])


class PrimitiveFloat(Primitive):
    @classmethod
    def define_schema(cls) -> io.Schema:
        value = io.Float.Input("value", min=-sys.maxsize, max=sys.maxsize)
        return io.Schema(node_id="PrimitiveFloat", display_name="Float", category="utils/primitive",
                         inputs=[value], outputs=[io.Float.Output()])


class PrimitiveString(Primitive):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="PrimitiveString", display_name="String", category="utils/primitive",
                         inputs=[io.String.Input("value")], outputs=[io.String.Output()])


class PrimitiveStringMultiline(Primitive):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="PrimitiveStringMultiline", display_name="String (Multiline)",
                         category="utils/primitive", inputs=[io.String.Input("value", multiline=True)],
                         outputs=[io.String.Output()])


class PrimitiveBoolean(Primitive):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="PrimitiveBoolean", display_name="Boolean", category="utils/primitive",
                         inputs=[io.Boolean.Input("value")], outputs=[io.Boolean.Output()])


NODES = [LoadImage, LoadImageMask, SaveImage, PreviewImage, SaveLatent, LoadLatent, PrimitiveInt, PrimitiveFloat,
         PrimitiveString, PrimitiveStringMultiline, PrimitiveBoolean]
