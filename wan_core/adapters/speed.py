"""How much the picture moves: a number for the motion speed controller."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InputError, ModelError
from ..models.network import Network
from .injection import Canvas, Condition, Injection

HIGHEST_SPEED = 100


@dataclass(frozen=True)
class SpeedCondition(Condition):
    motion_bucket_id: float  # 0 hardly moves, 100 moves most

    def __post_init__(self):
        if not 0 <= self.motion_bucket_id <= HIGHEST_SPEED:
            raise InputError(
                f"motion_bucket_id is {self.motion_bucket_id}, but the controller was trained for 0 to {HIGHEST_SPEED}."
            )

    def inject(self, network: Network, canvas: Canvas) -> Injection:
        if network.motion_controller is None:
            raise ModelError(
                "This model has no motion speed controller. Add one with Add Wan Module "
                "(Wan2.1-1.3b-speedcontrol-v1, for models of the size 1.3B), or remove Wan Motion Speed."
            )
        speed = torch.tensor([float(self.motion_bucket_id)], device=canvas.device)
        return Injection(time_add=network.motion_controller(speed))  # (1, 6, dim)
