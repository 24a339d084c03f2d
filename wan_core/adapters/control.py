"""A video whose lines, depth or poses the new video follows: the Fun Control models, and control LoRAs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..models.network import Network
from ..models.vae import normalised
from .image import Encode, as_pixels
from .injection import Canvas, Condition, Injection, misfit


@dataclass(frozen=True, eq=False)
class ControlCondition(Condition):
    """`latents` (1, 16, T, h, w), normalised."""

    latents: Tensor

    def inject(self, network: Network, canvas: Canvas) -> Injection:
        if "control" not in network.trunk.layout.concat:
            models = "a Fun Control model or a Text to Video model with a control LoRA"
            raise misfit(network, "control video", models, "Wan Control Video")
        return Injection(concat={"control": canvas.take("The control video", self.latents)})


def control_condition(clip: Tensor, encode: Encode) -> ControlCondition:
    """Prepare a clip (4n+1, H, W, 3) in 0..1 of the size of the video that is made."""
    return ControlCondition(normalised(encode(as_pixels(clip))))
