"""Menu WanFlow/conditions: VACE."""

from __future__ import annotations

import torch
from torch import Tensor

from ..wan_core.adapters.vace import vace_condition
from ..wan_core.errors import InputError
from ..wan_core.fit import EXTENSIONS, fit_images, fit_pictures
from ..wan_core.size import pixel_size
from .condition import (
    conditions_input,
    conditions_output,
    fit_input,
    fitted_clip,
    latent_input,
    latent_size,
    vae_input,
)
from .host import host, io
from .wires import encode_with

MASK_EDGES = ("hard", "soft")
PREVIEW_HEIGHT = 256
GREY = 0.01  # how far from 0.5 a colour still is grey


class VACE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowVACE",
            display_name="Wan VACE",
            category="WanFlow/conditions",
            description="Follows, repairs or extends a video, and puts people or things from pictures into it. "
            "For VACE models, or any T2V model with a VACE module.",
            inputs=[
                vae_input(),
                latent_input(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    round=0.001,
                    tooltip="How much VACE leads the model. 1 as trained; much more breaks the picture.",
                ),
                fit_input(),
                io.Combo.Input(
                    "extend",
                    options=list(EXTENSIONS),
                    default="hold",
                    tooltip="If video or mask is too short: hold the last frame, or loop. The surplus is unused.",
                ),
                io.Combo.Input(
                    "mask_edges",
                    options=list(MASK_EDGES),
                    default="hard",
                    tooltip="hard: grey in the mask becomes black or white, as trained. soft: it is kept.",
                ),
                io.Image.Input(
                    "video",
                    optional=True,
                    tooltip="The video to change, or depth, poses, lines to follow. Grey (0.5) where there is nothing.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White is made anew, black is kept. Without it all is made anew."
                ),
                io.Image.Input(
                    "reference_image",
                    optional=True,
                    tooltip="Who or what is in the video, best on white. A batch gives several.",
                ),
                conditions_input(),
            ],
            outputs=[
                conditions_output(),
                io.Image.Output(display_name="preview", tooltip="What is kept, what is given to change, and the mask."),
            ],
        )

    @classmethod
    def execute(
        cls, vae, latent, strength, fit, extend, mask_edges, video=None, mask=None, reference_image=None, conditions=()
    ):
        size = latent_size(latent)
        clip = None if video is None else fitted_clip("video", video, size, fit, extend)
        holes = None if mask is None else fitted_mask(mask, size, fit, extend, mask_edges)
        pictures = None if reference_image is None else letterboxed(reference_image, size)
        for sentence in warnings(clip, holes, pictures):
            host.say(sentence)
        condition = vace_condition(clip, holes, pictures, size, encode_with(vae), strength)
        return io.NodeOutput((*conditions, condition), preview(clip, holes, size).to(host.intermediate_device()))


def fitted_mask(mask: Tensor, size: tuple[int, int, int], fit: str, extend: str, edges: str) -> Tensor:
    """A MASK (F, H, W) or (H, W) as (4n+1, 8h, 8w), black and white unless its edges are soft."""
    if edges not in MASK_EDGES:
        raise InputError(f"mask_edges is {edges!r}, but only {', '.join(MASK_EDGES)} exist. Choose one of them.")
    if mask.ndim == 2:
        mask = mask[None]
    holes = fitted_clip("mask", mask[..., None], size, fit, extend)[..., 0]
    return holes if edges == "soft" else (holes > 0.5).float()


def letterboxed(pictures: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Pictures (P, H, W, 3) whole, on white, as VACE was trained; what was changed is said."""
    _, height, width = pixel_size(*size)
    pictures, note = fit_images(pictures, width, height, "contain", background=1.0)
    if note:
        host.say(f"reference_image: {note}")
    return pictures


def warnings(video: Tensor | None, mask: Tensor | None, pictures: Tensor | None) -> list[str]:
    """What is allowed but hardly meant."""
    found = []
    if video is None and pictures is None:
        found.append("Wan VACE has neither a video nor a reference image: it has nothing to go by.")
    if mask is not None and video is None:
        found.append("Wan VACE has a mask but no video: what the mask keeps will be grey.")
    if mask is not None and not mask.any():
        found.append("The mask of Wan VACE is black everywhere: all of the video is kept, nothing is made.")
    if video is not None and (video - 0.5).abs().max() < GREY:
        found.append("The video of Wan VACE is grey everywhere: it shows the model nothing.")
    return found


def preview(video: Tensor | None, mask: Tensor | None, size: tuple[int, int, int]) -> Tensor:
    """Frames (4n+1, H, 3W, 3): what is kept, what is given to change, and the mask, side by side."""
    frames, height, width = pixel_size(*size)
    video = torch.full((frames, height, width, 3), 0.5) if video is None else video
    mask = torch.ones(frames, height, width) if mask is None else mask
    scale = min(1, PREVIEW_HEIGHT / height)
    small = max(1, round(width * scale)), max(1, round(height * scale))
    video = fit_pictures(video, *small, "stretch")
    mask = fit_pictures(mask[..., None].expand(-1, -1, -1, 3), *small, "stretch")
    kept, changed = ((video - 0.5) * share + 0.5 for share in (1 - mask, mask))
    return torch.cat([kept, changed, mask], dim=2)


NODES = [VACE]
