"""A picture of who or what the video shows, as whole tokens in front of it: the Fun V1.1 Control models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..models.network import Network
from ..models.vae import normalised
from .image import Encode, Look, as_pixels
from .injection import Canvas, Condition, Injection, Rank, misfit


@dataclass(frozen=True, eq=False)
class ReferenceCondition(Condition):
    """`latents` (1, 16, 1, h, w) normalised; CLIP `features` (1, n, 1280) go before those of a start image."""

    latents: Tensor
    features: Tensor | None = None
    in_front = 1

    def inject(self, network: Network, canvas: Canvas) -> Injection:
        trunk = network.trunk
        if not trunk.layout.reference:
            raise misfit(network, "reference image", "a Fun V1.1 Control model", "Wan Reference Image")
        latents = canvas.take("The reference image", self.latents, frames=1)
        context = None
        if self.features is not None and trunk.layout.image_tokens:
            context = trunk.img_emb(self.features.to(canvas.device, canvas.dtype))
        return Injection(
            prefix_tokens=trunk.ref_conv(latents[:, :, 0])[:, :, None],  # (1, dim, 1, h/2, w/2)
            context_prefix=context,
            context_rank=Rank.REFERENCE,
        )


def reference_condition(picture: Tensor, encode: Encode, look: Look | None = None) -> ReferenceCondition:
    """Prepare a picture (1, H, W, 3) in 0..1 of the size of the video that is made."""
    return ReferenceCondition(normalised(encode(as_pixels(picture))), None if look is None else look(picture))
