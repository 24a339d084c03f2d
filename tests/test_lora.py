"""LoRAs: every naming and every kind of change computes what a model with changed weights computes."""

import json
from contextlib import nullcontext
from dataclasses import replace

import gguf
import pytest
import torch
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.nodes.lora import ApplyLora
from comfyui_wanflow.wan_core.errors import FileError, InputError, ModelError
from comfyui_wanflow.wan_core.loading.catalog import LORAS
from comfyui_wanflow.wan_core.loading.identify import identify
from comfyui_wanflow.wan_core.loading.load import load_model
from comfyui_wanflow.wan_core.loading.lora_files import KEY_FORMATS, load_lora, save_lora
from comfyui_wanflow.wan_core.loading.lora_names import find
from comfyui_wanflow.wan_core.lora import fit, parameters, report
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.embedders import MotionController
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.slots import Run, Slots
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file

LAYOUT = DiTLayout(dim=128, ffn_dim=256, layers=2, heads=1, in_dim=36, text_dim=32, image_tokens=True)
VACE_LAYOUT = VACELayout(dim=128, ffn_dim=256, layers=1, heads=1)
TEXT_LAYOUT = DiTLayout(dim=128, ffn_dim=256, layers=2, heads=1, text_dim=32)
ELSEWHERE = torch.device("cpu:0")  # for torch another place than "cpu"
FEW, MANY = (1, 4, 4), (1, 24, 24)  # latents: below and above as many tokens as make changing the weights cheaper
LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.k_img", "blocks.1.ffn.2", "text_embedding.0", "head.head",
          "time_projection.1", "img_emb.proj.1")  # fmt: skip
RANK, ALPHA = 4, 2.0


def random(*shape, seed=0, scale=0.1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def random_weights(layout, extra=None):
    shapes = {name: tensor.shape for name, tensor in DiT(layout).state_dict().items()}
    shapes |= {name: tensor.shape for name, tensor in extra.state_dict().items()} if extra else {}
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.fixture(scope="module")
def weights():
    return random_weights(LAYOUT)


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "image_model.safetensors"
    save_file(weights, path)
    return load_model(path, device="cpu")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "text_model.safetensors"
    save_file(random_weights(TEXT_LAYOUT), path)
    return load_model(path, device="cpu")


def output_of(model, size=FEW):
    """The velocity in fp32, through the model with all that is attached to it."""
    x, concat = random(1, 16, *size, seed=1), {"mask": random(1, 4, *size, seed=2), "image": random(1, 16, *size)}
    slots = Slots(concat=concat, context_prefix=random(1, 9, 128, seed=3))
    if not model.layout.image_tokens:
        slots = Slots()
    with torch.no_grad(), model.attached() as network:
        if network.trunk.layout.image_tokens:
            slots = Slots(concat=concat, context_prefix=network.trunk.img_emb(random(1, 9, 1280, seed=3)))
        return network.trunk(x, torch.tensor([500.0]), random(1, 5, 32, seed=4), slots, Run(torch.float32))


def assert_computes_with(model, weights, size=FEW):
    plain = DiT(model.layout)
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    expected = output_of(StandIn(plain), size)
    assert distance(expected, output_of(with_nothing(model), size)) > 1e-3, "nothing changed"
    assert distance(expected, output_of(model, size)) < 1e-5


def distance(expected, found):
    """Relative."""
    return ((found - expected).norm() / expected.norm()).item()


class StandIn:
    """A bare trunk in the place of an engine."""

    def __init__(self, trunk):
        self.trunk, self.layout = trunk, trunk.layout

    def attached(self):
        return nullcontext(self)


def with_nothing(model):
    return replace(model, loras=())


def factors(weights, layers=LAYERS):
    """layer -> (down, up), of rank 4."""
    sides = {layer: weights[f"{layer}.weight"].shape for layer in layers}
    return {
        layer: (random(RANK, columns, seed=i, scale=0.3), random(rows, RANK, seed=50 + i, scale=0.3))
        for i, (layer, (rows, columns)) in enumerate(sides.items())
    }


def merged(weights, changes, strength=1.0):
    return weights | {
        f"{layer}.weight": weights[f"{layer}.weight"] + strength * up @ down for layer, (down, up) in changes.items()
    }


def lora_of(tmp_path, tensors, metadata=None, name="style.safetensors"):
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata)
    return load_lora(tmp_path / name)


def to_diffusers(layer):
    for ours, theirs in (
        ("self_attn.q", "attn1.to_q"), ("cross_attn.k_img", "attn2.add_k_proj"), ("ffn.2", "ffn.net.2"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"), ("head.head", "proj_out"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ):  # fmt: skip
        layer = layer.replace(ours, theirs)
    return layer


def underscores(layer):
    return layer.replace(".", "_")


# name -> (what the file calls a layer, its down, its up)
NAMINGS = {
    "ai-toolkit, diffusion-pipe": ("diffusion_model.{}".format, "lora_A.weight", "lora_B.weight"),
    "bare": (str, "lora_A.weight", "lora_B.weight"),
    "lightx2v, Kijai": ("diffusion_model.{}".format, "lora_down.weight", "lora_up.weight"),
    "kohya, musubi": (lambda x: f"lora_unet_{underscores(x)}", "lora_down.weight", "lora_up.weight"),
    "VideoX-Fun": (lambda x: f"lora_unet__{underscores(x)}", "lora_down.weight", "lora_up.weight"),
    "mixed": (lambda x: f"lora_unet_{x.replace('.', '_', 1)}", "lora_down.weight", "lora_up.weight"),
    "Diffusers": (lambda x: f"transformer.{to_diffusers(x)}", "lora_A.weight", "lora_B.weight"),
    "older Diffusers": (lambda x: f"transformer.{to_diffusers(x)}", "lora.down.weight", "lora.up.weight"),
    "SimpleTuner": (lambda x: f"lycoris_{underscores(to_diffusers(x))}", "lora_down.weight", "lora_up.weight"),
    "DiffSynth": (str, "lora_A.default.weight", "lora_B.default.weight"),
    "DiffSynth with its prefix": ("pipe.dit.{}".format, "lora_A.default.weight", "lora_B.default.weight"),
    "peft": ("base_model.model.{}".format, "lora_A.weight", "lora_B.weight"),
    "LyCORIS": (lambda x: f"lycoris_{underscores(x)}", "lora_down.weight", "lora_up.weight"),
}


class TestNamings:
    @pytest.mark.parametrize("alpha", [None, ALPHA], ids=["no alpha", "alpha"])
    @pytest.mark.parametrize("naming", NAMINGS)
    def test_every_program(self, tmp_path, weights, model, naming, alpha):
        call, down_name, up_name = NAMINGS[naming]
        changes = factors(weights)
        tensors = {}
        for layer, (down, up) in changes.items():
            tensors |= {f"{call(layer)}.{down_name}": down, f"{call(layer)}.{up_name}": up}
            if alpha:
                tensors[f"{call(layer)}.alpha"] = torch.tensor(alpha)
        changed = model.with_lora(lora_of(tmp_path, tensors), 0.5)
        assert_computes_with(changed, merged(weights, changes, 0.5 * (alpha / RANK if alpha else 1)))

    def test_every_layer_of_every_model_is_found_in_every_writing(self):
        """No two layers share a name without dots."""
        layout = replace(LAYOUT, layers=40, image_positions=514, reference=True, camera_channels=24)
        with torch.device("meta"):
            network = Network(DiT(layout), VACE(replace(VACE_LAYOUT, layers=15)), MotionController(256, 128))
        names = [name for name in parameters(network) if name.endswith(".weight")]
        assert len(names) > 900
        assert len({underscores(name) for name in names}) == len(names)
        for name in names:
            layer = name.removesuffix(".weight")
            assert find(layer, "_weight") == find(f"lora_unet_{underscores(layer)}", "_weight") == name

    def test_numbers_of_blocks_and_other_parts(self):
        assert find("diffusion_model.blocks.39.cross_attn.k_img", "_weight") == "blocks.39.cross_attn.k_img.weight"
        assert find("transformer.vace_blocks.3.proj_out", "_weight") == "vace_blocks.3.after_proj.weight"
        assert find("pipe.vace.vace_blocks.0.before_proj", "_weight") == "vace_blocks.0.before_proj.weight"
        assert find("pipe.vace.blocks.2.ffn.0", "_weight") == "vace_blocks.2.ffn.0.weight"
        assert find("pipe.motion_controller.linear.2", "_weight") == "motion_controller.linear.2.weight"
        assert find("blocks.0.norm2", "_weight") == "blocks.0.norm3.weight"  # Diffusers'
        assert find("scale_shift_table", "") == "head.modulation"
        assert find("lora_unet_down_blocks_0_attn", "_weight") is None

    def test_peft_keeps_one_alpha_beside_the_tensors(self, tmp_path, weights, model):
        changes = factors(weights, LAYERS[:1])
        (down, up), prefix = changes[LAYERS[0]], f"base_model.model.{LAYERS[0]}"
        tensors = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
        config = {"lora_alpha": 6, "r": RANK, "use_rslora": True}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        scaled = merged(weights, changes, 6 / RANK**0.5)
        peft = lora_of(tmp_path, tensors, name="adapter_model.safetensors")
        assert_computes_with(model.with_lora(peft), scaled)
        noted = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
        assert_computes_with(model.with_lora(lora_of(tmp_path, tensors, noted)), scaled)
        with pytest.raises(FileError, match="settings of .* are damaged"):
            lora_of(tmp_path, tensors, {"lora_adapter_metadata": "{"})
        other = lora_of(tmp_path, tensors)  # in the same folder, but not peft's
        assert_computes_with(model.with_lora(other), merged(weights, changes))


class TestKinds:
    """Each against the formula of its paper, and the same whether the weight is changed or something put beside it."""

    LAYER = "blocks.0.ffn.0"  # 256 x 128

    def check(self, tmp_path, weights, model, tensors, changed, strength=1.0):
        lora = lora_of(tmp_path, {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()})
        assert not lora.unread
        for size in (FEW, MANY):
            assert_computes_with(model.with_lora(lora, strength), weights | changed, size)

    @pytest.mark.parametrize("size", [FEW, MANY], ids=["beside", "merged"])
    def test_low_rank(self, tmp_path, weights, model, size):
        changes = factors(weights)
        tensors = {f"{x}.lora_{k}.weight": t for x, pair in changes.items() for k, t in zip("AB", pair, strict=True)}
        assert_computes_with(model.with_lora(lora_of(tmp_path, tensors), 0.7), merged(weights, changes, 0.7), size)

    def test_a_bias_beside_the_factors(self, tmp_path, weights, model):
        down, up = factors(weights, [self.LAYER])[self.LAYER]
        bias = random(256)
        tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": bias, "alpha": torch.tensor([ALPHA])}
        changed = merged(weights, {self.LAYER: (down, up)}, ALPHA / RANK)
        name = f"{self.LAYER}.bias"
        changed[name] = weights[name] + bias * ALPHA / RANK
        self.check(tmp_path, weights, model, {f"{self.LAYER}.{key}": value for key, value in tensors.items()}, changed)

    def test_differences(self, tmp_path, weights, model):
        named = {
            "blocks.0.norm3.diff": "blocks.0.norm3.weight",
            "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
            "blocks.1.norm3.w_norm": "blocks.1.norm3.weight",
            "blocks.1.norm3.b_norm": "blocks.1.norm3.bias",
            "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
            "blocks.0.self_attn.o.diff_b": "blocks.0.self_attn.o.bias",
            "blocks.0.self_attn.o.diff": "blocks.0.self_attn.o.weight",
            "blocks.0.modulation.diff_m": "blocks.0.modulation",
            "blocks.1.modulation.diff": "blocks.1.modulation",
            "head.modulation.diff_m": "head.modulation",
            "patch_embedding.diff": "patch_embedding.weight",
            "patch_embedding.diff_b": "patch_embedding.bias",
            "img_emb.proj.0.diff": "img_emb.proj.0.weight",
        }
        tensors = {key: random(*weights[name].shape, seed=i) for i, (key, name) in enumerate(named.items())}
        changed = {name: weights[name] + 0.5 * tensors[key] for key, name in named.items()}
        self.check(tmp_path, weights, model, tensors, changed, 0.5)

    def test_the_convolution(self, tmp_path, weights, model):
        down, up = random(RANK, 36, 1, 2, 2, scale=0.3), random(128, RANK, 1, 1, 1, seed=1, scale=0.3)
        delta = torch.einsum("or,rcthw->octhw", up.flatten(1), down)
        tensors = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
        changed = {"patch_embedding.weight": weights["patch_embedding.weight"] + delta}
        self.check(tmp_path, weights, model, tensors, changed)

    def test_replacement(self, tmp_path, weights, model):
        value, name = random(256, 128, seed=9), f"{self.LAYER}.weight"
        changed = {name: 0.25 * value + 0.75 * weights[name]}
        self.check(tmp_path, weights, model, {f"{self.LAYER}.set_weight": value}, changed, 0.25)

    @pytest.mark.parametrize("core", [False, True], ids=["plain", "with cores"])
    def test_loha(self, tmp_path, weights, model, core):
        layer, (rows, columns) = ("patch_embedding", (128, 36)) if core else (self.LAYER, (256, 128))
        a, b = (random(*((RANK, rows) if core else (rows, RANK)), seed=i) for i in (1, 2))
        c, d = (random(RANK, columns, seed=i) for i in (3, 4))
        parts = {"hada_w1_a": a, "hada_w1_b": c, "hada_w2_a": b, "hada_w2_b": d, "alpha": torch.tensor(80.0)}
        if core:
            cores = [random(RANK, RANK, 1, 2, 2, seed=i, scale=1) for i in (5, 6)]
            parts |= {"hada_t1": cores[0], "hada_t2": cores[1]}
            one, two = (
                torch.einsum("ijthw,jc,ir->rcthw", core, x, y) for core, x, y in zip(cores, (c, d), (a, b), strict=True)
            )
            parts["alpha"] = torch.tensor(400.0)
        else:
            one, two = a @ c, b @ d
        name = f"{layer}.weight"
        changed = {name: weights[name] + one * two * parts["alpha"] / RANK}
        self.check(tmp_path, weights, model, {f"{layer}.{key}": value for key, value in parts.items()}, changed)

    @pytest.mark.parametrize("whole", ["both", "first", "second", "none", "convolution"])
    def test_lokr(self, tmp_path, weights, model, whole):
        layer, second = self.LAYER, (64, 32)
        first = (4, 4)
        parts = {"lokr_w1": random(*first, scale=0.5)} if whole in ("both", "first", "convolution") else {}
        if not parts:
            parts = {"lokr_w1_a": random(4, 2, scale=1), "lokr_w1_b": random(2, 4, seed=1, scale=1)}
        w1 = parts.get("lokr_w1", parts.get("lokr_w1_a", torch.zeros(4, 2)) @ parts.get("lokr_w1_b", torch.zeros(2, 4)))
        rank = None if whole in ("both", "second") else RANK
        if whole == "convolution":
            layer = "patch_embedding"
            core, a, b = random(RANK, RANK, 1, 2, 2, scale=1), random(RANK, 32, seed=2), random(RANK, 9, seed=3)
            parts |= {"lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
            w2 = torch.einsum("ijthw,jc,ir->rcthw", core, b, a)
            delta = torch.einsum("ab,cdthw->acbdthw", w1, w2).reshape(128, 36, 1, 2, 2)
        else:
            if whole in ("both", "second"):
                parts["lokr_w2"] = w2 = random(*second, seed=2)
            else:
                parts |= {"lokr_w2_a": random(64, RANK, seed=2), "lokr_w2_b": random(RANK, 32, seed=3)}
                w2 = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
            delta = torch.kron(w1, w2)
        if whole == "second":
            rank = 2
        parts["alpha"] = torch.tensor(12.0)
        scale = 12.0 / rank if rank else 1.0
        name = f"{layer}.weight"
        changed = {name: weights[name] + delta * scale}
        self.check(tmp_path, weights, model, {f"{layer}.{key}": value for key, value in parts.items()}, changed)

    @pytest.mark.parametrize("strength", [1.0, 0.5])
    @pytest.mark.parametrize("key, shape", [
        ("dora_scale", (256, 1)), ("dora_scale", (1, 128)), ("lora_magnitude_vector.default.weight", (256,)),
    ])  # fmt: skip
    def test_dora(self, tmp_path, weights, model, key, shape, strength):
        down, up = factors(weights, [self.LAYER])[self.LAYER]
        magnitude, name = random(*shape, scale=1).abs(), f"{self.LAYER}.weight"
        tensors = {"lora_A.weight": down, "lora_B.weight": up, key: magnitude}
        turned = weights[name] + up @ down
        length = turned.norm(dim=0 if shape == (1, 128) else 1, keepdim=True)
        full = turned / length * (magnitude if magnitude.ndim == 2 else magnitude[:, None])
        changed = {name: weights[name] + strength * (full - weights[name])}
        tensors = {f"{self.LAYER}.{key}": value for key, value in tensors.items()}
        self.check(tmp_path, weights, model, tensors, changed, strength)


class TestRuns:
    @pytest.fixture
    def lora(self, tmp_path, weights):
        self.changes = factors(weights)
        norms = {"blocks.0.modulation.diff_m": random(1, 6, 128, seed=7)}
        tensors = {f"{x}.lora_{k}.weight": t for x, p in self.changes.items() for k, t in zip("AB", p, strict=True)}
        return lora_of(tmp_path, tensors | norms)

    def expected(self, weights, strength=1.0):
        modulation = weights["blocks.0.modulation"] + strength * random(1, 6, 128, seed=7)
        return merged(weights, self.changes, strength) | {"blocks.0.modulation": modulation}

    def test_nothing_stays(self, weights, model, lora):
        before = dict(model.module.named_parameters())
        plain = output_of(model)
        changed = model.with_lora(lora)
        output_of(changed)
        with pytest.raises(KeyError), changed.attached() as network:
            assert "forward" in vars(network.trunk.blocks[0])
            raise KeyError
        assert not any("forward" in vars(module) for module in model.module.modules())
        assert all(parameter is before[name] for name, parameter in model.module.named_parameters())
        assert torch.equal(output_of(model), plain)

    def test_a_failing_layer_leaves_its_weights(self, model, lora):
        with model.with_lora(lora).attached() as network, pytest.raises(RuntimeError):
            layer = network.trunk.blocks[0].self_attn.q
            stored = layer.weight
            layer(torch.zeros(1, 1000, 7))
        assert layer.weight is stored

    def test_chains_add_up_and_handles_share_the_weights(self, weights, model, lora):
        twice = model.with_lora(lora, 0.5).with_lora(lora, -0.2)
        assert twice.module is model.module and model.loras == ()
        assert twice.total_bytes() == model.total_bytes() + lora.residency.total_bytes()
        assert_computes_with(twice, self.expected(weights, 0.3))
        assert torch.equal(output_of(model.with_lora(lora, 0.0)), output_of(model))

    @pytest.mark.parametrize("size", [FEW, MANY], ids=["beside", "merged"])
    @pytest.mark.parametrize("budget", [0, 300_000, 1_000_000, None])
    def test_on_another_device_with_any_budget(self, weights, model, lora, budget, size):
        changed = replace(model.with_lora(lora), device=ELSEWHERE)
        changed.release()
        changed.ensure(budget)
        try:
            assert_computes_with(changed, self.expected(weights), size)
        finally:
            assert changed.release() <= changed.total_bytes()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())

    def test_runs_nest_with_the_same_loras_only(self, model, lora):
        changed = model.with_lora(lora)
        with changed.attached() as network, changed.attached():
            assert "forward" in vars(network.trunk.blocks[0])
        with changed.attached(), pytest.raises(RuntimeError, match="other LoRAs"), model.attached():
            pass

    def test_what_was_compiled_before_sees_the_changes(self, weights, model, lora):
        layer = model.trunk.blocks[1].ffn
        compiled = layer.forward = torch.compile(layer.forward, backend="eager")
        try:
            output_of(model)
            assert_computes_with(model.with_lora(lora), self.expected(weights))
            assert vars(layer)["forward"] is compiled
        finally:
            del layer.forward

    def test_a_whole_run_as_comfyui_runs_it(self, tmp_path, text_model):
        weights = dict(text_model.trunk.state_dict())
        lora = lora_of(
            tmp_path, {"blocks.0.modulation.diff": random(1, 6, 128), "head.head.diff_b": random(64, scale=1)}
        )
        path = tmp_path / "merged.safetensors"
        save_file(weights | {name: weights[name] + change.value for name, change in lora.changes.items()}, path)

        def video(model):
            text, latent = random(1, 5, 32, scale=1), torch.zeros(1, 16, 1, 4, 4)
            return sample(model, text, text * 2, latent, Settings(seed=1, steps=2))

        with torch.inference_mode():
            changed = text_model.with_lora(load_lora(tmp_path / "style.safetensors"))
            expected = video(load_model(path, device="cpu"))
            assert distance(expected, video(changed)) < 1e-5
            assert distance(expected, video(text_model)) > 1e-3
        assert not any(parameter.is_inference() for parameter in changed.loras[0][0].residency.module.parameters())

    @pytest.mark.parametrize("size", [FEW, MANY], ids=["few tokens", "many"])
    def test_gradients_reach_the_factors_alone(self, model, lora, size):
        for parameter in lora.residency.module.parameters():
            parameter.requires_grad_(True)
        with model.with_lora(lora).attached() as network:
            layer = network.trunk.blocks[0].self_attn.q
            layer(random(1, size[1] * size[2], 128)).sum().backward()
        change = lora.changes["blocks.0.self_attn.q.weight"]
        assert change.up.grad.abs().sum() > 0 and change.down.grad.abs().sum() > 0
        assert layer.weight.grad is None

    @pytest.mark.parametrize("stored", ["fp8", "fp8 with scales", "GGUF"])
    @pytest.mark.parametrize("size", [FEW, MANY], ids=["beside", "merged"])
    def test_on_packed_weights(self, tmp_path, weights, lora, stored, size):
        tensors, numbers = dict(weights), dict(weights)
        path = tmp_path / "packed.safetensors"
        for name in [name for name in weights if name.startswith("blocks.") and weights[name].ndim == 2]:
            weight = weights[name]
            if stored == "GGUF":
                packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
                tensors[name] = packed
                numbers[name] = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
                continue
            scale = weight.abs().max() / 448 if "scales" in stored else torch.tensor(1.0)
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            numbers[name] = tensors[name].float() * scale
            if "scales" in stored:
                tensors[name.replace("weight", "scale_weight")] = scale
        if stored == "GGUF":
            path = path.with_suffix(".gguf")
            writer = gguf.GGUFWriter(path, "wan")
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    writer.add_tensor(name, tensor.numpy())
                else:
                    writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        else:
            save_file(tensors, path)
        packed = load_model(path, device="cpu")
        assert packed.trunk.blocks[0].self_attn.q.weight.dtype.itemsize == 1
        assert_computes_with(packed.with_lora(lora, 0.6), self.expected(numbers, 0.6), size)


class TestFits:
    """What is left out, and what the user is told."""

    def changed(self, tmp_path, layers, dim=128, metadata=None):
        tensors = {}
        for layer in layers:
            rows, columns = (2 * dim, dim) if layer.endswith("ffn.0") else (dim, dim)
            tensors |= {f"{layer}.lora_A.weight": random(2, columns), f"{layer}.lora_B.weight": random(rows, 2)}
        return lora_of(tmp_path, tensors, metadata)

    def test_all_fits(self, tmp_path, model):
        lora = self.changed(tmp_path, ["blocks.0.self_attn.q", "blocks.1.ffn.0"], metadata={"software": "toolkit"})
        assert report(lora, fit(lora, model.module), 0.8) == (
            "style: 2 of 2 parts fit, strength 0.8.\nThe file says: toolkit."
        )

    def test_image_lora_on_a_text_model(self, tmp_path, text_model):
        lora = self.changed(
            tmp_path, ["blocks.0.cross_attn.q", "blocks.0.cross_attn.k_img", "blocks.0.cross_attn.v_img"]
        )
        text = report(lora, fit(lora, text_model.module), 1.0)
        assert "1 of 3 parts fit" in text
        assert "2 parts left out (blocks.0.cross_attn.k_img.weight, blocks.0.cross_attn.v_img.weight)" in text
        assert "this model looks at none" in text

    def test_another_size_is_refused_whole(self, tmp_path, text_model):
        lora = self.changed(tmp_path, ["blocks.0.self_attn.q", "text_embedding.2"], dim=5120)
        with pytest.raises(ModelError, match=r"trained for width 5120 \(14B\), and this model has width 128"):
            text_model.with_lora(lora)

    def test_more_blocks_and_vace(self, tmp_path, text_model):
        lora = self.changed(tmp_path, ["blocks.0.self_attn.q", "blocks.35.self_attn.q", "vace_blocks.0.self_attn.q"])
        skipped = fit(lora, text_model.module).skipped
        assert any("blocks after the last of this model, which has 2" in reason for reason in skipped)
        assert any("need a VACE module" in reason for reason in skipped)

    def test_vace(self, tmp_path, text_model):
        """The trunk's blocks and VACE's have different names, and each keep to theirs."""
        module = VACE(VACE_LAYOUT).requires_grad_(False)
        model = text_model.with_module(module)
        lora = self.changed(tmp_path, ["diffusion_model.vace_blocks.0.self_attn.q"])
        x = random(1, 3, 128)
        with model.with_lora(lora).attached() as network:
            assert "forward" in vars(network.vace.vace_blocks[0].self_attn.q)
            assert "forward" not in vars(network.trunk.blocks[0].self_attn.q)
            layer = network.vace.vace_blocks[0].self_attn.q
            delta = lora.changes["vace_blocks.0.self_attn.q.weight"]
            expected = x @ (layer.weight + delta.up @ delta.down).T + layer.bias
            torch.testing.assert_close(layer(x), expected)
        later = text_model.with_lora(self.changed(tmp_path, ["blocks.0.ffn.0", "vace_blocks.0.ffn.0"])).with_module(
            module
        )
        with later.attached() as network:  # the module came after the LoRA
            assert "forward" in vars(network.vace.vace_blocks[0].ffn[0])

    @pytest.mark.parametrize("dim, count", [(1536, 15), (5120, 8)])
    def test_blocks_that_are_vaces(self, tmp_path, dim, count):
        """Trained alone, VACE's blocks may be saved as if they were the model's: their number tells."""
        lora = self.changed(tmp_path, [f"blocks.{i}.self_attn.q" for i in range(count)], dim)
        assert all(name.startswith("vace_blocks.") for name in lora.changes) and len(lora.changes) == count
        assert f"Its blocks are 0 to {count - 1}, as many as VACE has" in lora.remark
        assert "set part to model" in lora.remark
        path = tmp_path / "style.safetensors"
        assert all(name.startswith("blocks.") for name in load_lora(path, "model").changes)
        assert load_lora(path, "model").remark == load_lora(path, "vace").remark == ""

    @pytest.mark.parametrize("layers", [
        [f"blocks.{i}.self_attn.q" for i in range(30)],
        [f"blocks.{i}.self_attn.q" for i in range(1, 16)],
        [*(f"blocks.{i}.self_attn.q" for i in range(15)), "text_embedding.2"],
        [*(f"blocks.{i}.self_attn.q" for i in range(15)), "vace_blocks.0.self_attn.q"],
    ])  # fmt: skip
    def test_blocks_that_are_the_models(self, tmp_path, layers):
        lora = self.changed(tmp_path, layers, 1536)
        assert lora.remark == "" and "blocks.1.self_attn.q.weight" in lora.changes

    def test_projections_that_only_vace_has(self, tmp_path, text_model):
        layers = ["blocks.0.self_attn.q", "blocks.0.after_proj"]
        lora = self.changed(tmp_path, layers)
        assert set(lora.changes) == {"vace_blocks.0.self_attn.q.weight", "vace_blocks.0.after_proj.weight"}
        vace = text_model.with_module(VACE(VACE_LAYOUT).requires_grad_(False))
        assert "only VACE's blocks have" in report(lora, fit(lora, vace.module), 1.0)
        assert fit(load_lora(tmp_path / "style.safetensors", "model"), vace.module).skipped

    def test_an_unknown_part(self, tmp_path):
        self.changed(tmp_path, ["blocks.0.self_attn.q"])
        with pytest.raises(InputError, match="no part 'clip'. Choose one of auto, model, vace"):
            load_lora(tmp_path / "style.safetensors", "clip")

    def test_channels_of_another_family(self, tmp_path, text_model):
        parts = {"lora_A.weight": random(2, 36, 1, 2, 2), "lora_B.weight": random(128, 2, 1, 1, 1)}
        tensors = {f"patch_embedding.{key}": value for key, value in parts.items()}
        with pytest.raises(ModelError, match="trained for 36 input channels, and this model has 16"):
            text_model.with_lora(lora_of(tmp_path, tensors))

    @pytest.mark.parametrize("key, reason", [
        ("blocks.0.self_attn.q_loras.down.weight", "Stand-In"),
        ("lycoris_blocks_0_self_attn_q.oft_blocks", "OFT"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "text encoder"),
        ("diffusion_model.patch_embedding.reshape_weight", "unknown kind"),
        ("lora_unet_down_blocks_0_attentions_0.lora_down.weight", "damaged"),
        ("diffusion_model.blocks.0.self_attn.q.glora_a", "unknown kind"),
        ("diffusion_model.blocks.0.attention.diff", "no part of Wan 2.1 is called so"),
        ("diffusion_model.blocks.0.self_attn.q.lokr_w1_a", "damaged"),
        ("diffusion_model.blocks.0.self_attn.q.hada_w1_a", "damaged"),
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "unknown kind"),
    ])  # fmt: skip
    def test_what_cannot_be_read_is_named(self, tmp_path, text_model, key, reason):
        good = {
            f"blocks.1.self_attn.q.lora_{k}.weight": t
            for k, t in zip("AB", (random(2, 128), random(128, 2)), strict=True)
        }
        lora = lora_of(tmp_path, {key: random(2, 128)} | good)
        assert any(reason in text for text in lora.unread), lora.unread
        assert reason in report(lora, fit(lora, text_model.module), 1.0)
        assert list(fit(lora, text_model.module).changes) == ["blocks.1.self_attn.q.weight"]

    def test_what_is_changed_twice_or_not_at_all(self, tmp_path):
        """A layer under two names, two kinds of change for one weight, and an alpha alone."""
        layer, value = "blocks.0.self_attn.q", random(128, 128)
        tensors = {
            f"{layer}.diff": value,
            f"lora_unet_{underscores(layer)}.diff": value,
            "blocks.1.norm3.alpha": value[0, 0],
        }
        tensors |= {"blocks.1.ffn.2.diff": value, "blocks.1.ffn.2.set_weight": value}
        lora = lora_of(tmp_path, tensors)
        assert list(lora.changes) == [f"{layer}.weight"]
        twice, damaged = sorted(lora.unread)
        assert twice == "changed twice in this file" and set(lora.unread[twice]) == {
            f"lora_unet_{underscores(layer)}",
            "blocks.1.ffn.2",
        }
        assert lora.unread[damaged] == ("blocks.1.norm3",)

    def test_a_core_in_the_middle_is_not_half_applied(self, tmp_path):
        parts = {"lora_down.weight": random(2, 128), "lora_up.weight": random(128, 2), "lora_mid.weight": random(2, 2)}
        lora = lora_of(tmp_path, {f"lora_unet_blocks_0_self_attn_q.{key}": value for key, value in parts.items()})
        assert not lora.changes and "lora_mid" in next(iter(lora.unread))

    def test_factors_that_do_not_fit_together(self, tmp_path):
        parts = {"lora_down.weight": random(2, 128), "lora_up.weight": random(128, 3)}
        lora = lora_of(tmp_path, {f"lora_unet_blocks_0_self_attn_q.{key}": value for key, value in parts.items()})
        assert not lora.changes and "damaged" in next(iter(lora.unread))

    def test_what_it_is_for_is_told(self):
        down, up = (
            "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
            "diffusion_model.blocks.0.self_attn.q.lora_B.weight",
        )
        summary = identify({down: (32, 5120), up: (5120, 32)}).summary
        assert summary == "a LoRA (2 tensors, rank 32, for width 5120 (14B))"
        assert identify({"blocks.0.norm3.diff": (1536,)}).summary == "a LoRA (1 tensor)"

    def test_other_files_are_named(self, tmp_path, weights):
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(FileError, match="a Wan 2.1 diffusion model.*Load Wan Model.*'Apply Wan LoRA' needs a LoRA"):
            load_lora(tmp_path / "model.safetensors")


class TestSaving:
    @pytest.mark.parametrize("key_format", KEY_FORMATS)
    def test_every_format_reads_back(self, tmp_path, weights, model, key_format):
        changes = factors(weights)
        tensors = {f"{x}.lora_{k}.weight": t for x, p in changes.items() for k, t in zip("AB", p, strict=True)}
        alphas = {f"{layer}.alpha": torch.tensor(ALPHA) for layer in changes}
        save_lora(lora_of(tmp_path, tensors | alphas), tmp_path / "again.safetensors", key_format)
        again = load_lora(tmp_path / "again.safetensors")
        assert again.note == "wan2.1/lora, style"
        assert_computes_with(model.with_lora(again), merged(weights, changes, ALPHA / RANK))

    def test_names_are_those_of_the_programs(self, tmp_path, weights):
        changes = factors(weights, ["blocks.1.cross_attn.k_img"])
        down, up = changes["blocks.1.cross_attn.k_img"]
        tensors = {"blocks.1.cross_attn.k_img.lora_A.weight": down, "blocks.1.cross_attn.k_img.lora_B.weight": up}
        lora = lora_of(tmp_path, tensors)
        expected = {
            "comfyui": ("diffusion_model.blocks.1.cross_attn.k_img", ["alpha", "lora_A.weight", "lora_B.weight"]),
            "kohya": ("lora_unet_blocks_1_cross_attn_k_img", ["alpha", "lora_down.weight", "lora_up.weight"]),
            "diffusers": ("transformer.blocks.1.attn2.add_k_proj", ["lora_A.weight", "lora_B.weight"]),
            "diffsynth": ("blocks.1.cross_attn.k_img", ["lora_A.default.weight", "lora_B.default.weight"]),
            "peft": ("base_model.model.blocks.1.cross_attn.k_img", ["lora_A.weight", "lora_B.weight"]),
        }
        for key_format, (layer, ends) in expected.items():
            save_lora(lora, tmp_path / "out.safetensors", key_format)
            assert sorted(load_file(tmp_path / "out.safetensors")) == [f"{layer}.{end}" for end in ends]

    def test_metadata_are_kept_and_the_tensors_described(self, tmp_path, weights):
        changes = factors(weights)
        tensors = {f"{x}.lora_{k}.weight": t for x, p in changes.items() for k, t in zip("AB", p, strict=True)}
        alphas = {f"{layer}.alpha": torch.tensor(ALPHA) for layer in changes}
        own = {"author": "somebody", "lora_adapter_metadata": '{"transformer.lora_alpha": 9}'}
        save_lora(lora_of(tmp_path, tensors | alphas, own), tmp_path / "again.safetensors", metadata={"steps": "7"})
        with safe_open(tmp_path / "again.safetensors", "pt") as stored:
            metadata = stored.metadata()
        assert metadata["author"] == "somebody" and metadata["steps"] == "7" and "lora_adapter_metadata" not in metadata
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
        assert metadata["modelspec.sai_model_spec"] and metadata["modelspec.title"] == "style"

    @pytest.mark.parametrize("key_format", ["comfyui", "kohya"])
    def test_other_kinds_read_back(self, tmp_path, key_format):
        tensors = {
            "blocks.0.norm3.diff": random(128), "blocks.0.norm3.diff_b": random(128),
            "blocks.0.modulation.diff_m": random(1, 6, 128), "blocks.1.self_attn.q.set_weight": random(128, 128),
            **{f"blocks.0.self_attn.q.hada_w{i}": random(*s) for i, s in
               {"1_a": (128, 2), "1_b": (2, 128), "2_a": (128, 2), "2_b": (2, 128)}.items()},
            "blocks.0.self_attn.q.alpha": torch.tensor(6.0), "blocks.0.self_attn.q.dora_scale": random(128, 1),
            "blocks.0.self_attn.k.lokr_w1": random(4, 4), "blocks.0.self_attn.k.lokr_w2": random(32, 32),
        }  # fmt: skip
        lora = lora_of(tmp_path, tensors)
        assert not lora.unread and len(lora.changes) == 6
        save_lora(lora, tmp_path / "again.safetensors", key_format)
        again = load_lora(tmp_path / "again.safetensors")
        assert again.changes.keys() == lora.changes.keys()
        for name, change in lora.changes.items():
            weight = random(*change.shape, seed=5)
            torch.testing.assert_close(again.changes[name](weight, 0.5), change(weight, 0.5))
        with pytest.raises(InputError, match="not of low rank"):
            save_lora(lora, tmp_path / "again.safetensors", "peft")

    def test_unknown_formats_are_refused(self, tmp_path):
        lora = lora_of(tmp_path, {"blocks.0.norm3.diff": random(128)})
        with pytest.raises(InputError, match="Choose one of comfyui"):
            save_lora(lora, tmp_path / "x.safetensors", "flux")


class TestNode:
    @pytest.fixture
    def file(self, tmp_path, monkeypatch):
        parts = {"lora_A.weight": random(2, 128), "lora_B.weight": random(128, 2)}
        (tmp_path / "models/loras/style").mkdir(parents=True)
        tensors = {f"blocks.0.self_attn.q.{key}": value for key, value in parts.items()}
        save_file(tensors, tmp_path / "models/loras/style/ink.safetensors")
        monkeypatch.setattr(host, "models_dir", tmp_path / "models")
        return "style/ink.safetensors"

    def test_a_file(self, file, model, capsys):
        assert ApplyLora.GET_NODE_INFO_V1()["input"]["required"]["lora_name"][1]["options"] == ["none", *LORAS, file]
        changed, text = ApplyLora.execute(model=model, lora_name=file, strength=0.5).args
        assert text == "ink: 1 of 1 parts fit, strength 0.5."
        assert text in capsys.readouterr().err
        assert changed.module is model.module and model.loras == ()
        again, _ = ApplyLora.execute(model=changed, lora_name="none", strength=1, lora=changed.loras[0][0]).args
        assert [strength for _, strength in again.loras] == [0.5, 1]

    def test_none(self, model):
        same, text = ApplyLora.execute(model=model, lora_name="none", strength=1.0).args
        assert same is model and "No LoRA was chosen" in text
