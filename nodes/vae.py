"""Menu WanFlow/vae: pictures become latents, and latents pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..wan_core.errors import InputError
from ..wan_core.fit import FITS, fit_clip
from ..wan_core.size import PIXELS_PER_LATENT, pixel_size, snap_size
from .host import host, io
from .wires import WanVAE, latent_samples, number_pair, say_if_tiny

# What tiles are added up in.
SUMS = {"none": torch.float32, "DiffSynth": torch.bfloat16}


def tiling_inputs() -> list:
    return [
        io.Boolean.Input(
            "tiled",
            default=False,
            tooltip="Works tile by tile: less memory, slower, faint seams at worst. Off: only where it would not fit.",
        ),
        io.String.Input(
            "tile_size", default="30x52", tooltip="Height x width of a tile, in latent pixels of 8x8 pixels each."
        ),
        io.String.Input(
            "tile_stride",
            default="15x26",
            tooltip="From one tile to the next, height x width; at most tile_size. The rest overlaps and is blended.",
        ),
    ]


def rounding_input() -> io.Combo.Input:
    return io.Combo.Input(
        "rounding",
        options=list(SUMS),
        default="none",
        optional=True,
        tooltip="none is best. DiffSynth adds tiles up in bf16, as DiffSynth-Studio does, to make the same numbers.",
    )


def tiling(tiled: bool, tile_size: str, tile_stride: str, rounding: str = "none") -> dict:
    if rounding not in SUMS:
        raise InputError(f"rounding is {rounding!r}, but only {', '.join(SUMS)} exist. Choose one of them.")
    size, stride = number_pair(tile_size, "tile_size"), number_pair(tile_stride, "tile_stride")
    return {"tiled": tiled, "tile_size": size, "tile_stride": stride, "sums": SUMS[rounding]}


def in_colour(pixels: Tensor) -> Tensor:
    """-1..1 -> 0..1, in the same place."""
    return pixels.div_(2).add_(0.5).clamp_(0, 1)


def room(estimate: Callable, picture: tuple[int, int], tiles: dict) -> int:
    """The working memory to ask of the host, by a VAE's estimate; picture: (height, width) in pixels."""
    if tiles["tiled"]:
        picture = tuple(PIXELS_PER_LATENT * side for side in tiles["tile_size"])
    return estimate(picture)


class VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowVAEEncode",
            display_name="Wan VAE Encode",
            category="WanFlow/vae",
            description="Encodes a video, for example for Wan Sampler with denoise below 1.",
            inputs=[
                WanVAE.Input("vae", tooltip="From Load Wan VAE."),
                io.Image.Input("images", tooltip="The frames. Size and length are fitted to what Wan can make."),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default="cover",
                    tooltip="If the size differs: cover cuts the overhang, contain adds black, stretch distorts.",
                ),
                *tiling_inputs(),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Fit the images to this latent's size, length and batch."
                ),
                rounding_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For latent of Wan Sampler.")],
        )

    @classmethod
    def execute(cls, vae, images, fit, tiled, tile_size, tile_stride, latent=None, rounding="none"):
        if latent is None:
            batch, (frames, height, width) = 1, images.shape[:3]
            width, height, frames, _ = snap_size(width, height, frames)
        else:
            batch, _, *size = latent_samples(latent).shape
            frames, height, width = pixel_size(*size)
        clip, note = fit_clip(images, width, height, frames, fit)
        if note:
            host.say(note)
        say_if_tiny(vae)
        pixels = (clip.movedim(-1, 0)[None] * 2).sub_(1)  # (F, H, W, 3) in 0..1 -> (1, 3, F, H, W) in -1..1
        tiles = tiling(tiled, tile_size, tile_stride, rounding)
        with host.attached(vae, room(vae.encoding_room, (height, width), tiles)):
            samples = vae.encode(pixels, **tiles)  # (1, 16, T, h, w)
        samples = samples.float().to(host.intermediate_device())
        return io.NodeOutput({"samples": samples.repeat(batch, 1, 1, 1, 1)})


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowVAEDecode",
            display_name="Wan VAE Decode",
            category="WanFlow/vae",
            description="Decodes a latent into frames. Several videos of a batch follow one another.",
            inputs=[
                WanVAE.Input("vae", tooltip="From Load Wan VAE."),
                io.Latent.Input("latent", tooltip="From Wan Sampler, or core's KSampler with a Wan model."),
                *tiling_inputs(),
                rounding_input(),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames, for Save Wan Video or any image node.")
            ],
        )

    @classmethod
    def execute(cls, vae, latent, tiled, tile_size, tile_stride, rounding="none"):
        samples, tiles = latent_samples(latent), tiling(tiled, tile_size, tile_stride, rounding)
        _, *picture = pixel_size(*samples.shape[2:])
        with host.attached(vae, room(vae.decoding_room, tuple(picture), tiles)):
            pixels = vae.decode(samples, **tiles)  # (b, 3, F, H, W) in -1..1
        images = in_colour(pixels).movedim(1, -1).flatten(0, 1)  # (b * F, H, W, 3) in 0..1
        return io.NodeOutput(images.to(host.intermediate_device()))


NODES = [VAEEncode, VAEDecode]
