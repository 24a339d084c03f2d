"""Which of the tiny VAEs a file holds: the published ones have the same tensors, and differ in what latents mean."""

from __future__ import annotations

import torch

from ..errors import FileError
from ..models.tiny_vae import FIRST_LAYER, LAST_LAYER, LATENT_LAYER
from .checkpoint import Checkpoint
from .identify import Shapes

# Tiny VAEs of the same shape that know other latents, by their published names.
STRANGERS = {"taehv": "HunyuanVideo", "lighttaehy": "HunyuanVideo", "taecvx": "CogVideoX", "taeos": "Open-Sora"}


def is_tiny(shapes: Shapes) -> bool:
    """Whether these are the tensors of a tiny VAE."""
    return all(f"{layer}.weight" in shapes for layer in (FIRST_LAYER, LATENT_LAYER, LAST_LAYER))


def keeps_raw(checkpoint: Checkpoint) -> bool:
    """Whether its latents are the full VAE's as they are (lighttaew2_1), or normalised (taew2_1).

    The tensors do not tell, the published names do; under another name the type of the numbers does, as taew2_1 is
    published in fp16 and lighttaew2_1 is not. Raises FileError where the name is that of another model's.
    """
    name = checkpoint.files[0].name.lower()
    if "taew" in name:
        return "lighttae" in name
    for part, model in STRANGERS.items():
        if part in name:
            raise FileError(
                f"{checkpoint.description} is the tiny VAE of {model} by its name, and its tensors look like those for "
                "Wan 2.1. Load taew2_1 or lighttaew2_1; if it is one of these, give it that name."
            )
    return checkpoint.dtype(f"{LATENT_LAYER}.weight") != torch.float16
