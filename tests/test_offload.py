"""Which blocks stay and which travel, and that travelling changes no number and leaves nothing behind.

There is no second device here: "cpu:0" is to torch another place than "cpu", with the numbers at hand. In the place of
CUDA's side stream stands a lane on which blocks arrive late; the stream itself and pinned memory are not tested here.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from comfyui_wanflow.nodes.host.standalone import StandaloneHost
from comfyui_wanflow.nodes.load import LoadImageEncoder, LoadModel, LoadVAE
from comfyui_wanflow.nodes.offload import OffloadOptions
from comfyui_wanflow.wan_core import compute
from comfyui_wanflow.wan_core.adapters.vace import VACEResiduals
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.lora import Lora
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.changes import Decomposed, LowRank
from comfyui_wanflow.wan_core.models.compiled import Compile
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.image_encoder import ImageEncoder, ImageEncoderLayout
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.packed import Packed, keep_packed
from comfyui_wanflow.wan_core.models.slots import Run, Slots, call
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.offload import streaming
from comfyui_wanflow.wan_core.offload.options import Offload
from comfyui_wanflow.wan_core.offload.policy import DEPTH, plan, priority
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.offload.streaming import Conveyor, Lane
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

ELSEWHERE = torch.device("cpu:0")
SIZES = [50, *[100] * 8, 20]  # a layer, eight blocks, a layer
BLOCKS = range(1, 9)


class TestPolicy:
    def test_everything_stays_where_it_fits(self):
        for budget in (None, sum(SIZES), 10**12):
            decided = plan(SIZES, budget, BLOCKS)
            assert decided.streamed == () and decided.resident == tuple(range(10))
            assert decided.peak(room=7) == sum(SIZES) + 7

    @pytest.mark.parametrize("budget", range(-10, 880, 30))
    def test_the_peak_keeps_to_the_budget(self, budget):
        decided = plan(SIZES, budget, BLOCKS)
        least = DEPTH * 100 + 50
        assert sorted(decided.resident + decided.streamed) == list(range(10))
        assert decided.resident_bytes + decided.streamed_bytes == sum(SIZES)
        assert decided.peak(room=1000) <= max(budget, least) + 1000
        if budget < least:
            assert not decided.resident

    def test_more_memory_never_means_more_transfer(self):
        transfers = [plan(SIZES, budget, BLOCKS).streamed_bytes for budget in range(0, 900, 10)]
        assert transfers == sorted(transfers, reverse=True) and transfers[-1] == 0

    def test_travelling_blocks_lie_between_resident_ones(self):
        first, *spread = [unit for unit in priority(10, BLOCKS) if unit in BLOCKS][:4]
        assert sorted([first, *spread]) == [1, 3, 5, 7]
        assert priority(10, BLOCKS)[:2] == [0, 9]  # what cannot be fetched ahead of time comes first
        assert sorted(priority(10, BLOCKS)) == list(range(10))

    @pytest.mark.parametrize("blocks", range(1, 42))
    def test_every_beginning_of_the_order_is_spread(self, blocks):
        order = priority(blocks, range(blocks))
        for count in range(1, blocks + 1):
            stay = sorted(order[:count])
            gaps = [b - a for a, b in itertools.pairwise([*stay, stay[0] + blocks])]
            assert max(gaps) <= 4 * blocks / count

    def test_transfer_against_compute(self):
        decided = plan(SIZES, 500, BLOCKS)
        assert decided.streamed_bytes == 700
        assert decided.transfer_seconds(bytes_per_second=350) == 2
        assert decided.exposed_seconds(compute_seconds=0.5, bytes_per_second=350) == 1.5
        assert decided.exposed_seconds(compute_seconds=9, bytes_per_second=350) == 0


LAYOUT = DiTLayout(dim=128, ffn_dim=96, layers=5, heads=1, text_dim=8)


def random_trunk():
    torch.manual_seed(0)
    trunk = DiT(LAYOUT)
    nn.init.normal_(trunk.head.head.weight, std=0.1)
    return trunk.requires_grad_(False)


@pytest.fixture
def trunk():
    return random_trunk()


def inputs():
    torch.manual_seed(1)
    return torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 6, 8)


def model_of(trunk, **options):
    return WanModel(
        module=Network(trunk), name="small", device=ELSEWHERE, compute_dtype=torch.float32,
        residency=Residency(trunk, **options), layout=LAYOUT,
    )  # fmt: skip


def state(module):
    return dict(module.named_parameters()), [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()
    ]


def assert_untouched(module, before):
    parameters, hooks = state(module)
    assert all(parameter is before[0][name] for name, parameter in parameters.items())
    assert hooks == before[1] and not any(hooks)
    assert not any("forward" in vars(m) for m in module.modules())


@pytest.fixture
def journeys(monkeypatch):
    """The blocks sent, in order."""
    sent = []
    plain = Conveyor._send

    def send(self, unit):
        if all(buffer.unit is not unit for buffer in self.buffers):
            sent.append(unit.module)
        return plain(self, unit)

    monkeypatch.setattr(Conveyor, "_send", send)
    return sent


def budgets(trunk):
    """Nothing stays; some blocks do; all do."""
    total = Residency(trunk).total_bytes()
    return 0, total // 2, total


@torch.no_grad()
@pytest.mark.parametrize("rest_on", ["cpu", "disk"])
@pytest.mark.parametrize("share", range(3))
def test_equal_to_the_plain_run_to_the_bit(trunk, rest_on, share, journeys):
    expected, before = trunk(*inputs()), state(trunk)
    weights = Residency(trunk, rest_on=rest_on)
    weights.ensure(budgets(trunk)[share], ELSEWHERE)
    for _ in range(2):
        with weights.attached(ELSEWHERE) as module:
            for _ in range(2):
                assert torch.equal(module(*inputs()), expected)
        assert_untouched(trunk, before)
    assert bool(journeys) == (share < 2)


@torch.no_grad()
def test_blocks_travel_ahead_of_their_calls(trunk, journeys):
    weights = Residency(trunk)
    weights.ensure(0, ELSEWHERE)
    on_arrival = []
    for block in trunk.blocks:
        block.register_forward_pre_hook(lambda *_: on_arrival.append(len(journeys)))
    with weights.attached(ELSEWHERE) as module:
        for _ in range(2):
            module(*inputs())
    blocks = list(trunk.blocks)
    assert journeys == [*blocks, *blocks, blocks[0]]
    assert on_arrival == [0, *range(2, 11)]  # the first is sent for when it is called, all others one call before


@torch.no_grad()
def test_an_unforeseen_order_is_learned(trunk, journeys):
    weights = Residency(trunk)
    weights.ensure(0, ELSEWHERE)
    blocks, step = trunk.blocks, None
    calls = [blocks[i] for i in (3, 1, 4)]
    for block in blocks:
        block.forward = lambda x: x
    with weights.attached(ELSEWHERE):
        for block in calls * 2:
            block(step)
        missed = len(journeys)
        for block in calls * 2:
            block(step)
    assert len(journeys) == missed + 6


def test_read_once_into_memory(trunk):
    weights = Residency(trunk, rest_on="cpu")
    weights.ensure(0, ELSEWHERE)
    with torch.no_grad():
        with weights.attached(ELSEWHERE) as module:
            expected = module(*inputs())
        for parameter in trunk.blocks.parameters():  # whatever becomes of the file
            parameter.zero_()
        with weights.attached(ELSEWHERE) as module:
            assert torch.equal(module(*inputs()), expected)


@torch.no_grad()
def test_loras(trunk):
    factors = torch.randn(128, 4), torch.randn(4, 128)
    changes = {f"blocks.{i}.self_attn.q.weight": LowRank(*factors) for i in range(5)}
    changes["blocks.2.ffn.0.weight"] = Decomposed(LowRank(torch.randn(96, 2), factors[1][:2]), torch.rand(96, 1))
    changed = model_of(trunk).with_lora(Lora("small", changes), 0.7).with_lora(Lora("other", changes), -0.2)
    with changed.attached("cpu") as network:
        expected = network(*inputs())
    before = state(trunk)
    assert changed.total_bytes() > Residency(trunk).total_bytes()
    for budget in (0, changed.total_bytes() // 2):
        changed.ensure(budget)
        with changed.attached() as network:
            assert torch.equal(network(*inputs()), expected)
        assert_untouched(trunk, before)


@torch.no_grad()
def test_packed_weights(trunk):
    bits = torch.randint(-100, 100, (96, 128), dtype=torch.int8)
    parts = {"weight": bits, "scale": torch.tensor(0.01)}
    packed = Packed((96, 128), parts, lambda parts, dtype: parts["weight"].to(dtype) * parts["scale"])
    for i in range(5):
        assert keep_packed(trunk, f"blocks.{i}.ffn.0.weight", packed)
    expected, before = trunk(*inputs()), state(trunk)
    weights = Residency(trunk)
    weights.ensure(0, ELSEWHERE)
    with weights.attached(ELSEWHERE) as module:
        assert torch.equal(module(*inputs()), expected)
    assert_untouched(trunk, before)


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_ends_a_run_leaves_nothing(trunk, error):
    expected, before = trunk(*inputs()), state(trunk)
    weights = Residency(trunk)
    weights.ensure(0, ELSEWHERE)

    def fail(*_):
        raise error

    with pytest.raises(error), weights.attached(ELSEWHERE) as module:
        hook = trunk.blocks[2].cross_attn.register_forward_pre_hook(fail)
        try:
            module(*inputs())
        finally:
            hook.remove()
    assert_untouched(trunk, before)
    with weights.attached(ELSEWHERE) as module:
        assert torch.equal(module(*inputs()), expected)


@torch.no_grad()
def test_a_block_that_cannot_be_read_is_no_block_that_was(trunk, monkeypatch):
    """After a failed transfer the buffer must not pass for the block that should have come."""
    expected = trunk(*inputs())
    weights = Residency(trunk)
    weights.ensure(0, ELSEWHERE)
    unit = next(unit for unit in weights._units if unit.module is trunk.blocks[0])
    plain, failures = unit.pack, [OSError("disk")]

    def pack(buffer):
        if failures:
            raise failures.pop()
        plain(buffer)

    monkeypatch.setattr(unit, "pack", pack)
    with weights.attached(ELSEWHERE) as module:
        with pytest.raises(OSError, match="disk"):
            module(*inputs())
        assert torch.equal(module(*inputs()), expected)


class LateLane(Lane):
    """Stands in for a stream: what is sent arrives when it is waited for, and until then the buffer holds rubbish."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.under_way, self.reading, self.closed = {}, None, False

    def send(self, unit, buffer):
        assert buffer is not self.reading, "written over while it was read"
        buffer.flat.bytes.fill_(255)  # NaN in every type
        self.under_way[buffer] = unit

    def wait(self, buffer):
        if unit := self.under_way.pop(buffer, None):
            self.pack(unit, buffer.flat)
        self.reading = buffer

    def used(self, buffer):
        assert buffer is self.reading
        self.reading = None

    def close(self):
        self.closed = True


@torch.no_grad()
@pytest.mark.parametrize("rest_on", ["cpu", "disk"])
def test_transfers_may_take_their_time(trunk, monkeypatch, rest_on):
    """On a side stream a block arrives late: nobody reads it before, and nobody writes over it while it is read."""
    expected, lanes = trunk(*inputs()), []

    def lane_to(*arguments):
        lanes.append(LateLane(*arguments))
        return lanes[-1]

    monkeypatch.setattr(streaming, "lane_to", lane_to)
    weights = Residency(trunk, rest_on=rest_on)
    for budget in budgets(trunk)[:2]:
        weights.ensure(budget, ELSEWHERE)
        with weights.attached(ELSEWHERE) as module:
            for _ in range(3):
                assert torch.equal(module(*inputs()), expected)
                assert weights.give_back() >= 0  # which begins anew with what is left
    assert len(lanes) > 2 and all(lane.closed for lane in lanes)


def networks():
    """One of each kind, small, with what it is called with."""
    torch.manual_seed(0)
    yield random_trunk(), inputs()
    vace = VACE(VACELayout(dim=128, ffn_dim=96, layers=3, heads=1))
    for parameter in vace.parameters():
        nn.init.normal_(parameter, std=0.05)
    yield Advised(random_trunk(), vace), inputs()
    reader = UMT5Encoder(UMT5Layout(dim=16, attention_dim=16, ffn_dim=32, heads=2, layers=3, vocabulary=20, buckets=4))
    yield reader, (torch.arange(8).view(2, 4), torch.ones(2, 4))
    looker = ImageEncoder(ImageEncoderLayout(dim=80, mlp_dim=32, heads=1, layers=3, patch=4, side=8))
    yield looker, (torch.rand(2, 8, 8, 3),)
    yield Coded(VideoVAE(8)), (torch.randn(1, 3, 5, 16, 16),)


class Advised(nn.Module):
    def __init__(self, trunk, vace):
        super().__init__()
        self.trunk, self.vace = trunk, vace

    def forward(self, x, timestep, text):
        residuals = VACEResiduals(self.vace, x.repeat(1, 6, 1, 1, 1), 1.0, LAYOUT.layers)
        return self.trunk(x, timestep, text, Slots(block_residuals=(residuals,)))


class Coded(nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, pixels):
        return self.vae.decode(self.vae.encode(pixels))


@torch.no_grad()
@pytest.mark.parametrize("kind", range(5), ids=["DiT", "VACE", "UMT5", "CLIP", "VAE"])
def test_one_mechanism_for_every_network(kind):
    module, arguments = list(networks())[kind]
    module.requires_grad_(False)
    expected, before = module(*arguments), state(module)
    for share in (0, 0.5, 1):
        weights = Residency(module)
        weights.ensure(int(share * weights.total_bytes()), ELSEWHERE)
        with weights.attached(ELSEWHERE):
            assert torch.equal(module(*arguments), expected)
        assert_untouched(module, before)


@torch.no_grad()
def test_compiled_blocks_may_stay_and_travel(trunk):
    """What is compiled reads the weights from where they are in that call. (Equal programs: the backend is eager.)"""
    expected = trunk(*inputs())
    model = model_of(trunk).with_compile(Compile(backend="eager"))
    model.residency.ensure(model.total_bytes() // 2, ELSEWHERE)
    with model.attached(ELSEWHERE) as network:
        for _ in range(2):
            torch.testing.assert_close(network(*inputs()), expected)


def checkpointed(module, *arguments):
    return checkpoint(module, *arguments, use_reentrant=False)


@pytest.mark.parametrize("around", [call, checkpointed])
def test_gradients_are_exact(trunk, around, monkeypatch):
    """Buffers are written over, so that what autograd keeps must not lie in them."""
    x, timestep, text = inputs()
    before = state(trunk)

    def gradient(module, device):
        leaf = x.clone().requires_grad_()
        weights = Residency(module)
        weights.ensure(0, device)
        with weights.attached(device):
            module(leaf, timestep, text, run=Run(around=around)).square().sum().backward()
        return leaf.grad

    monkeypatch.setattr(streaming, "lane_to", LateLane)
    assert torch.equal(gradient(trunk, ELSEWHERE), gradient(trunk, "cpu"))
    assert_untouched(trunk, before)


def test_the_way_back_of_a_training_is_foreseen(trunk, journeys):
    """Once learned, every block is sent for one call before its own, there and back."""
    weights, (x, timestep, text) = Residency(trunk), inputs()
    weights.ensure(0, ELSEWHERE)
    with weights.attached(ELSEWHERE):
        for _ in range(3):
            journeys.clear()
            leaf = x.clone().requires_grad_()
            trunk(leaf, timestep, text, run=Run(around=checkpointed)).square().sum().backward()
    sent = [list(trunk.blocks).index(block) for block in journeys]
    assert sent == [1, 2, 3, 4, 4, 3, 2, 1, 0, 0]  # the first came at the end of the step before


class TestLimits:
    MEMORY = (1000, 700)  # total, free

    @pytest.mark.parametrize(
        "options, memory, expected",
        [
            (Offload(vram_buffer=50), None, None),
            (Offload(vram_buffer=50), MEMORY, 1000 - 50 - (300 - 40) - 10),
            (Offload(vram_limit=600, vram_buffer=50), MEMORY, 600 - 50 - (300 - 40) - 10),
            (Offload(vram_limit=5000, vram_buffer=0), MEMORY, 1000 - (300 - 40) - 10),
            (Offload(vram_limit=600, vram_buffer=0), None, 590),
        ],
    )
    def test_budget(self, options, memory, expected):
        assert options.budget(room=10, held=40, memory=memory) == expected

    def test_the_limit_holds_whatever_the_host_offers(self, trunk):
        model = model_of(trunk)
        total = model.total_bytes()
        model.ensure()
        model.limit(Offload(vram_limit=total - 1, vram_buffer=0), 0, None)
        for budget in (None, total, 10**12):
            model.ensure(budget)
            assert 0 < model.resident_bytes() <= total - 1 - 2 * Residency(trunk)._units[-3].bytes
        model.limit(Offload(), 0, None)
        assert model.ensure() == total

    def test_persistent_parameters(self, trunk):
        model = model_of(trunk)
        for count in (0, 200_000, 10**12):
            model.limit(Offload(persistent=count, vram_limit=1), 0, None)
            model.ensure()
            assert model.resident_bytes() <= 4 * count and bool(model.resident_bytes()) == bool(count)
        assert model.resident_bytes() == model.total_bytes()

    @pytest.mark.parametrize("count", [0, 1000, 200_000, 400_000, 600_000, 10**9])
    def test_as_many_parameters_persist_as_in_the_reference(self, trunk, count):
        """DiffSynth-Studio counts layers in their order and keeps those before the count is reached. Here whole blocks
        stay, spread over the network, so that the numbers differ by less than a block; neither goes above."""
        layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in trunk.modules()]
        reference = sum(size for size, end in zip(layers, itertools.accumulate(layers), strict=True) if end <= count)
        model = model_of(trunk)
        model.limit(Offload(persistent=count, vram_limit=1), 0, None)
        model.ensure()
        kept = sum(unit.parameter_count for unit in model.residency._units if unit.copies is not None)
        block = sum(p.numel() for p in trunk.blocks[0].parameters())
        assert kept <= count and abs(kept - reference) < block

    def test_only_the_trunk_s_parameters_count(self, trunk):
        lora = Lora("change", {"blocks.0.ffn.0.weight": LowRank(torch.ones(96, 2), torch.ones(2, 128))})
        vace = VACE(VACELayout(dim=128, ffn_dim=96, layers=1, heads=1)).requires_grad_(False)
        model = model_of(trunk).with_module(vace).with_lora(lora)
        model.limit(Offload(persistent=10**9), 0, None)
        model.ensure()
        held = {weights: weights.resident_bytes() for weights in model.weights}
        assert held[lora.residency] > 0 and held[model.residency] == model.residency.total_bytes()
        assert held[model.beside["vace"]] == 0

    def test_options_are_checked(self):
        for wrong in ({"rest_on": "gpu"}, {"rest_dtype": "fp8"}):
            with pytest.raises(InputError, match="Choose one of"):
                Offload(**wrong)
        assert Offload("cpu", "bf16").weight_dtype("auto") == "bf16"
        assert Offload("cpu").weight_dtype("fp16") == "fp16"
        assert Offload("disk").weight_dtype("auto") == "auto"
        assert Offload("disk", "int8").weight_dtype("bf16") == "int8"

    def test_alone_on_a_card_the_next_engine_gets_the_room(self, trunk, monkeypatch):
        """The host drops what an earlier phase kept, and limits what does not fit even then."""
        engines = model_of(random_trunk()), model_of(trunk)
        first, second = (replace(engine, offload=Offload(vram_buffer=0)) for engine in engines)
        total = first.total_bytes()

        def memory(device):
            return total + total // 2, total + total // 2 - first.resident_bytes() - second.resident_bytes()

        host = StandaloneHost()
        monkeypatch.setattr(host, "device", lambda: ELSEWHERE)
        monkeypatch.setattr(compute, "device_memory", memory)
        with host.attached(first):
            assert first.resident_bytes() == total
        with host.attached(second, memory_required=total):
            assert first.resident_bytes() == 0
            assert second.resident_bytes() < total // 2


def test_the_node_limits_what_the_loader_loads(tmp_path):
    (options,) = OffloadOptions.execute("cpu", "bf16", 12.0, 0.5, -1).args
    assert options == Offload("cpu", "bf16", 12 * 2**30, 2**29, None)
    assert OffloadOptions.execute("disk", "auto", 0.0, 0.0, 0).args[0] == Offload("disk", "auto", None, 0, 0)
    file = tmp_path / "model.safetensors"
    save_file(random_trunk().state_dict(), file)
    (model,) = LoadModel.execute("", "auto", "auto", files=str(file), offload=options).args
    assert model.offload is options and model.residency.rest_on == "cpu"
    assert model.trunk.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    (model,) = LoadModel.execute("", "auto", "auto", files=str(file)).args
    assert model.offload is None and model.residency.rest_on == "disk"
    assert model.trunk.blocks[0].ffn[0].weight.dtype == torch.float32


@pytest.mark.parametrize("rest_dtype, stored", [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_the_vae_and_the_image_encoder_take_the_same_options(rest_dtype, stored, tmp_path):
    (options,) = OffloadOptions.execute("cpu", rest_dtype, 4.0, 0.5, -1).args
    layout = ImageEncoderLayout(dim=80, mlp_dim=80, heads=1, layers=1, patch=14, side=28)
    weights = ImageEncoder(layout).state_dict()
    unread = {name.replace("transformer.0.", "transformer.1."): torch.zeros_like(x) for name, x in weights.items()}
    save_file({**unread, **weights}, tmp_path / "looks.safetensors")
    save_file(VideoVAE(8).state_dict(), tmp_path / "vae.safetensors")
    (looks,) = LoadImageEncoder.execute("", "auto", files=str(tmp_path / "looks.safetensors"), offload=options).args
    (vae,) = LoadVAE.execute("", "auto", files=str(tmp_path / "vae.safetensors"), offload=options).args
    for engine, weight in ((looks, looks.module.visual.patch_embedding), (vae, vae.module.conv1)):
        assert engine.offload is options and engine.residency.rest_on == "cpu" and weight.weight.dtype == stored
    (narrow,) = OffloadOptions.execute("cpu", "fp8_e4m3fn", 4.0, 0.5, -1).args
    with pytest.raises(InputError, match="a VAE is made of convolutions"):
        LoadVAE.execute("", "auto", files=str(tmp_path / "vae.safetensors"), offload=narrow)
