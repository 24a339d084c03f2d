"""What only a CUDA device can show: the side stream, pinned memory, the allocator's peak. Skipped without one."""

import gc
import time
from dataclasses import replace

import pytest
import torch
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.slots import Run
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.room import decoding_room, sampling_room
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

BF16 = torch.bfloat16
LAYOUT = DiTLayout(dim=1536, ffn_dim=8960, layers=6, heads=12)
LATENT = (1, 16, 6, 60, 104)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    trunk = DiT(LAYOUT)
    torch.nn.init.normal_(trunk.head.head.weight, std=0.02)
    trunk = trunk.to(BF16).requires_grad_(False)
    place = {"device": torch.device("cuda"), "compute_dtype": BF16, "residency": Residency(trunk, BF16)}
    return replace(WanModel(module=Network(trunk), name="random", layout=LAYOUT, **place))


@pytest.fixture(autouse=True)
def nothing_left(model):
    yield
    model.release()
    gc.collect()
    torch.cuda.empty_cache()


def forward(network, count=1):
    torch.manual_seed(1)
    x, text = torch.randn(LATENT, device="cuda"), torch.randn(1, 512, 4096, device="cuda")
    for _ in range(count):
        answer = network(x, torch.tensor([500.0], device="cuda"), text, None, Run(compute_dtype=BF16))
    torch.cuda.synchronize()
    return answer


@torch.inference_mode()
@pytest.mark.parametrize("rest_on", ["cpu", "disk"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_what_travels_beside_computes_the_same(model, rest_on, share):
    with model.attached() as network:
        expected = forward(network)
    model.release()
    model = replace(model, residency=Residency(model.trunk, BF16, rest_on))
    model.ensure(int(share * model.total_bytes()))
    before = torch.cuda.memory_allocated()
    with model.attached() as network:
        for _ in range(3):
            assert torch.equal(forward(network), expected)
    assert torch.cuda.memory_allocated() <= before + 2**20
    model.release()


@torch.inference_mode()
def test_the_peak_is_what_was_asked_for(model):
    with model.attached() as network:
        forward(network)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward(network)
        peak = torch.cuda.max_memory_allocated() - before
    room = sampling_room(LAYOUT, LATENT, 1, BF16)
    assert 0.7 * room <= peak <= room


@torch.inference_mode()
def test_streaming_hides_behind_computing(model):
    def seconds(network):
        forward(network, 2)
        start = time.perf_counter()
        forward(network, 5)
        return time.perf_counter() - start

    with model.attached() as network:
        resident = seconds(network)
    model.release()
    model.ensure(0)
    with model.attached() as network:
        streamed = seconds(network)
    print(f"resident {resident:.3f} s, streamed {streamed:.3f} s")
    assert streamed < 1.5 * resident  # 9,360 tokens: 4 ms of computing a block against 3.5 ms of bus


def test_a_run_recovers_when_memory_runs_out(model):
    """All weights and the run do not fit under the cap: half of the weights leave, and the latents are the same."""
    arguments = (torch.randn(1, 20, 4096), None, torch.zeros(LATENT), Settings(seed=0, steps=2, cfg=1.0))
    expected, said = sample(model, *arguments), []
    model.ensure()
    total = torch.cuda.get_device_properties(0).total_memory
    cap = model.total_bytes() + sampling_room(LAYOUT, LATENT, 1, BF16) // 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(cap / total)
    try:
        result = sample(model, *arguments, say=said.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said and "Memory ran out" in said[0]
    assert torch.equal(result, expected)


def test_a_decoder_s_peak_is_what_was_asked_for():
    torch.manual_seed(0)
    vae = VideoVAE().to("cuda", BF16).requires_grad_(False)
    peaks = []
    for groups in (4, 8):
        latents = torch.randn(1, 16, groups, 30, 52, dtype=BF16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vae.decode(latents)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 1.05 * peaks[0] <= 1.05 * decoding_room(96, (240, 416), BF16)
