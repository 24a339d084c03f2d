"""Small random models of every family, and everything that can be given to them."""

import torch
from comfyui_wanflow.wan_core.adapters.camera import CameraCondition
from comfyui_wanflow.wan_core.adapters.control import ControlCondition
from comfyui_wanflow.wan_core.adapters.image import ImageCondition, known_frames
from comfyui_wanflow.wan_core.adapters.reference import ReferenceCondition
from comfyui_wanflow.wan_core.adapters.speed import SpeedCondition
from comfyui_wanflow.wan_core.adapters.vace import VACECondition
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.embedders import MotionController
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from comfyui_wanflow.wan_core.trajectory import trajectory

DIM, LAYERS, HEADS = 256, 2, 4
FAMILIES = {
    "T2V": {},
    "I2V": {"in_dim": 36, "image_tokens": True},  # and Fun InP
    "FLF2V": {"in_dim": 36, "image_tokens": True, "image_positions": 514},
    "Control": {"in_dim": 48, "image_tokens": True},
    "Control V1.1": {"in_dim": 48, "image_tokens": True, "reference": True},
    "Camera": {"in_dim": 32, "image_tokens": True, "camera_channels": 24},
    "VACE": {},
    "speed": {},
    "VACE and speed": {},
}
SIZE = (5, 6, 6)  # of latents: 45 tokens, which four processes cannot share evenly


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(family):
    torch.manual_seed(0)
    layout = DiTLayout(DIM, 64, LAYERS, HEADS, text_dim=8, frequency_dim=16, **FAMILIES[family])
    parts = {}
    if "VACE" in family:
        parts["vace"] = VACE(VACELayout(DIM, 64, layers=1, heads=HEADS))
    if "speed" in family:
        parts["motion_controller"] = MotionController(16, DIM)
    network = Network(DiT(layout), **parts)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, parameter.shape[-1] ** -0.5)
    return WanModel(
        module=network, name=family, device=torch.device("cpu"), compute_dtype=torch.float32, layout=layout,
        residency=Residency(network.trunk), beside={name: Residency(part) for name, part in parts.items()},
    )  # fmt: skip


def image(first=1, last=0, seed=10):
    """The first and the last picture, with their CLIP features."""
    frames = 4 * (SIZE[0] - 1) + 1
    known = known_frames(first, last, frames).expand(1, -1, -1, *SIZE[1:])
    start = random(1, 257, 1280, seed=seed + 1) if first else None
    end = random(1, 257, 1280, seed=seed + 2) if last else None
    return ImageCondition(random(1, 16, *SIZE, seed=seed), known, start, end)


def vace(references=0, seed=20):
    parts = [random(1, channels, *SIZE, seed=seed + i) for i, channels in enumerate((16, 16, 64))]
    pictures = random(1, 16, references, *SIZE[1:], seed=seed + 3) if references else None
    return VACECondition(*parts, references=pictures, strength=0.8)


CONDITIONS = {
    "start image": image(),
    "end image": image(0, 1, seed=13),
    "start and end image": image(1, 1, seed=16),
    "control video": ControlCondition(random(1, 16, *SIZE, seed=30)),
    "reference image": ReferenceCondition(random(1, 16, 1, *SIZE[1:], seed=31), random(1, 257, 1280, seed=32)),
    "camera": CameraCondition(trajectory("Left", 0.01, 4 * (SIZE[0] - 1) + 1)),
    "VACE video": vace(),
    "VACE pictures": vace(references=2),
    "motion speed": SpeedCondition(70),
}


def video(model, *names, latent=None, team=None, say=None, **settings):
    """What the model makes of these of `CONDITIONS`, raw latents (1, 16, *SIZE)."""
    positive, negative = random(1, 4, 8, seed=7), random(1, 6, 8, seed=8)
    latent = torch.zeros(1, 16, *SIZE) if latent is None else latent
    settings = Settings(**{"seed": 1, "steps": 2, "cfg": 3.0, **settings})
    conditions = [CONDITIONS[name] for name in names]
    return sample(model, positive, negative, latent, settings, conditions, say=say, team=team)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()
