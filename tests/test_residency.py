"""Copies of weights on the compute device: budgets, streaming, and that a run leaves the stored weights as they were.

There is no second device here, so that copies go to "meta" (shapes only) or "cpu:0", which torch treats as another
place than "cpu" although the numbers stay at hand.
"""

import pytest
import torch
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.offload.units import is_matrix
from torch import nn

BLOCK_BYTES = (64 * 64 + 64) * 4
ELSEWHERE = torch.device("cpu:0")


class Block(nn.Module):
    """A layer, and a parameter of its own beside it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.modulation = nn.Parameter(torch.ones(1, 2, 64))

    def forward(self, x):
        return self.layer(x) * self.modulation[:, 0]


class Net(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def devices(module):
    return {parameter.device.type for parameter in module.parameters()}


@pytest.fixture
def net():
    return Net().requires_grad_(False)


class TestBudgets:
    def test_total(self, net):
        assert Residency(net).total_bytes() == sum(p.numel() * 4 for p in net.parameters())

    def test_first_layers_first_up_to_the_budget(self, net):
        weights = Residency(net)
        held = weights.ensure(2 * BLOCK_BYTES, "meta")
        assert BLOCK_BYTES < held <= 2 * BLOCK_BYTES
        assert held == weights.resident_bytes()
        with weights.attached("meta"):
            assert devices(net.blocks[0]) == {"meta"}
            assert devices(net.blocks[3].layer) == {"cpu"}

    @pytest.mark.parametrize("budget, share", [(None, 1), (10**12, 1), (0, 0), (-5, 0), (1, 0)])
    def test_any_number_is_a_budget(self, net, budget, share):
        weights = Residency(net)
        assert weights.ensure(budget, "meta") == share * weights.total_bytes()

    def test_a_smaller_budget_shrinks(self, net):
        weights = Residency(net)
        weights.ensure(None, "meta")
        assert 0 < weights.ensure(BLOCK_BYTES, "meta") <= BLOCK_BYTES
        assert weights.ensure(-1, "meta") == 0

    def test_release_gives_back_at_least_what_is_asked(self, net):
        weights = Residency(net)
        total = weights.ensure(None, "meta")
        freed = weights.release(BLOCK_BYTES)
        assert BLOCK_BYTES <= freed < 2 * BLOCK_BYTES + 1024
        assert weights.resident_bytes() == total - freed
        assert weights.release() == total - freed
        assert weights.release() == 0

    def test_another_device_starts_anew(self, net):
        weights = Residency(net)
        weights.ensure(None, "meta")
        weights.ensure(BLOCK_BYTES, ELSEWHERE)
        assert weights.resident_bytes() <= BLOCK_BYTES
        assert weights.device == ELSEWHERE

    def test_where_the_weights_are_nothing_is_copied(self, net):
        weights = Residency(net)
        stored = net.blocks[0].layer.weight
        assert weights.ensure(None, "cpu") == 0
        with weights.attached("cpu") as module:
            assert module.blocks[0].layer.weight is stored
            with pytest.raises(RuntimeError, match="in use on cpu"), weights.attached("meta"):
                pass


class TestRuns:
    def test_the_stored_parameters_come_back(self, net):
        stored = dict(net.named_parameters())
        weights = Residency(net)
        with weights.attached("meta") as module:
            assert module is net
            assert devices(net) == {"meta"}
        assert dict(net.named_parameters()).keys() == stored.keys()
        assert all(parameter is stored[name] for name, parameter in net.named_parameters())
        assert weights.resident_bytes() == weights.total_bytes()  # kept for the next run

    @pytest.mark.parametrize("budget", [0, BLOCK_BYTES, 3 * BLOCK_BYTES, None])
    def test_every_split_computes_the_same(self, net, budget):
        x = torch.randn(2, 64)
        expected = net(x)
        weights = Residency(net)
        weights.ensure(budget, ELSEWHERE)
        with weights.attached(ELSEWHERE) as module:
            torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())

    def test_layers_without_a_copy_fetch_one_around_their_call(self, net):
        weights = Residency(net)
        weights.ensure(0, "meta")
        seen = []
        hook = net.blocks[1].layer.register_forward_hook(
            lambda layer, _, y: seen.append((layer.weight.device, y.device))
        )
        with weights.attached("meta") as module:
            assert devices(module) == {"cpu"}
            assert module(torch.randn(2, 64, device="meta")).device.type == "meta"
            assert devices(module) == {"cpu"}
        hook.remove()
        assert seen == [(torch.device("meta"),) * 2]

    def test_an_exception_leaves_nothing_behind(self, net):
        stored = dict(net.named_parameters())
        weights = Residency(net)
        weights.ensure(0, ELSEWHERE)
        with weights.attached(ELSEWHERE) as module:
            with pytest.raises(RuntimeError, match="mat1"):
                module(torch.randn(2, 63))
            assert all(parameter is stored[name] for name, parameter in net.named_parameters())
        with pytest.raises(KeyError), weights.attached(ELSEWHERE):
            raise KeyError
        assert all(parameter is stored[name] for name, parameter in net.named_parameters())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())

    def test_runs_nest_and_hold_their_weights(self, net):
        weights = Residency(net)
        with weights.attached("meta"):
            with weights.attached("meta"):
                assert devices(net) == {"meta"}
            assert devices(net) == {"meta"}
            assert weights.release() == 0
            assert weights.ensure(0, "meta") == weights.total_bytes()
            for other in (ELSEWHERE, "cpu"):
                with pytest.raises(RuntimeError, match="in use on meta"), weights.attached(other):
                    pass
        assert devices(net) == {"cpu"}

    def test_copies_made_in_inference_mode_serve_training(self, net):
        weights = Residency(net)
        with torch.inference_mode():
            weights.ensure(None, ELSEWHERE)
        x = torch.randn(2, 64, requires_grad=True)
        with weights.attached(ELSEWHERE) as module:
            module(x).square().sum().backward()
        assert x.grad.any()


class TestTypes:
    def test_only_matrices_of_blocks_are_narrowed(self, net):
        weights = Residency(net, torch.bfloat16)
        with weights.attached("meta"):
            assert net.blocks[0].layer.weight.dtype == torch.bfloat16
            assert net.blocks[0].layer.bias.dtype == torch.float32
            assert net.blocks[0].modulation.dtype == torch.float32
            assert net.norm.weight.dtype == torch.float32
        assert net.blocks[0].layer.weight.dtype == torch.float32
        assert weights.total_bytes() == Residency(net).total_bytes() - 4 * 64 * 64 * 2

    def test_narrow_weights_stay_narrow(self, net):
        layer = net.blocks[0].layer
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        with Residency(net, torch.bfloat16).attached("meta"):
            assert net.blocks[0].layer.weight.dtype == torch.float8_e4m3fn

    def test_what_a_matrix_is(self):
        assert is_matrix("blocks.0.ffn.0.weight", torch.zeros(2, 2))
        assert is_matrix("patch_embedding.weight", torch.zeros(2, 2, 1, 2, 2))
        assert not is_matrix("norm.weight", torch.zeros(2))
        assert not is_matrix("blocks.0.modulation", torch.zeros(1, 6, 2))
        assert not is_matrix("encoder.middle.0.residual.0.gamma", torch.zeros(2, 1, 1, 1))
