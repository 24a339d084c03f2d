"""What distinguishes one diffusion transformer of Wan 2.1 from another, read from its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ModelError
from .embedders import IMAGE_FEATURES

LATENT_CHANNELS = 16
PATCH = (1, 2, 2)  # frames, rows and columns of latents in one token
HEAD_DIM = 128

# What a model reads beside the latents, by its number of input channels, in the order of the channels.
CONCAT = {
    16: {},
    32: {"image": 16},
    36: {"mask": 4, "image": 16},
    48: {"control": 16, "image": 16},
}
# With 32 channels but no eyes for an image or a camera: Text to Video models that a control LoRA has widened.
CONTROLLED = {"control": 16}

# What models with these input channels are for; some need a closer look, see `DiTLayout.family`.
FAMILIES = {16: "Text to Video", 32: "Fun Control-Camera", 36: "Image to Video or Fun InP", 48: "Fun Control"}

# What users call a model of this width.
SIZES = {1536: " (1.3B)", 3072: " (Wan 2.2 5B)", 5120: " (14B)"}

# Keys and shapes that only other families have, with the family's name.
OTHER_FAMILIES = {
    "casual_audio_encoder": "Wan 2.2 S2V",
    "audio_injector": "Wan 2.2 S2V",
    "face_adapter": "Wan 2.2 Animate",
    "motion_encoder": "Wan 2.2 Animate",
    "audio_proj": "an audio-driven Wan (MultiTalk, HuMo)",
}


@dataclass(frozen=True)
class DiTLayout:
    """Everything that distinguishes one DiT from another, read from its tensors."""

    dim: int
    ffn_dim: int
    layers: int
    heads: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    frequency_dim: int = 256
    image_tokens: bool = False
    image_features: int = IMAGE_FEATURES  # width of the CLIP features that are looked at
    image_positions: int = 0  # rows of img_emb.emb_pos, 0 where there is none
    reference: bool = False  # ref_conv
    camera_channels: int = 0  # of the rays that control_adapter takes, 0 where there is none

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple]) -> DiTLayout:
        """The layout of a checkpoint in the published names; a `ModelError` names a model of another family."""
        for prefix, family in OTHER_FAMILIES.items():
            if any(key.startswith(prefix) for key in shapes):
                raise ModelError(f"This is {family}, not a Wan 2.1 model: it has '{prefix}' weights. {LOAD_WAN21}")
        missing = [key for key in ESSENTIAL if key not in shapes]
        if missing:
            raise ModelError(f"This is not a Wan 2.1 diffusion model: it has no '{missing[0]}'. {LOAD_WAN21}")
        dim, in_dim = shapes["patch_embedding.weight"][:2]
        layout = cls(
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            layers=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
            heads=dim // HEAD_DIM,
            in_dim=in_dim,
            out_dim=shapes["head.head.weight"][0] // math.prod(PATCH),
            text_dim=shapes["text_embedding.0.weight"][1],
            frequency_dim=shapes["time_embedding.0.weight"][1],
            image_tokens="blocks.0.cross_attn.k_img.weight" in shapes,
            image_features=shapes.get("img_emb.proj.0.weight", (IMAGE_FEATURES,))[0],
            image_positions=shapes.get("img_emb.emb_pos", (1, 0))[1],
            reference="ref_conv.weight" in shapes,
            camera_channels=shapes.get("control_adapter.conv.weight", (0, 0))[1] // 64,
        )
        layout.check()
        return layout

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def family(self) -> str:
        """What such models are for. VACE lies beside a Text to Video trunk."""
        if self.image_positions:
            return "First-Last-Frame to Video"
        if self.is_controlled:
            return "Text to Video with control"
        return "Fun V1.1 Control" if self.reference else FAMILIES[self.in_dim]

    @property
    def is_controlled(self) -> bool:
        """Whether this is a Text to Video model whose input was widened for a control video, by a LoRA or for good."""
        return self.in_dim == 32 and not (self.image_tokens or self.camera_channels)

    @property
    def concat(self) -> Mapping[str, int]:
        """What is read beside the latents, in the order of the channels: name -> number of channels."""
        return CONTROLLED if self.is_controlled else CONCAT[self.in_dim]

    def check(self) -> None:
        """Refuse, by name, the layouts that look alike but belong to Wan 2.2."""
        if self.out_dim == 48:
            raise ModelError(f"This is Wan 2.2 TI2V-5B (48 latent channels), not a Wan 2.1 model. {LOAD_WAN21}")
        if self.in_dim == 52:
            raise ModelError(f"This is Wan 2.2 Fun Control (in_dim 52), not a Wan 2.1 model. {LOAD_WAN21}")
        if self.in_dim == 36 and not self.image_tokens:
            raise ModelError(
                f"This is a Wan 2.2 A14B image model (in_dim 36, no image tokens), not a Wan 2.1 model. {LOAD_WAN21}"
            )
        if self.in_dim not in CONCAT or self.out_dim != LATENT_CHANNELS or self.dim % HEAD_DIM:
            raise ModelError(
                f"No Wan 2.1 model has {self.in_dim} input channels, {self.out_dim} output channels and "
                f"width {self.dim} (a multiple of {HEAD_DIM} is needed). {LOAD_WAN21}"
            )


def size_name(dim: int) -> str:
    return f"width {dim}{SIZES.get(dim, '')}"


LOAD_WAN21 = "Load a Wan 2.1 diffusion model (T2V, I2V, FLF2V, Fun or VACE)."
ESSENTIAL = (
    "patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight", "blocks.0.ffn.0.weight",
    "head.head.weight",
)  # fmt: skip
