"""ComfyUI's data as wan_core wants it. Every check that needs the name of an input happens here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..wan_core.errors import InputError
from ..wan_core.models.embedders import IMAGE_FEATURES
from ..wan_core.size import LATENT_CHANNELS, pixel_size
from .host import host, io

WanModel = io.Custom("WAN_MODEL")
WanTextEncoder = io.Custom("WAN_TEXT_ENCODER")
WanImageEncoder = io.Custom("WAN_IMAGE_ENCODER")
WanVAE = io.Custom("WAN_VAE")
WanConditions = io.Custom("WAN_CONDITIONS")
WanLora = io.Custom("WAN_LORA")
WanDataset = io.Custom("WAN_DATASET")
WanOffload = io.Custom("WAN_OFFLOAD")
WanLibrary = io.Custom("WAN_LIBRARY")
Choice = io.Custom("COMBO")  # as an output; what io.Combo gives out, ComfyUI 0.3.64 connects to nothing

TINY_ENCODES = (
    "{} is a tiny VAE: what it encodes is a rough likeness, and the video will follow that. Encode with the full VAE, "
    "and decode previews with this one."
)


def latent_samples(latent: dict[str, Any], name: str = "latent") -> Tensor:
    """The (b, 16, T, h, w) of a LATENT, raw as on ComfyUI's wires."""
    samples = latent["samples"]
    if samples.ndim != 5 or samples.shape[1] != LATENT_CHANNELS:
        raise InputError(
            f"{name} has the shape {tuple(samples.shape)}, which is not a Wan 2.1 video: that is (batch, 16, frames, "
            "height, width). Connect Empty Wan Latent, Wan VAE Encode, or another node that makes Wan latents."
        )
    return samples


def refuse_noise_mask(latent: dict[str, Any]) -> None:
    if latent.get("noise_mask") is not None:
        raise InputError(
            "The latent carries a noise mask, which Wan Sampler does not follow. "
            "Remove the node that sets the mask (Set Latent Noise Mask, VAE Encode for Inpainting)."
        )


def conditioning_text(conditioning: list, name: str) -> Tensor:
    """The (b, L, 4096) text of a CONDITIONING; that nothing else of it is used, is said."""
    if len(conditioning) != 1:
        raise InputError(
            f"{name} holds {len(conditioning)} conditionings, but Wan Sampler follows exactly one. "
            "Connect one Wan Prompt (or CLIP Text Encode) directly, without Conditioning Combine."
        )
    text, extras = conditioning[0]
    if unused := sorted(key for key, value in extras.items() if key != "pooled_output" and value is not None):
        host.say(f"Wan Sampler takes only the text of {name}; without effect: {', '.join(unused)}.")
    return text


def say_if_tiny(vae: Any) -> None:
    """Before something is encoded that a video will follow."""
    if getattr(vae, "tiny", False):
        host.say(TINY_ENCODES.format(vae.name))


def encode_with(vae: Any) -> Callable[[Tensor], Tensor]:
    """Pixels (1, 3, F, H, W) in -1..1 -> raw latents (1, 16, T, h, w), by our VAE or by ComfyUI's own."""

    def encode(pixels: Tensor) -> Tensor:
        if hasattr(vae, "first_stage_model"):  # ComfyUI's, which looks after its own memory
            return latent_samples({"samples": vae.encode(pixels[0].movedim(0, -1) / 2 + 0.5)}, "What vae makes").float()
        with host.attached(vae, vae.encoding_room(tuple(pixels.shape[3:]))):
            return vae.encode(pixels)

    say_if_tiny(vae)

    return encode


def decode_with(vae: Any) -> Callable[[Tensor], Tensor]:
    """Raw latents (1, 16, T, h, w) -> frames (F, H, W, 3) in 0..1."""

    def decode(latents: Tensor) -> Tensor:
        _, *picture = pixel_size(*latents.shape[2:])
        with host.attached(vae, vae.decoding_room(tuple(picture))):
            return (vae.decode(latents)[0].float() / 2 + 0.5).clamp(0, 1).movedim(0, -1)

    return decode


def look_with(image_encoder: Any) -> Callable[[Tensor], Tensor] | None:
    """A picture (1, H, W, 3) in 0..1 -> features (1, 257, 1280), by our image encoder or by ComfyUI's own."""
    if image_encoder is None:
        return None

    def look(picture: Tensor) -> Tensor:
        if hasattr(image_encoder, "encode_image"):  # ComfyUI's
            return check_features(image_encoder.encode_image(picture, crop=False).penultimate_hidden_states)
        with host.attached(image_encoder, image_encoder.working_room()):
            return image_encoder.encode(picture)

    return look


def check_features(features: Tensor) -> Tensor:
    if features.ndim != 3 or features.shape[2] != IMAGE_FEATURES:
        raise InputError(
            f"The image encoder gives features of the shape {tuple(features.shape)}, but Wan 2.1 needs those of "
            f"CLIP ViT-H, {IMAGE_FEATURES} wide. Load clip_vision_h.safetensors."
        )
    return features.float()


def number_pair(text: str, name: str) -> tuple[int, int]:
    """(height, width) of a text such as "30x52"."""
    match = re.fullmatch(r"\s*([1-9]\d*)\s*[x×,]\s*([1-9]\d*)\s*", text.lower())
    if not match:
        raise InputError(f'{name} is "{text}", but it must be height x width, such as 30x52.')
    return int(match[1]), int(match[2])


def names(text: str) -> list[str]:
    """Of a text with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
