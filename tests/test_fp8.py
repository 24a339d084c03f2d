"""Weights in eight bits: rounded while loading, multiplied as they are or widened, run, streamed, trained through."""

from dataclasses import replace

import pytest
import torch
from comfyui_wanflow.nodes.host.standalone import host
from comfyui_wanflow.nodes.load import LoadModel, LoadVAE
from comfyui_wanflow.nodes.offload import OffloadOptions
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.loading.load import load_model, load_vae
from comfyui_wanflow.wan_core.loading.rounding import rounding_errors, rounding_note
from comfyui_wanflow.wan_core.lora import Lora
from comfyui_wanflow.wan_core.models import fp8
from comfyui_wanflow.wan_core.models.changes import Decomposed, LowRank
from comfyui_wanflow.wan_core.models.compiled import Compile
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layers import Linear
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.packed import PackedLinear
from comfyui_wanflow.wan_core.models.slots import Run, call
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.offload.quantize import NARROW, STORAGE, matrices, narrowed, relative_error
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

LAYOUT = DiTLayout(dim=128, ffn_dim=256, layers=3, heads=1, text_dim=32)
ELSEWHERE = torch.device("cpu:0")  # to torch another place than "cpu", with the numbers at hand
SCALED = ["fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fn_tensor", "fp8_e5m2_tensor", "int8"]


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    """Whatever an earlier command was told."""
    monkeypatch.setattr(host, "quiet", False)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    shapes = DiT(LAYOUT).state_dict().items()
    tensors = {name: torch.randn(tensor.shape, generator=generator) * 0.05 for name, tensor in shapes}
    path = tmp_path_factory.mktemp("fp8") / "model.safetensors"
    save_file(tensors, path)
    return path


def inputs():
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 4, 4), (1, 5, 32)))
    return x, torch.tensor([500.0]), text


def linears(trunk):
    return {name: layer for name, layer in trunk.named_modules() if isinstance(layer, Linear)}


class TestRounding:
    @pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
    @pytest.mark.parametrize("scales", ["row", "tensor"])
    def test_the_largest_becomes_the_largest(self, dtype, scales):
        weight = torch.randn(6, 16) * torch.tensor([1e-6, 1, 1e4, 0, 1, 1])[:, None]
        parts = narrowed(weight, dtype, scales)
        assert parts["weight"].dtype == dtype and parts["scale"].dtype == torch.float32
        limit, rows = torch.finfo(dtype).max, parts["weight"].float().abs().amax(1)
        if scales == "tensor":
            assert parts["scale"].shape == () and rows.max() == limit
        else:
            assert parts["scale"].shape == (6, 1) and (rows == torch.tensor([1, 1, 1, 0, 1, 1]) * limit).all()
            meant = weight[weight.abs() > weight.abs().amax(1, keepdim=True) / 1000]
            found = (parts["weight"].float() * parts["scale"])[weight.abs() > weight.abs().amax(1, keepdim=True) / 1000]
            assert ((found - meant).abs() <= meant.abs() * (2**-3 if dtype == torch.float8_e5m2 else 2**-4)).all()

    def test_integers_in_blocks(self):
        weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
        weight[0, :32] *= 1000
        weight[1] = 0
        parts = narrowed(weight, torch.int8, "block")
        assert parts["weight"].dtype == torch.int8 and parts["scale"].shape == (6, 2)
        found = (parts["weight"].unflatten(1, (2, 32)) * parts["scale"].float()[..., None]).flatten(1)
        assert all(relative_error(found[i], weight[i]) < 0.01 for i in range(6))
        assert relative_error(found[0, 32:], weight[0, 32:]) < 0.01  # beside large numbers
        assert narrowed(torch.ones(2, 33), torch.int8, "block")["scale"].shape == (2, 1)

    def test_small_weights_keep_their_precision(self):
        """As a plain cast does not: below 1/64 e4m3fn has ever fewer bits."""
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.003
        parts = narrowed(weight, torch.float8_e4m3fn, "tensor")
        ours = relative_error(parts["weight"].float() * parts["scale"], weight)
        cast = relative_error(weight.to(torch.float8_e4m3fn).float(), weight)
        assert ours < 0.03 < 5 * ours < cast


class TestLoading:
    @pytest.mark.parametrize("choice", SCALED)
    def test_linear_weights_of_the_blocks_only(self, file, choice):
        trunk = load_model(file, weight_dtype=choice, device="cpu").trunk
        plain = load_model(file, device="cpu").trunk
        narrow = matrices(plain)
        assert {name for name, layer in linears(trunk).items() if isinstance(layer, PackedLinear)} == {
            name.removesuffix(".weight") for name in narrow
        }
        assert len(narrow) == LAYOUT.layers * 10  # eight projections and two layers of the feed-forward part
        for name, parameter in plain.named_parameters():
            found = trunk.get_parameter(name)
            if name in narrow:
                layer = trunk.get_submodule(name.removesuffix(".weight"))
                assert found.dtype == STORAGE[choice].dtype and layer.scale.ndim == (0 if "tensor" in choice else 2)
                most = 0.007 if choice == "int8" else 0.06 if "e5m2" in choice else 0.03
                assert relative_error(layer.numbers(torch.float32), parameter) < most
            else:
                assert torch.equal(found, parameter) and found.dtype == torch.float32
        assert all(parameter.dtype == torch.float32 for parameter in trunk.head.parameters())

    @pytest.mark.parametrize("dtype", NARROW)
    def test_the_plain_cast_of_other_programs(self, file, dtype):
        trunk = load_model(file, weight_dtype=f"{dtype}_cast", device="cpu").trunk
        plain = load_model(file, device="cpu").trunk.state_dict()
        assert not any(isinstance(layer, PackedLinear) for layer in linears(trunk).values())
        for name, tensor in trunk.state_dict().items():
            assert tensor.dtype == NARROW[dtype] and torch.equal(tensor.float(), plain[name].to(NARROW[dtype]).float())

    def test_what_is_narrow_already_stays(self, file, tmp_path):
        stored = load_model(file, weight_dtype="fp8_e4m3fn", device="cpu").trunk.state_dict()
        tensors = {name.replace(".scale", ".scale_weight"): tensor for name, tensor in stored.items()}
        save_file(tensors, tmp_path / "a.safetensors")
        trunk = load_model(tmp_path / "a.safetensors", weight_dtype="fp8_e4m3fn_tensor", device="cpu").trunk
        assert all(torch.equal(tensor, stored[name]) for name, tensor in trunk.state_dict().items())
        assert rounding_note(trunk, "a") == ""
        trunk = load_model(tmp_path / "a.safetensors", weight_dtype="fp8_e5m2", device="cpu").trunk
        assert len(rounding_errors(trunk)) == 30

    def test_it_is_said_what_was_lost(self, file, capsys):
        LoadModel.execute("", "fp8_e4m3fn", "auto", files=str(file))
        said = capsys.readouterr().err
        assert "30 matrices were rounded to eight bits" in said and "2." in said and "blocks." in said
        LoadModel.execute("", "auto", "auto", files=str(file))
        assert not capsys.readouterr().err

    def test_the_offload_node_chooses_too(self, file):
        (options,) = OffloadOptions.execute("cpu", "fp8_e5m2", 0.0, 0.5, -1).args
        (model,) = LoadModel.execute("", "auto", "auto", files=str(file), offload=options).args
        assert model.trunk.blocks[0].ffn[0].weight.dtype == torch.float8_e5m2

    def test_not_for_a_vae(self, tmp_path):
        save_file(VideoVAE(8).state_dict(), tmp_path / "vae.safetensors")
        with pytest.raises(InputError, match="made of convolutions. Choose one of auto, fp32, bf16, fp16."):
            load_vae(tmp_path / "vae.safetensors", weight_dtype="fp8_e4m3fn")
        options = next(i for i in LoadVAE.define_schema().inputs if i.id == "weight_dtype").options
        assert not any("fp8" in option for option in options)


@torch.no_grad()
def test_half_the_memory_travels_and_rests(file):
    """A block is as large on the device as it is stored, and streaming changes no number."""
    model = load_model(file, weight_dtype="fp8_e4m3fn", device=ELSEWHERE)
    wide = load_model(file, weight_dtype="bf16", device=ELSEWHERE)
    expected = model.trunk(*inputs())
    block = next(unit for unit in model.residency._units if unit.is_block)
    numbers = sum(p.numel() for n, p in wide.trunk.blocks[0].named_parameters() if n.endswith("weight") and p.ndim > 1)
    rows = sum(p.shape[0] for n, p in wide.trunk.blocks[0].named_parameters() if n.endswith("weight") and p.ndim > 1)
    rest = sum(p.nbytes for n, p in wide.trunk.blocks[0].named_parameters() if p.ndim == 1 or "modulation" in n)
    assert block.bytes == numbers + 4 * rows + rest
    for budget in (0, model.total_bytes() // 2, None):
        model.ensure(budget)
        with model.attached() as network:
            assert torch.equal(network(*inputs()), expected)
            copies = {p.dtype for p in network.trunk.blocks[0].ffn.parameters()}
            assert torch.float8_e4m3fn in copies or budget == 0


class TestChanges:
    @torch.no_grad()
    @pytest.mark.parametrize("choice", ["fp8_e4m3fn", "fp8_e4m3fn_tensor", "fp8_e4m3fn_cast", "int8"])
    def test_lora_and_dora(self, file, choice):
        """As on a plain model whose weights are what the rounded ones mean."""
        model = load_model(file, weight_dtype=choice, device=ELSEWHERE)
        plain = load_model(file, device="cpu")
        for name, layer in linears(model.trunk).items():
            numbers = layer.numbers(torch.float32) if isinstance(layer, PackedLinear) else layer.weight.float()
            plain.trunk.get_submodule(name).weight.data = numbers
        for name, parameter in model.trunk.named_parameters():
            if parameter.dtype in NARROW.values() and name not in {f"{layer}.weight" for layer in linears(model.trunk)}:
                plain.trunk.get_parameter(name).data = parameter.float()
        generator = torch.Generator().manual_seed(2)
        up, down = torch.randn(128, 4, generator=generator), torch.randn(4, 128, generator=generator) * 0.01
        changes = {f"blocks.{i}.self_attn.q.weight": LowRank(up, down) for i in range(3)}
        changes["blocks.1.cross_attn.o.weight"] = Decomposed(LowRank(up, down), torch.rand(128, 1, generator=generator))
        lora = Lora("small", changes)
        with plain.with_lora(lora, 0.7).attached("cpu") as network:
            expected = network(*inputs())
        changed = model.with_lora(lora, 0.7)
        for budget in (0, None):
            changed.ensure(budget)
            with changed.attached() as network:
                torch.testing.assert_close(network(*inputs()), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("around", [call, lambda module, *a: checkpoint(module, *a, use_reentrant=False)],
                             ids=["plain", "checkpointed"])  # fmt: skip
    @pytest.mark.parametrize("device", ["cpu", ELSEWHERE], ids=["in place", "streamed"])
    def test_a_lora_trains_over_it(self, file, around, device):
        """The gradients are those of the plain model with the same numbers."""
        model = load_model(file, weight_dtype="fp8_e4m3fn", device=device)
        plain = load_model(file, device="cpu")
        for name, layer in linears(model.trunk).items():
            if isinstance(layer, PackedLinear):
                plain.trunk.get_submodule(name).weight.data = layer.numbers(torch.float32)

        def gradients(engine, device):
            generator = torch.Generator().manual_seed(3)
            change = LowRank(torch.randn(128, 2, generator=generator), torch.randn(2, 128, generator=generator))
            change.requires_grad_(True)
            engine = engine.with_lora(Lora("small", {"blocks.0.self_attn.v.weight": change}))
            engine.ensure(0, device)
            x, timestep, text = inputs()
            with engine.attached(device) as network:
                network(x.requires_grad_(), timestep, text, run=Run(around=around)).square().mean().backward()
            # Elsewhere the factors are copies, which take the gradients; a trainer makes them there at once
            return [x.grad] if device == ELSEWHERE else [x.grad, change.up.grad, change.down.grad]

        expected = gradients(plain, "cpu")
        for i, found in enumerate(gradients(model, device)):
            assert expected[i].abs().max() > 0
            torch.testing.assert_close(found, expected[i], rtol=1e-4, atol=1e-6)

    def test_the_way_back_keeps_the_bits_not_the_numbers(self, file):
        layer = load_model(file, weight_dtype="fp8_e4m3fn", device="cpu").trunk.blocks[0].ffn[0]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(torch.randn(3, 128, requires_grad=True))
        assert {tensor.dtype for tensor in kept if tensor.numel() >= layer.weight.numel()} == {torch.float8_e4m3fn}
        y.sum().backward()


@pytest.fixture
def like_a_card(monkeypatch):
    """The CPU's own product of 8-bit floats in the place of a card's."""
    monkeypatch.setattr(fp8, "has_products", lambda device: True)
    monkeypatch.setattr(fp8, "takes_row_scales", lambda device, dtype: True)


class TestProducts:
    @pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
    @pytest.mark.parametrize("scales", ["row", "tensor"])
    @pytest.mark.parametrize("by_rows", [True, False])
    @pytest.mark.parametrize("biased", [True, False])
    def test_equal_to_the_expression(self, like_a_card, monkeypatch, dtype, scales, by_rows, biased):
        monkeypatch.setattr(fp8, "takes_row_scales", lambda device, dtype: by_rows)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(32, 64, generator=generator) * torch.rand(32, 1, generator=generator)
        x = (torch.randn(2, 7, 64, generator=generator) * torch.logspace(-2, 2, 7)[:, None]).bfloat16()
        bias = torch.randn(32, generator=generator).bfloat16() if biased else None
        parts = narrowed(weight, dtype, scales)
        found = fp8.linear(x, parts["weight"], parts["scale"], bias)
        dim = -1 if by_rows and scales == "row" else None
        most = x.float().abs().amax(dim, keepdim=True) if dim else x.float().abs().amax()
        factor = (448 / most).bfloat16()
        rounded = (x * factor).to(torch.float8_e4m3fn).float() / factor.float()
        meant = rounded @ (parts["weight"].float() * parts["scale"]).T + (bias.float() if biased else 0)
        assert found.dtype == torch.bfloat16 and found.shape == (2, 7, 32)
        torch.testing.assert_close(found.float(), meant, rtol=0.02, atol=0.02 * float(meant.abs().mean()))
        if dim:  # a scale a row: small rows lose no more than large ones
            exact = x.float() @ (parts["weight"].float() * parts["scale"]).T
            errors = [relative_error(f, e) for f, e in zip(found[0], exact[0], strict=True)]
            assert biased or max(errors) < 0.06

    def test_what_a_device_can_is_tried_once(self, monkeypatch):
        """On this CPU torch has the product; where the library refuses, or answers wrongly, rows get no scales."""
        cpu = torch.device("cpu")
        assert not fp8.has_products(cpu)
        monkeypatch.setattr(fp8, "_by_rows", {})
        assert fp8.takes_row_scales(cpu, torch.float8_e4m3fn)

        def refuse(*arguments, **options):
            raise RuntimeError("only sm90")

        monkeypatch.setattr(torch, "_scaled_mm", refuse)
        assert fp8.takes_row_scales(cpu, torch.float8_e4m3fn) and not fp8.takes_row_scales(cpu, torch.float8_e5m2)
        monkeypatch.setattr(torch, "_scaled_mm", lambda *arguments, **options: torch.zeros(16, 16))
        monkeypatch.setattr(fp8, "_by_rows", {})
        assert not fp8.takes_row_scales(cpu, torch.float8_e4m3fn)

    def test_rows_of_zeros(self, like_a_card):
        parts = narrowed(torch.ones(16, 16), torch.float8_e4m3fn, "row")
        for dtype in (torch.bfloat16, torch.float16):
            found = fp8.linear(torch.zeros(3, 16, dtype=dtype), parts["weight"], parts["scale"], None)
            assert torch.equal(found, torch.zeros(3, 16, dtype=dtype))

    @torch.no_grad()
    @pytest.mark.parametrize("source", ["fp8_e4m3fn", "fp8_e4m3fn_tensor", "plain fp8 file"])
    def test_a_model(self, like_a_card, file, source, monkeypatch, tmp_path):
        weight_dtype = source
        if source == "plain fp8 file":
            wide = load_model(file, device="cpu").trunk
            narrow = matrices(wide)
            tensors = {n: t.to(torch.float8_e4m3fn) if n in narrow else t for n, t in wide.state_dict().items()}
            file, weight_dtype = tmp_path / "a.safetensors", "auto"
            save_file(tensors, file)
        calls, product = [], torch._scaled_mm
        monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **o: calls.append(a) or product(*a, **o))
        model = replace(load_model(file, weight_dtype, device=ELSEWHERE, fp8_matmul=True), compute_dtype=torch.bfloat16)
        run = Run(torch.bfloat16)
        found = {}
        for budget in (0, None):
            model.ensure(budget)
            with model.attached() as network:
                found[budget] = network(*inputs(), run=run)
        assert torch.equal(found[0], found[None]) and len(calls) == 2 * 30
        plain = load_model(file, weight_dtype, device="cpu").trunk(*inputs(), run=run)
        assert 0 < relative_error(found[None], plain) < 0.1

    @torch.no_grad()
    def test_compiled(self, like_a_card, file):
        model = load_model(file, "fp8_e4m3fn", device="cpu", fp8_matmul=True)
        with model.attached() as network:
            expected = network(*inputs(), run=Run(torch.bfloat16))
        with model.with_compile(Compile(backend="eager")).attached() as network:
            torch.testing.assert_close(network(*inputs(), run=Run(torch.bfloat16)), expected)

    @torch.no_grad()
    def test_where_the_device_cannot_it_widens(self, file, capsys):
        (model,) = LoadModel.execute("", "fp8_e4m3fn", "auto", files=str(file), fp8_matmul=True).args
        assert "fp8_matmul is without effect: cpu does not multiply 8-bit floats" in capsys.readouterr().err
        plain = load_model(file, "fp8_e4m3fn", device="cpu")
        assert torch.equal(model.trunk(*inputs()), plain.trunk(*inputs()))

    def test_a_model_without_such_weights_is_told_so(self, file):
        with pytest.raises(InputError, match="has none. Set weight_dtype to fp8_e4m3fn"):
            load_model(file, device="cpu", fp8_matmul=True)

    def test_sides_that_no_kernel_takes(self, like_a_card):
        assert fp8.fits(torch.ones(1, 32).bfloat16(), torch.ones(16, 32))
        assert not fp8.fits(torch.ones(1, 32).bfloat16(), torch.ones(24, 32))
        assert not fp8.fits(torch.ones(1, 32), torch.ones(16, 32))

    @pytest.mark.skipif(not (torch.cuda.is_available() and fp8.has_products(torch.device("cuda"))),
                        reason="needs a card with 8-bit products (RTX 40 series, Hopper or later)")  # fmt: skip
    @pytest.mark.parametrize("dtype", NARROW.values(), ids=NARROW)
    @pytest.mark.parametrize("scales", ["row", "tensor"])
    def test_on_a_card(self, dtype, scales):
        weight, x = torch.randn(256, 128, device="cuda") * 0.03, torch.randn(50, 128, device="cuda").bfloat16()
        parts = narrowed(weight, dtype, scales)
        found = fp8.linear(x, parts["weight"], parts["scale"], None)
        exact = x.float() @ (parts["weight"].float() * parts["scale"]).T
        assert relative_error(found, exact) < 0.05


def test_blocks_are_found_by_their_place():
    block = nn.Sequential(Linear(2, 2), nn.LayerNorm(2))
    module = nn.ModuleDict({"blocks": nn.ModuleList([block]), "head": Linear(2, 2)})
    assert matrices(module) == {"blocks.0.0.weight"}
