"""ComfyUI's data as wan_core wants it. Every check that needs the name of an input happens here."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ..wan_core.errors import InputError
from ..wan_core.size import LATENT_CHANNELS
from .host import host, io

WanModel = io.Custom("WAN_MODEL")
WanTextEncoder = io.Custom("WAN_TEXT_ENCODER")
WanVAE = io.Custom("WAN_VAE")
WanConditions = io.Custom("WAN_CONDITIONS")


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


def number_pair(text: str, name: str) -> tuple[int, int]:
    """(height, width) of a text such as "30x52"."""
    match = re.fullmatch(r"\s*([1-9]\d*)\s*[x×,]\s*([1-9]\d*)\s*", text.lower())
    if not match:
        raise InputError(f'{name} is "{text}", but it must be height x width, such as 30x52.')
    return int(match[1]), int(match[2])
