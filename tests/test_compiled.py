"""torch.compile once for all: other sizes, lengths of text and steps must not compile anew, which takes minutes."""

import pytest
import torch
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.compiled import Compile
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.slots import Slots
from comfyui_wanflow.wan_core.offload.residency import Residency
from torch._dynamo.testing import CompileCounter

T2V = DiTLayout(dim=128, ffn_dim=64, layers=3, heads=1, text_dim=8)
I2V = DiTLayout(dim=128, ffn_dim=64, layers=3, heads=1, in_dim=36, text_dim=8, image_tokens=True)
SIZES = [(2, 4, 4), (3, 6, 8), (5, 4, 12)]  # latent frames, rows and columns


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def forward(network, size, words, timestep):
    slots = Slots()
    if network.trunk.layout.image_tokens:
        concat = {"mask": random(1, 4, *size), "image": random(1, 16, *size)}
        slots = Slots(concat=concat, context_prefix=random(1, 7, 128))
    return network(random(1, 16, *size), torch.tensor([timestep]), random(1, words, 8), slots)


@torch.inference_mode()
@pytest.mark.parametrize("layout", [T2V, I2V], ids=["text", "image"])
def test_one_compilation_serves_all_blocks_sizes_texts_and_steps(layout):
    torch.manual_seed(0)
    trunk = DiT(layout)
    torch.nn.init.normal_(trunk.head.head.weight, std=0.1)
    model = WanModel(
        module=Network(trunk), name="small", device=torch.device("cpu"), compute_dtype=torch.float32,
        residency=Residency(trunk), layout=layout,
    )  # fmt: skip
    counter = CompileCounter()
    for timestep in (900.0, 300.0):  # attached anew, as for each prompt
        for size in SIZES:
            for words in (4, 9):
                with model.attached() as network:
                    expected = forward(network, size, words, timestep)
                with model.with_compile(Compile(backend=counter)).attached() as network:
                    torch.testing.assert_close(forward(network, size, words, timestep), expected)
    assert counter.frame_count == 1
