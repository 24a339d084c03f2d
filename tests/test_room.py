"""The estimates of working memory against a count of living tensors on the meta device, at true sizes."""

import weakref

import comfyui_wanflow.wan_core.models.dit as dit
import pytest
import torch
from comfyui_wanflow.wan_core.adapters.vace import VACEResiduals
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.slots import Run, Slots
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.room import decoding_room, encoding_room, sampling_room, widened_room
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BF16, FP32 = torch.bfloat16, torch.float32


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the `with`, and remembers the highest count.

    The modules' weights, of which every use makes a view, do not count.
    """

    def __init__(self, *modules):
        super().__init__()
        self.bytes = self.peak = 0
        self.weights = [parameter.untyped_storage() for module in modules for parameter in module.parameters()]
        self.known = {storage._cdata for storage in self.weights}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.bytes -= size


def on_meta(make, dtype=BF16):
    with torch.device("meta"):
        return make().requires_grad_(False).to(dtype)


def assert_close(estimate, counted, tolerance):
    text = f"{estimate / 2**20:.0f} MiB, counted {counted / 2**20:.0f} MiB"
    assert (1 - tolerance) * counted <= estimate <= (1 + tolerance) * counted, text


@pytest.mark.parametrize("dim, ffn_dim", [(1536, 8960), (5120, 13824)])
@pytest.mark.parametrize("stored, computed", [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("latent", [(1, 16, 21, 60, 104), (2, 16, 21, 90, 160), (1, 16, 5, 60, 104)])
@pytest.mark.parametrize("vace", [False, True])
def test_sampling(monkeypatch, dim, ffn_dim, stored, computed, latent, vace):
    layout = DiTLayout(dim=dim, ffn_dim=ffn_dim, layers=4, heads=dim // 128)
    model = on_meta(lambda: dit.DiT(layout), stored)
    adviser = on_meta(lambda: VACE(VACELayout(dim, ffn_dim, 2, dim // 128)), stored)
    monkeypatch.setattr(dit, "pad_text", lambda text: (text, None))  # it looks at values, of which meta has none
    x, time, text = (torch.empty(shape, device="meta") for shape in (latent, (1,), (latent[0], 512, 4096)))
    context = torch.empty(latent[0], 96, *latent[2:], device="meta", dtype=computed)
    residuals = (VACEResiduals(adviser, context, 1.0, layout.layers),) if vace else ()
    context_bytes = context.nbytes if vace else 0
    with torch.inference_mode(), LivingTensors(model, adviser) as living:
        model(x, time, text, Slots(block_residuals=residuals), Run(compute_dtype=computed))
    widened = widened_room(model, computed)
    assert widened == (dim * ffn_dim * 4 if stored != computed else 0)
    estimate = sampling_room(layout, latent, 1, computed, vace, widened) - context_bytes
    assert_close(estimate, living.peak, 0.1)


@pytest.mark.parametrize("frames, tolerance", [(3, 0.1), (1, 0.2)])
def test_coding(frames, tolerance):
    vae = on_meta(VideoVAE)
    vae.order_weights()  # what the first call does, once and for all
    latents = torch.empty(1, 16, frames, 60, 104, device="meta", dtype=BF16)
    with torch.inference_mode(), LivingTensors(vae) as living:
        pixels = vae.decode(latents)
    single = frames == 1
    assert_close(decoding_room(96, (480, 832), BF16, single), living.peak - pixels.nbytes, tolerance)
    pixels = pixels.to(BF16)
    with torch.inference_mode(), LivingTensors(vae) as living:
        vae.encode(pixels)
    assert_close(encoding_room(96, (480, 832), BF16, single), living.peak, tolerance)
