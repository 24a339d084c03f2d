"""What a camera sees on its way through a room with checkered walls: a move shown before a video is made with it."""

from __future__ import annotations

import torch
from torch import Tensor

from .trajectory import Trajectory

ROOM = (3.0, 2.0, 4.0)  # half of its width, height and depth; the camera starts in the middle, looking along the depth
TILE = 0.5
SIDE = 256  # of the pictures, at most
WALLS = ((0.95, 0.55, 0.50), (0.55, 0.75, 0.95), (0.75, 0.90, 0.60))  # across x, y and z


def view(trajectory: Trajectory, height: int, width: int) -> Tensor:
    """Pictures (F, H, W, 3) in 0..1, of the shape of height x width but no longer than `SIDE`."""
    scale = min(1, SIDE / max(height, width))
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    return torch.cat([picture(trajectory, frame, height, width) for frame in range(len(trajectory))])


def picture(trajectory: Trajectory, frame: int, height: int, width: int) -> Tensor:
    """(1, H, W, 3): the rays followed to the wall that they meet first."""
    directions = trajectory.rays(frame, frame + 1, height, width)[..., 3:]
    origin, half = trajectory.poses[frame, :3, 3].float(), torch.tensor(ROOM)
    reach = (torch.where(directions > 0, half, -half) - origin) / directions  # way to the wall across each axis
    reach = torch.where(reach > 0, reach, torch.inf)  # outside the room some walls lie behind
    distance, axis = reach.min(dim=-1)
    hit = origin + distance.nan_to_num(posinf=0.0)[..., None] * directions
    tiles = (hit / TILE + 1e-3).floor().long()  # the grain of salt keeps a wall's own coordinate on one side
    dark = (tiles.sum(dim=-1) % 2).bool()
    shade = (1.0 - 0.06 * distance.clamp(max=10)) * torch.where(dark, 0.6, 1.0)
    return torch.tensor(WALLS)[axis] * shade[..., None]
