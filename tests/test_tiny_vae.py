"""The tiny VAEs: equal to recorded runs of their author's code, in groups, in tiles, and wherever a VAE is taken."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.nodes.condition import NODES as CONDITION_NODES
from comfyui_wanflow.nodes.load import LoadVAE
from comfyui_wanflow.nodes.vae import VAEDecode, VAEEncode
from comfyui_wanflow.nodes.wires import encode_with, host
from comfyui_wanflow.wan_core.errors import FileError, ModelError
from comfyui_wanflow.wan_core.loading.identify import identify
from comfyui_wanflow.wan_core.loading.inspect import inspect
from comfyui_wanflow.wan_core.loading.load import load_vae
from comfyui_wanflow.wan_core.models import vae as vae_module
from comfyui_wanflow.wan_core.models.tiny_vae import TinyVAE
from comfyui_wanflow.wan_core.models.vae import normalised, unnormalised
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.planning.phases import decoding_phase, encoding_phase
from comfyui_wanflow.wan_core.planning.work import TINY_DECODE, TINY_ENCODE, coding_work
from comfyui_wanflow.wan_core.room import decoding_room, encoding_room
from comfyui_wanflow.wan_core.training.examples import Encoders, prepare
from safetensors.torch import load_file, save_file
from test_room import BF16, LivingTensors, assert_close, on_meta
from torch.utils.flop_counter import FlopCounterMode

GOLDEN = Path(__file__).parent / "data" / "golden" / "tiny_vae.safetensors"


def distance(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def weights(golden):
    return {name.removeprefix("w."): x for name, x in golden.items() if name.startswith("w.")}  # fp16, as published


@pytest.fixture
def file(tmp_path, weights):
    """A function: the weights in a file of this name and type."""

    def write(name, dtype=torch.float16):
        save_file({key: x.to(dtype) for key, x in weights.items()}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def vae(file):
    return load_vae(file("taew2_1.safetensors"), device="cpu")


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(type(host), "say", lambda _, line: lines.append(line))
    return lines


class TestAgainstTheAuthors:
    @pytest.mark.parametrize("name, dtype", [("taew2_1.safetensors", torch.float16), ("lighttaew2_1.pth", None)])
    def test_both_kinds(self, golden, file, name, dtype):
        raw = dtype is None
        vae = load_vae(file(name.replace(".pth", ".safetensors"), dtype or torch.float32), device="cpu")
        ours, theirs = (lambda x: x, lambda x: x) if raw else (normalised, unnormalised)
        video = golden["in.video"].float() * 2 - 1
        assert distance(ours(vae.encode(video)), golden["out.latent"]) < 1e-6
        assert distance(ours(vae.encode(video[:, :, :1])), golden["out.first_latent"]) < 1e-6
        latents = theirs(golden["in.latent"])
        assert distance(vae.decode(latents) / 2 + 0.5, golden["out.video"]) < 1e-6
        assert distance(vae.decode(latents[:, :, :1]) / 2 + 0.5, golden["out.picture"]) < 1e-6

    def test_published_sizes(self):
        with torch.device("meta"):
            names = {name: tuple(x.shape) for name, x in TinyVAE().state_dict().items()}
        assert len(names) == 128 and names["decoder.19.conv.weight"] == (128, 64, 1, 1)
        assert identify(names).summary == "a tiny Wan 2.1 VAE, for previews (base width 64)"
        with torch.device("meta"):
            again = TinyVAE.from_shapes(names)
        assert {name: tuple(x.shape) for name, x in again.state_dict().items()} == names


class TestAsAnyVAE:
    def test_groups_frames_and_batches_equal_the_whole(self, vae, monkeypatch):
        latents, video = torch.randn(2, 16, 5, 3, 4), torch.rand(2, 3, 17, 24, 32) * 2 - 1
        decoded, encoded = [], []
        for size in (1, 24, 10**6):  # latent frames in a group: 1, 2, all behind the first
            monkeypatch.setattr(vae_module, "GROUP_POSITIONS", size)
            decoded.append(vae.decode(latents))
            encoded.append(vae.encode(video))
        assert decoded[0].shape == video.shape and encoded[0].shape == latents.shape
        assert max(distance(one, decoded[0]) for one in decoded) < 1e-5
        assert max(distance(one, encoded[0]) for one in encoded) < 1e-5
        groups = list(vae.frames(latents))  # of two clips, the first frame of each alone
        assert [group.shape[2] for group in groups] == [1, 16] * 2
        assert torch.equal(torch.cat(groups, dim=2), torch.cat([*decoded[-1].split(1)], dim=2))

    def test_memory_does_not_grow_with_the_clip(self):
        module = on_meta(TinyVAE)
        for frames, single in ((2, False), (9, False), (1, True)):
            latents = torch.empty(1, 16, frames, 60, 104, device="meta", dtype=BF16)
            with torch.inference_mode(), LivingTensors(module) as living:
                pixels = module.decode(latents)
            estimate = decoding_room(64, (480, 832), BF16, single, tiny=True)
            assert_close(estimate, living.peak - pixels.nbytes, 0.1)
        pixels = torch.empty(1, 3, 5, 480, 832, device="meta", dtype=BF16)
        with torch.inference_mode(), LivingTensors(module) as living:
            module.encode(pixels)
        assert_close(encoding_room(64, (480, 832), BF16, tiny=True), living.peak, 0.1)

    def test_tiles(self, vae):
        latents = torch.zeros(1, 16, 2, 12, 12)
        tiled = vae.decode(latents, tiled=True, tile_size=(8, 8), tile_stride=(6, 6))
        assert tiled.shape == vae.decode(latents).shape

    def test_it_is_told_in_plans(self, vae):
        plan = decoding_phase(vae, (1, 16, 21, 60, 104), None)
        assert plan.room == decoding_room(4, (480, 832), torch.float32, tiny=True) < 2**27
        assert encoding_phase(vae, 81, 480, 832, None).work == coding_work(4, 81, 480, 832, TINY_ENCODE)
        module = on_meta(TinyVAE)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            module.decode(torch.empty(1, 16, 21, 12, 12, device="meta", dtype=BF16))
        assert coding_work(64, 81, 96, 96, TINY_DECODE) == pytest.approx(counter.get_total_flops(), rel=0.1)

    def test_weights_are_copied_and_given_back(self, vae):
        weights = Residency(vae.module, torch.float32)
        assert weights.total_bytes() == sum(x.nbytes for x in vae.module.parameters())
        with weights.attached("meta"):
            assert all(x.is_meta for x in vae.module.parameters())
        assert not any(x.is_meta for x in vae.module.parameters())


class TestFiles:
    @pytest.mark.parametrize(
        "name, dtype, raw",
        [
            ("taew2_1_bf16.safetensors", torch.bfloat16, False),
            ("lighttaew2_1_fp16.safetensors", torch.float16, True),
            ("mine.safetensors", torch.float16, False),
            ("mine.safetensors", torch.float32, True),
        ],
    )
    def test_which_latents(self, file, said, name, dtype, raw):
        path = file(name, dtype)
        engine = LoadVAE.execute("", "auto", files=str(path)).args[0]
        assert engine.module.raw == raw
        assert f"taken to be {'raw' if raw else 'normalised'}" in said[0] and len(said) == 1
        assert ("the full VAE's" if raw else "normalised, as taew2_1") in inspect([path])

    def test_others_of_the_same_shape_are_refused_by_name(self, file):
        with pytest.raises(FileError, match="tiny VAE of HunyuanVideo by its name.*Load taew2_1 or lighttaew2_1"):
            load_vae(file("taehv.safetensors"))

    @pytest.mark.parametrize(
        "changes, found",
        [
            ({"decoder.1.weight": (256, 48, 3, 3), "decoder.22.bias": (12,)}, r"another model \(48 latent channels"),
            ({"encoder.0.weight": None}, "without its encoder"),
        ],
    )
    def test_what_cannot_be_used(self, weights, tmp_path, changes, found):
        tensors = dict(weights)
        for name, shape in changes.items():
            tensors.pop(name)
            if shape:
                tensors[name] = torch.zeros(shape)
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(FileError, match=f"is a tiny preview VAE .TAE. (of )?{found}.*needs a Wan 2.1 VAE"):
            load_vae(tmp_path / "a.safetensors")

    def test_other_rates_of_frames(self, weights):
        shapes = {name: tuple(x.shape) for name, x in weights.items()} | {"decoder.13.conv.weight": (6, 6, 1, 1)}
        with pytest.raises(ModelError, match="one latent frame of 4 frames and 2 frames of one"):
            TinyVAE.from_shapes(shapes)
        with pytest.raises(ModelError, match="lacks 'decoder.8.weight'"):
            TinyVAE.from_shapes({name: shape for name, shape in shapes.items() if name != "decoder.8.weight"})


class TestInGraphs:
    def test_encode_and_decode(self, vae, said):
        images = torch.rand(5, 32, 48, 3)
        latent = VAEEncode.execute(vae, images, "cover", False, "30x52", "15x26").args[0]
        assert latent["samples"].shape == (1, 16, 2, 4, 6)
        assert len(said) == 1 and "taew2_1 is a tiny VAE: what it encodes is a rough likeness" in said[0]
        assert VAEDecode.execute(vae, latent, False, "30x52", "15x26").args[0].shape == images.shape
        assert len(said) == 1

    def test_conditions_take_it_and_say_so(self, vae, said):
        (node,) = (node for node in CONDITION_NODES if node.__name__ == "ImageToVideo")
        latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
        assert node.execute(vae, latent, fit="cover", start_image=torch.rand(1, 32, 32, 3)).args[0]
        assert len([line for line in said if "rough likeness" in line]) == 1
        said.clear()
        encode_with(replace(vae, module=vae_module.VideoVAE(8)))
        assert not said

    def test_training_is_refused(self, vae):
        with pytest.raises(ModelError, match="taew2_1 is a tiny VAE, for previews.*Train with the full one"):
            prepare([], None, Encoders(vae, None), None)
