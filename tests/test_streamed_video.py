"""Long videos: the VAE's memory does not grow with the clip, and frames go into the file while they are decoded."""

import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.nodes.vae import VAEDecode
from comfyui_wanflow.nodes.video import DecodeAndSave, SaveVideo
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.model import WanVAE
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.video import Stream, read_video, save_video
from PIL import Image
from test_room import LivingTensors

TILING = {"tiled": False, "tile_size": "30x52", "tile_stride": "15x26"}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    module = VideoVAE(8).requires_grad_(False)
    place = {"device": torch.device("cpu"), "compute_dtype": torch.float32, "residency": Residency(module)}
    return WanVAE(module=module, name="small", **place)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "output_directory", tmp_path)
    return tmp_path


def test_memory_does_not_grow_with_the_clip():
    with torch.device("meta"):
        module = VideoVAE(8).requires_grad_(False)

    def peaks(groups):
        latents = torch.empty(1, 16, groups, 16, 16, device="meta")
        pixels = torch.empty(1, 3, 4 * groups - 3, 128, 128, device="meta")
        coded = latents.nbytes  # what encoding returns is as large
        with torch.inference_mode(), LivingTensors(module) as decoding:
            for _ in module.frames(latents):
                pass
        with torch.inference_mode(), LivingTensors(module) as encoding:
            module.encode(pixels)
        return decoding.peak - latents.nbytes, encoding.peak - pixels.nbytes - coded

    for short, long in zip(peaks(4), peaks(8), strict=True):
        assert long <= 1.02 * short


@pytest.mark.parametrize("ending", ["mp4", "webm", "webp", "png"])
def test_a_stream_is_saved_as_a_tensor_is(folder, ending):
    images = torch.rand(5, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    first = save_video(images, folder / f"tensor.{ending}")
    second = save_video(Stream((5, 16, 24, 3), iter(images)), folder / f"stream.{ending}")
    assert len(first) == len(second) == (5 if ending == "png" else 1)
    for one, other in zip(first, second, strict=True):
        if ending == "png":
            assert (np.asarray(Image.open(one)) == np.asarray(Image.open(other))).all()
        else:
            assert torch.equal(read_video(one)[0], read_video(other)[0])


def test_the_node_saves_what_the_two_nodes_save(vae, folder):
    latent = {"samples": torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))}
    options = {"frame_rate": 16.0, "format": "png", "quality": 5}
    (images,) = VAEDecode.execute(vae, latent, **TILING).args
    two = SaveVideo.execute(images, "two/video", **options).ui
    one = DecodeAndSave.execute(vae, latent, "one/video", **options, **TILING).ui
    assert one["animated"] == two["animated"] == (False,)
    assert len(one["images"]) == len(two["images"]) == 2 * 9
    for ours, theirs in zip(one["images"], two["images"], strict=True):
        pictures = (np.asarray(Image.open(folder / x["subfolder"] / x["filename"])) for x in (ours, theirs))
        assert (next(pictures) == next(pictures)).all()


class Feeder:
    """Stands in for a VAE; remembers how many of its groups of frames were alive at once."""

    most = 0

    def decoding_room(self, picture):
        return 0

    def attached(self, device):
        return nullcontext(self)

    def frames(self, latents, **_):
        alive = weakref.WeakSet()
        for number in range(20):
            group = torch.zeros(1, 3, 1 if number == 0 else 4, 32, 48)
            alive.add(group)
            self.most = max(self.most, len(alive))
            if number == self.fails_at:
                raise InputError("stop")
            yield group

    fails_at = None


def test_frames_are_forgotten_when_they_are_written(folder):
    feeder = Feeder()
    latent = {"samples": torch.zeros(1, 16, 20, 4, 6)}
    options = {"frame_rate": 16.0, "format": "mp4", "quality": 5, **TILING}
    (file,) = DecodeAndSave.execute(feeder, latent, "long", **options).args
    assert read_video(folder / file)[0].shape == (77, 32, 48, 3)
    assert feeder.most <= 3
    feeder.fails_at = 7
    with pytest.raises(InputError, match="stop"):
        DecodeAndSave.execute(feeder, latent, "broken", **options)
    assert [path.name for path in folder.iterdir()] == ["long_00001_.mp4"]
