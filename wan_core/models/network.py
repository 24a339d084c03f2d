"""A diffusion model as a whole: the trunk, and the modules beside it that only some conditions call."""

from __future__ import annotations

from torch import nn

from .dit import DiT
from .embedders import MotionController
from .vace import VACE


class Network(nn.Module):
    """`vace` and `motion_controller` are None where the model has none.

    Below its part every tensor has the name of the published file, where trunk and VACE lie side by side and the
    motion controller in a file of its own. Calling the network calls the trunk.
    """

    def __init__(self, trunk: DiT, vace: VACE | None = None, motion_controller: MotionController | None = None):
        super().__init__()
        self.trunk = trunk
        self.vace = vace
        self.motion_controller = motion_controller

    def forward(self, *arguments, **options):
        return self.trunk(*arguments, **options)
