"""The VAE: equal to diffusers and to recorded runs of the reference, in groups as a whole, in tiles, in any batch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.errors import InputError, ModelError
from comfyui_wanflow.wan_core.loading.keymaps import published_names
from comfyui_wanflow.wan_core.loading.load import load_vae
from comfyui_wanflow.wan_core.models import winograd
from comfyui_wanflow.wan_core.models.tiling import spans, tiles
from comfyui_wanflow.wan_core.models.vae import LATENT_MEAN, LATENT_STD, Memory, VideoVAE, frame_groups
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"


def distance(got, wanted):
    """Relative error: |got - wanted| / |wanted|."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "golden" / "vae.safetensors")


@pytest.fixture(scope="module")
def vae(golden):
    weights = {k.removeprefix("w."): v.float() for k, v in golden.items() if k.startswith("w.")}
    vae = VideoVAE.from_shapes({k: tuple(v.shape) for k, v in weights.items()})
    vae.load_state_dict(weights)
    return vae.requires_grad_(False)


def channel_constants():
    return (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))


# --- against the reference, recorded ---


def test_encode_equals_the_reference(vae, golden):
    mean, std = channel_constants()
    assert distance((vae.encode(golden["in.video"]) - mean) / std, golden["out.latent"]) < 1e-6


def test_decode_equals_the_reference(vae, golden):
    mean, std = channel_constants()
    latents = golden["out.latent"] * std + mean
    assert distance(vae.decode_whole(latents), golden["out.decoded_raw"]) < 2e-6
    assert distance(vae.decode(latents), golden["out.decoded_clamped"]) < 2e-6


def test_tiles_equal_the_reference(vae, golden):
    mean, std = channel_constants()
    tiled = {"tiled": True, "tile_size": (4, 4), "tile_stride": (2, 2)}
    assert distance((vae.encode(golden["in.video"], **tiled) - mean) / std, golden["out.latent_tiled_4_2"]) < 1e-6
    assert distance(vae.decode(golden["out.latent"] * std + mean, **tiled), golden["out.decoded_tiled_4_2"]) < 2e-6


# --- against diffusers, same random weights ---


@pytest.fixture(scope="module")
def twins():
    """The same random network, ours and diffusers'."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(base_dim=16).requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        if name.endswith(("gamma", "bias")):  # ones and zeros would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.decoder.conv_out.weight.mul_(0.5)
    ours = VideoVAE(16).requires_grad_(False)
    state = theirs.state_dict()
    ours.load_state_dict({name: state[stored] for name, stored in published_names(state).items()})
    return ours, theirs


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encode_equals_diffusers(twins, frames):
    ours, theirs = twins
    pixels = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    wanted = theirs.encode(pixels).latent_dist.mean
    assert distance(ours.encode(pixels), wanted) < 1e-5
    assert distance(ours.encode_whole(pixels), wanted) < 1e-5


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_decode_equals_diffusers_before_clamping(twins, groups):
    ours, theirs = twins
    latents = torch.randn(2, 16, groups, 4, 6)
    wanted = theirs.decode(latents).sample
    assert 0.1 < wanted.abs().max() < 1  # diffusers clamps: see that nothing was, and everything is compared
    assert distance(ours.decode(latents), wanted) < 1e-5
    assert distance(ours.decode_whole(latents), wanted) < 1e-5


@pytest.mark.parametrize("frames", [2, 4, 6, 8])
def test_fewer_multiplications_make_the_same_convolution(frames):
    torch.manual_seed(4)
    x, weight, bias = torch.randn(2, 5, frames + 2, 6, 7), torch.randn(3, 5, 3, 3, 3), torch.randn(3)
    wanted = torch.nn.functional.conv3d(x, weight, bias, padding=(0, 1, 1))
    assert distance(winograd.convolve_frames(list(x.unbind(2)), weight, bias), wanted) < 3e-6


def test_gradients_equal_diffusers(twins):
    ours, theirs = twins
    gradients = []
    for decode in (ours.decode_whole, lambda latents: theirs.decode(latents).sample):
        latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(5)).requires_grad_()
        decode(latents).square().sum().backward()
        gradients.append(latents.grad)
    assert distance(*gradients) < 1e-5


def test_sixteen_bits_keep_the_plain_arithmetic():
    """Winograd's sums need more digits than bf16 has."""
    x = torch.zeros(1, 64, 4, 2, 2)
    with torch.no_grad():
        assert winograd.pays(x) and not winograd.pays(x.bfloat16())
    assert not winograd.pays(x)  # under autograd


# --- groups, tiles, batches, types ---


@pytest.mark.parametrize("positions", [1, 60, 256])
def test_groups_equal_the_whole(vae, monkeypatch, positions):
    monkeypatch.setattr("comfyui_wanflow.wan_core.models.vae.GROUP_POSITIONS", positions)
    torch.manual_seed(1)
    pixels, latents = torch.rand(1, 3, 13, 40, 48) * 2 - 1, torch.randn(1, 16, 4, 5, 6)
    assert distance(vae.encode(pixels), vae.encode_whole(pixels)) < 1e-6
    assert distance(vae.decode(latents), vae.decode_whole(latents).clamp(-1, 1)) < 1e-6


def test_large_pictures_go_one_frame_at_a_time():
    assert list(frame_groups(4, 10_000)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert list(frame_groups(7, 64)) == [(0, 1), (1, 5), (5, 7)]


def test_memory_does_not_grow_with_the_clip(vae):
    """What the layers keep after 2 and after 6 groups has the same size, and no view holds a larger tensor."""

    def kept(frames):
        memory = Memory()
        for _ in range(frames):
            vae.decode_group(torch.zeros(1, 16, 1, 4, 4), memory)
        return sum(t.untyped_storage().nbytes() for frames in memory.kept.values() for t in frames)

    assert kept(4) == kept(7)


def test_groups_pass_gradients_as_the_whole_does(vae):
    """Training may keep a memory between groups."""
    latents = torch.randn(1, 16, 4, 4, 4, generator=torch.Generator().manual_seed(6)).requires_grad_()
    memory = Memory()
    groups = [vae.decode_group(part, memory) for part in latents.split([2, 1, 1], dim=2)]
    (got,) = torch.autograd.grad(torch.cat(groups, dim=2).square().sum(), latents)
    (wanted,) = torch.autograd.grad(vae.decode_whole(latents).square().sum(), latents)
    assert distance(got, wanted) < 1e-5


def test_a_batch_is_its_clips(vae):
    torch.manual_seed(2)
    pixels = torch.rand(2, 3, 5, 40, 48) * 2 - 1
    tiled = {"tiled": True, "tile_size": (4, 4), "tile_stride": (3, 2)}
    for options in ({}, tiled):
        latents = vae.encode(pixels, **options)
        alone = torch.cat([vae.encode(clip, **options) for clip in pixels.split(1)])
        assert torch.equal(latents, alone)
        assert vae.decode(latents, **options).shape == pixels.shape


def test_one_tile_is_no_tile(vae):
    latents = torch.randn(1, 16, 2, 6, 8)
    assert torch.equal(vae.decode(latents, tiled=True), vae.decode(latents))


def test_tiles_of_the_reference():
    picked = tiles((60, 104), (30, 52), (15, 26))  # 480 x 832 with the defaults
    assert len(picked) == 9
    assert [(s.begin, s.end) for s in spans(50, 30, 15)] == [(0, 30), (15, 45), (30, 50)]
    assert len(spans(30, 30, 15)) == 1


def test_tiles_can_be_added_up_as_diffsynth_does(vae, golden):
    """In bf16, which shows; without tiles nothing is added up, and little is lost."""
    latents = torch.randn(1, 16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    tiling = {"tiled": True, "tile_size": (4, 4), "tile_stride": (2, 2)}
    exact, rounded = vae.decode(latents, **tiling), vae.decode(latents, **tiling, sums=torch.bfloat16)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, rounded.bfloat16().float())
    values, weight = torch.zeros(1, 3, 5, 48, 48, dtype=torch.bfloat16), torch.zeros(48, 48, dtype=torch.bfloat16)
    ramp = (torch.arange(32) + 1) / 16
    for top in (0, 16):
        for left in (0, 16):
            tile = vae.decode(latents[..., top // 8 : top // 8 + 4, left // 8 : left // 8 + 4])
            sides = [ramp.flip(0).clamp(max=1) if start == 0 else ramp.clamp(max=1) for start in (top, left)]
            mask = torch.minimum(sides[0][:, None], sides[1][None]).bfloat16()
            values[..., top : top + 32, left : left + 32] += tile.bfloat16() * mask
            weight[top : top + 32, left : left + 32] += mask
    assert distance(rounded, (values / weight).float()) < 2e-3 < distance(rounded, exact) * 10
    assert distance(vae.encode(golden["in.video"], **tiling, sums=torch.bfloat16),
                    vae.encode(golden["in.video"], **tiling)) > 1e-4  # fmt: skip


def test_gaps_between_tiles_are_refused(vae):
    with pytest.raises(InputError, match="tile_stride 31 does not go with tile_size 30 in height"):
        vae.decode(torch.zeros(1, 16, 1, 4, 4), tiled=True, tile_stride=(31, 26))


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 20, 16)])
def test_sizes_that_do_not_fit_are_refused(vae, shape):
    with pytest.raises(InputError, match="4n[+]1 frames .* multiples of 8"):
        vae.encode(torch.zeros(shape))


def test_narrow_weights_compute_in_the_type_of_the_input(vae, golden):
    narrow = VideoVAE(8).to(torch.bfloat16)  # the golden weights are bf16 values: nothing is lost
    narrow.load_state_dict(vae.state_dict())
    pixels = golden["in.video"]
    assert torch.equal(narrow.encode(pixels), vae.encode(pixels))
    assert narrow.decode(golden["out.latent"].bfloat16()).dtype == torch.float32


def test_sixteen_bits_are_for_decoding_alone():
    exact = load_vae("WanTiny-T2V")
    narrow, pixels = replace(exact, compute_dtype=torch.bfloat16), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    latents = exact.encode(pixels)
    assert torch.equal(narrow.encode(pixels), latents)
    assert narrow.encoding_room((32, 32)) == exact.encoding_room((32, 32))
    assert not torch.equal(narrow.decode(latents), exact.decode(latents))


def test_gradients_flow_through_the_whole_pass(golden):
    torch.manual_seed(3)
    vae = VideoVAE(8)
    pixels = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    vae.decode_whole(vae.encode_whole(pixels)).square().mean().backward()
    silent = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent
    # the latter half of conv1 makes the variance, which the mean does not see
    assert all(p.grad.abs().max() > 0 for p in vae.parameters())


# --- the published file ---


def test_published_keys():
    keys = json.loads((DATA / "wan21_key_manifest.json").read_text())["vae-2.1"]["keys"]
    shapes = {name: tuple(shape) for name, (shape, _) in keys.items()}
    with torch.device("meta"):
        vae = VideoVAE.from_shapes(shapes)
    assert {name: tuple(t.shape) for name, t in vae.state_dict().items()} == shapes


def test_other_families_are_named():
    with pytest.raises(ModelError, match="48 is Wan 2.2"):
        VideoVAE.from_shapes({"encoder.conv1.weight": (160, 12, 3, 3, 3), "conv2.weight": (48, 48, 1, 1, 1)})
    with pytest.raises(ModelError, match="published layout"):
        VideoVAE.from_shapes({"encoder.conv_in.weight": (96, 3, 3, 3, 3)})
