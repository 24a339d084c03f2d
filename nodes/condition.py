"""Menu WanFlow/conditions: pictures and videos become what the sampler shows to the model beside the text."""

from __future__ import annotations

from torch import Tensor

from ..wan_core.adapters.control import control_condition
from ..wan_core.adapters.image import image_condition
from ..wan_core.adapters.reference import reference_condition
from ..wan_core.fit import EXTENSIONS, FITS, fit_clip, fit_images
from ..wan_core.size import pixel_size
from .host import host, io
from .wires import WanConditions, WanImageEncoder, WanVAE, encode_with, latent_samples, look_with

CONDITIONS_OUTPUT_TOOLTIP = "For conditions of Wan Sampler, or of another condition node."


def vae_input() -> io.MultiType.Input:
    return io.MultiType.Input("vae", types=[WanVAE, io.Vae], tooltip="From Load Wan VAE, or core's Load VAE.")


def latent_input() -> io.Latent.Input:
    return io.Latent.Input("latent", tooltip="The latent that goes to Wan Sampler too: it sets size and length.")


def fit_input() -> io.Combo.Input:
    return io.Combo.Input(
        "fit",
        options=list(FITS),
        default="cover",
        tooltip="If the size differs: cover cuts the overhang, contain adds black, stretch distorts.",
    )


def image_encoder_input() -> io.MultiType.Input:
    return io.MultiType.Input(
        "image_encoder",
        types=[WanImageEncoder, io.ClipVision],
        optional=True,
        tooltip="From Load Wan Image Encoder, or core's Load CLIP Vision. The models were trained with it.",
    )


def conditions_input() -> WanConditions.Input:
    return WanConditions.Input("conditions", optional=True, tooltip="Other conditions, to which this one is added.")


def conditions_output() -> WanConditions.Output:
    return WanConditions.Output(display_name="conditions", tooltip=CONDITIONS_OUTPUT_TOOLTIP)


def latent_size(latent: dict) -> tuple[int, int, int]:
    """(T, h, w) of a LATENT."""
    return tuple(latent_samples(latent).shape[2:])


def fitted(name: str, images: Tensor | None, size: tuple[int, int, int], fit: str) -> Tensor | None:
    """The images of an input (n, 8h, 8w, 3), whatever was changed being said; None if there are none."""
    if images is None:
        return None
    _, height, width = pixel_size(*size)
    images, note = fit_images(images, width, height, fit)
    if note:
        host.say(f"{name}: {note}")
    return images


def fitted_clip(name: str, images: Tensor, size: tuple[int, int, int], fit: str, extend: str) -> Tensor:
    """The images of an input as a clip of the video's size (4n+1, 8h, 8w, 3), whatever was changed being said."""
    frames, height, width = pixel_size(*size)
    clip, note = fit_clip(images, width, height, frames, fit, extend)
    if note:
        host.say(f"{name}: {note}")
    return clip


class ImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowImageToVideo",
            display_name="Wan First / Last Image",
            category="WanFlow/conditions",
            description="Makes the video begin or end with a picture. For Image to Video, First-Last-Frame, "
            "Fun InP, Fun Control and Control-Camera models.",
            inputs=[
                vae_input(),
                latent_input(),
                fit_input(),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="What the video begins with. Several frames: it goes on from the last of them.",
                ),
                io.Image.Input(
                    "end_image",
                    optional=True,
                    tooltip="What the video ends with, for First-Last-Frame, Fun InP and Fun Control models.",
                ),
                image_encoder_input(),
                conditions_input(),
            ],
            outputs=[conditions_output()],
        )

    @classmethod
    def execute(cls, vae, latent, fit, start_image=None, end_image=None, image_encoder=None, conditions=()):
        size = latent_size(latent)
        start, end = fitted("start_image", start_image, size, fit), fitted("end_image", end_image, size, fit)
        if image_encoder is None and not (start is None and end is None):
            host.say(
                "Wan First / Last Image has no image_encoder: the model begins with the picture but does not look at "
                "it. Results are better with Load Wan Image Encoder."
            )
        condition = image_condition(start, end, size, encode_with(vae), look_with(image_encoder))
        return io.NodeOutput((*conditions, condition))


class ControlVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowControlVideo",
            display_name="Wan Control Video",
            category="WanFlow/conditions",
            description="Lets the video follow the lines, depth or poses of another one. For Fun Control models "
            "and control LoRAs.",
            inputs=[
                vae_input(),
                latent_input(),
                io.Image.Input("control_video", tooltip="Frames of edges, depth, poses or the like."),
                fit_input(),
                io.Combo.Input(
                    "extend",
                    options=list(EXTENSIONS),
                    default="hold",
                    tooltip="If it is too short: hold the last frame, or loop. If it is too long, the rest is unused.",
                ),
                conditions_input(),
            ],
            outputs=[conditions_output()],
        )

    @classmethod
    def execute(cls, vae, latent, control_video, fit, extend, conditions=()):
        clip = fitted_clip("control_video", control_video, latent_size(latent), fit, extend)
        return io.NodeOutput((*conditions, control_condition(clip, encode_with(vae))))


class ReferenceImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowReferenceImage",
            display_name="Wan Reference Image",
            category="WanFlow/conditions",
            description="Shows the model who or what the video is about. For Fun V1.1 Control models.",
            inputs=[
                vae_input(),
                latent_input(),
                io.Image.Input("image", tooltip="The person or thing, best on a plain background."),
                fit_input(),
                image_encoder_input(),
                conditions_input(),
            ],
            outputs=[conditions_output()],
        )

    @classmethod
    def execute(cls, vae, latent, image, fit, image_encoder=None, conditions=()):
        picture = fitted("image", image, latent_size(latent), fit)
        if len(picture) > 1:
            host.say(f"image: of {len(picture)} pictures the first one is used.")
        condition = reference_condition(picture[:1], encode_with(vae), look_with(image_encoder))
        return io.NodeOutput((*conditions, condition))


NODES = [ImageToVideo, ControlVideo, ReferenceImage]
