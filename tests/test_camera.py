"""A camera's way as the Control-Camera models are told it."""

import json
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.adapters.camera import CameraCondition, latent_frame_rays
from comfyui_wanflow.wan_core.adapters.image import ImageCondition
from comfyui_wanflow.wan_core.adapters.injection import Canvas, Injection, Rank, inject, neutral, total
from comfyui_wanflow.wan_core.errors import InputError, ModelError
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.trajectory import trajectory
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "data" / "golden"
CANVAS = Canvas(1, 3, 4, 6)  # 9 frames of 48x32 pixels


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def recorded():
    """The reference's model, what it was given, and its answer to the direction Left at the speed 0.01."""
    with safe_open(GOLDEN / "fun_camera.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}
        config = json.loads(file.metadata()["config"])
    weights = {key[2:]: value for key, value in tensors.items() if key.startswith("w.")}
    weights |= load_file(GOLDEN / "img_emb_shared.safetensors")
    trunk = DiT(DiTLayout(  # heads cannot be read from the shapes: the recorded models have heads of 24
        config["dim"], config["ffn_dim"], config["num_layers"], config["num_heads"], config["in_dim"],
        text_dim=config["text_dim"], frequency_dim=config["freq_dim"], image_tokens=True, camera_channels=24,
    ))  # fmt: skip
    trunk.load_state_dict(weights)
    return Network(trunk), {key[3:]: value for key, value in tensors.items() if key.startswith("in.")}, tensors["out"]


@pytest.mark.parametrize("direction", ["Left", "Up"])
def test_rays_are_arranged_as_the_reference_arranges_them(direction):
    expected = load_file(GOLDEN / "camera_rays.safetensors")[f"adapter_in_{direction}"]  # every fourth pixel was kept
    path = trajectory(direction, 0.01, 9)
    got = torch.cat([latent_frame_rays(path, frame, 32, 48) for frame in range(3)], dim=2)[..., ::4, ::4]
    assert relative_error(got, expected) < 1e-6


def injection_of(network, given, path):
    """The camera beside the recorded image, which is noise in every frame, and what its features became."""
    image = Injection({"image": given["y"]}, context_prefix=given["image_tokens"], context_rank=Rank.IMAGE)
    return total([image, CameraCondition(path).inject(network, CANVAS)], neutral(network.trunk, CANVAS))


@torch.inference_mode()
def test_the_answer_equals_the_reference_s(recorded):
    network, given, expected = recorded
    injection = injection_of(network, given, trajectory("Left", 0.01, 9))
    got = network(given["latents"], given["timestep"], given["context"], injection)
    assert relative_error(got, expected) < 1e-5
    other = injection_of(network, given, trajectory("Right", 0.01, 9))
    assert relative_error(network(given["latents"], given["timestep"], given["context"], other), expected) > 1e-4


@torch.inference_mode()
def test_a_batch_with_merged_guidance_keeps_its_camera(recorded):
    """The reference drops the second row's camera; here one serves every row."""
    network, given, expected = recorded
    injection = injection_of(network, given, trajectory("Left", 0.01, 9))
    x, text = given["latents"].repeat(4, 1, 1, 1, 1), given["context"].repeat(4, 1, 1)
    got = network(x, given["timestep"], text, injection)
    assert relative_error(got, expected.repeat(4, 1, 1, 1, 1)) < 1e-5


def test_the_adapter_can_be_trained(recorded):
    network, given, _ = recorded
    injection = injection_of(network, given, trajectory("pan left", 0.01, 9))
    network(given["latents"], given["timestep"], given["context"], injection).square().mean().backward()
    assert network.trunk.control_adapter.conv.weight.grad.any()
    network.zero_grad()


def test_models_without_a_camera_and_other_lengths_are_refused(recorded):
    network, given, _ = recorded
    plain = Network(DiT(DiTLayout(128, 32, 1, 1, text_dim=16, frequency_dim=32)))
    with pytest.raises(
        ModelError, match="no camera adapter .it is a Text to Video model, in_dim 16.*remove Wan Camera"
    ):
        CameraCondition(trajectory("Left", 0.01, 9)).inject(plain, CANVAS)
    with pytest.raises(InputError, match="moves for 13 frames, but the video that is made has 9"):
        CameraCondition(trajectory("Left", 0.01, 13)).inject(network, CANVAS)
    with pytest.raises(InputError, match="Two conditions both set the camera"):
        injection = injection_of(network, given, trajectory("Left", 0.01, 9))
        sum([CameraCondition(trajectory("In", 0.01, 9)).inject(network, CANVAS)], injection)


@torch.inference_mode()
def test_goes_with_a_start_image(recorded):
    network, given, _ = recorded
    known = torch.zeros(1, 4, 3, 4, 6)
    known[:, :, 0] = 1
    image = ImageCondition(torch.randn(1, 16, 3, 4, 6), known, torch.randn(1, 257, 1280))
    x, text = given["latents"], given["context"]
    still, moving = (
        network(x, given["timestep"], text, inject([image, CameraCondition(trajectory(way, 0.01, 9))], network, CANVAS))
        for way in ("still", "orbit left")
    )
    assert relative_error(moving, still) > 1e-4
    with pytest.raises(ModelError, match="Connect Wan First / Last Image"):
        inject([CameraCondition(trajectory("still", 0.01, 9))], network, CANVAS)
