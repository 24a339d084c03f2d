"""A camera's way, told to the Control-Camera models as the rays of all pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, ModelError
from ..models.network import Network
from ..size import FRAMES_PER_LATENT, pixel_size
from ..trajectory import Trajectory
from .injection import Canvas, Condition, Injection


@dataclass(frozen=True, eq=False)
class CameraCondition(Condition):
    trajectory: Trajectory  # one pose for every frame of the video
    embedded = 1

    def inject(self, network: Network, canvas: Canvas) -> Injection:
        layout = network.trunk.layout
        if not layout.camera_channels:
            raise ModelError(
                f"This model has no camera adapter (it is a {layout.family} model, in_dim {layout.in_dim}). "
                "Load a Control-Camera model, or remove Wan Camera."
            )
        frames, height, width = pixel_size(canvas.frames, canvas.height, canvas.width)
        if len(self.trajectory) != frames:
            raise InputError(
                f"The camera moves for {len(self.trajectory)} frames, but the video that is made has {frames}. "
                "Connect the same latent to Wan Camera and to the sampler."
            )
        embedded = []  # one latent frame at a time: the rays of a whole video take a gigabyte
        for frame in range(canvas.frames):
            rays = latent_frame_rays(self.trajectory, frame, height, width).to(canvas.device, canvas.dtype)
            embedded.append(network.trunk.control_adapter(rays))
        return Injection(embed_add=torch.cat(embedded, dim=2))


def latent_frame_rays(trajectory: Trajectory, frame: int, height: int, width: int) -> Tensor:
    """(1, 24, 1, height, width) of one latent frame: each of the six coordinates in four frames, the first frame
    four times in latent frame 0."""
    if frame == 0:
        rays = trajectory.rays(0, 1, height, width).expand(FRAMES_PER_LATENT, -1, -1, -1)
    else:
        start = (frame - 1) * FRAMES_PER_LATENT + 1
        rays = trajectory.rays(start, start + FRAMES_PER_LATENT, height, width)
    return rays.movedim(3, 0).flatten(0, 1)[None, :, None]  # (4, h, w, 6) -> (1, 6 * 4, 1, h, w)
