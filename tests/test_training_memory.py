"""What a training step takes, foretold and counted: the living tensors of a step on the meta device, at true sizes."""

import pytest
import torch
from comfyui_wanflow.wan_core.lora import worked_in
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models import blocks, dit, slots
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.slots import Run
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.training import trainee as trainees
from comfyui_wanflow.wan_core.training.memory import training_memory
from comfyui_wanflow.wan_core.training.objective import around
from comfyui_wanflow.wan_core.training.optimizers import OPTIMIZERS, make_optimizer
from comfyui_wanflow.wan_core.training.settings import Settings
from test_room import LivingTensors, on_meta
from test_training_loop import lora, small_model
from torch.utils._pytree import tree_leaves

LATENT = (16, 21, 60, 104)  # 480 x 832, 81 frames


class Flash(torch.autograd.Function):
    """Keeps for the way back what flash attention keeps."""

    @staticmethod
    def forward(context, q, k, v):
        out = torch.empty_like(q)
        context.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(context, gradient):
        q, k, v, _ = context.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@pytest.fixture
def without_values(monkeypatch):
    """Meta tensors have no values to look at, and no flash attention."""
    monkeypatch.setattr(dit, "pad_text", lambda text: (text, None))
    for module in (blocks, slots):  # attention to the text and the picture, and to the video itself
        monkeypatch.setattr(module, "attention", lambda q, k, v, *rest, **more: Flash.apply(q, k, v))
    monkeypatch.setattr(trainees, "module_digest", lambda module: "")


@pytest.mark.parametrize("dim, ffn_dim, options", [
    (1536, 8960, {}), (5120, 13824, {}), (5120, 13824, {"gradient_checkpointing": False})])  # fmt: skip
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "whole"])
def test_a_step_takes_what_was_foretold(without_values, dim, ffn_dim, options, whole):
    layout = DiTLayout(dim=dim, ffn_dim=ffn_dim, layers=4, heads=dim // 128)
    trunk = on_meta(lambda: dit.DiT(layout))
    model = WanModel(
        module=Network(trunk), name="none", device=torch.device("meta"), compute_dtype=torch.bfloat16, layout=layout,
        residency=Residency(trunk),
    )  # fmt: skip
    trainee = trainees.whole(model) if whole else trainees.new_lora(model, 32)
    settings, network = Settings(**options), trainee.model.module
    x, time, text = (torch.empty(shape, device="meta") for shape in ((1, *LATENT), (1,), (1, 512, 4096)))
    changes = [change for lora, _ in trainee.model.loras for change in lora.changes.values()]
    with worked_in(network, trainee.model.loras), LivingTensors(network, *changes) as living:
        run = Run(torch.bfloat16, around=around(settings))
        network.trunk(x, time, text, None, run).square().mean().backward()
    memory = training_memory(trainee, [(16, 1, 8, 8), LATENT], settings)
    gradients = sum(4 * parameter.numel() for parameter in trainee.parameters.values())
    counted = living.peak
    assert 0.95 * counted <= memory.activations + gradients <= 1.1 * counted + gradients
    assert memory.trained == 3 * gradients


def test_what_saves_memory_is_foretold_too():
    def room(**options):
        return training_memory(lora(small_model(layers=4)), [LATENT], Settings(**options)).room

    assert room(offload_activations=True) < room() < room(gradient_checkpointing=False)
    assert room(optimizer="adamw8bit") < room() < room(ema_decay=0.9) and room() < room(batch_size=2)
    said = str(training_memory(lora(), [LATENT], Settings()))
    assert "for activations" in said and "MB" in said


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_keep_no_more_than_was_said(name):
    kind = OPTIMIZERS[name]
    pytest.importorskip(kind.package or "torch")
    parameter = torch.nn.Parameter(torch.randn(256, 256))
    optimizer = make_optimizer({"a": parameter}, 1e-3, Settings(optimizer=name))
    parameter.square().sum().backward()
    optimizer.step()
    kept = sum(x.nbytes for x in tree_leaves(list(optimizer.state.values())) if isinstance(x, torch.Tensor))
    assert 0 < kept <= kind.state_bytes * parameter.numel() + 8192
