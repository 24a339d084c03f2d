"""LoRAs that are trained: on which layers, of which kind, over streamed or packed weights, beside whole parts."""

from dataclasses import replace

import families
import gguf
import pytest
import torch
from comfyui_wanflow.wan_core.errors import InputError, ModelError
from comfyui_wanflow.wan_core.loading.load import load_model
from comfyui_wanflow.wan_core.loading.lora_files import load_lora
from comfyui_wanflow.wan_core.lora import fit
from comfyui_wanflow.wan_core.models import ggml
from comfyui_wanflow.wan_core.models.layers import Linear
from comfyui_wanflow.wan_core.models.packed import Packed, PackedLinear, keep_packed
from comfyui_wanflow.wan_core.training import trainee as trainees
from comfyui_wanflow.wan_core.training.examples import Example
from comfyui_wanflow.wan_core.training.loop import Settings, train
from comfyui_wanflow.wan_core.training.trainee import mixed, new_lora
from safetensors.torch import load_file, save_file
from test_training_loop import Clips, small_model

ELSEWHERE = torch.device("cpu:0")  # to torch another place than "cpu", with the numbers at hand
QUICK = Settings(learning_rate=1e-2, num_epochs=2)


class FamilyClips(list):
    """Examples in memory with the conditions that a family needs."""

    facts = "clips"

    def __init__(self, *conditions):
        given = tuple(families.CONDITIONS[name] for name in conditions)
        latents = [families.random(1, 16, *families.SIZE, seed=i) for i in range(2)]
        super().__init__(Example(x, families.random(1, 4, 8, seed=i), given) for i, x in enumerate(latents))

    @property
    def groups(self):
        return [0, 0]

    def batch(self, indices, generators):
        (index,) = indices
        return self[index]


def layers_of(trainee):
    return {name.partition(".weight.")[0] for name in trainee.parameters}


def answer(model, *conditions):
    return families.video(model, *conditions, cfg=1.0)


class TestTargets:
    def test_names_ends_and_patterns(self):
        model = families.model("I2V")
        assert layers_of(new_lora(model, 2, ["k_img", "v_img"])) == {
            f"blocks.{i}.cross_attn.{side}_img" for i in (0, 1) for side in "kv"}  # fmt: skip
        assert layers_of(new_lora(model, 2, ["blocks.1.*attn.[qk]", "head.head"])) == {
            "blocks.1.self_attn.q", "blocks.1.self_attn.k", "blocks.1.cross_attn.q", "blocks.1.cross_attn.k",
            "head.head"}  # fmt: skip
        assert "img_emb.proj.1" in layers_of(new_lora(model, 2, ["*"]))
        with pytest.raises(InputError, match="no layer called 'blocks.7"):
            new_lora(model, 2, ["blocks.7.*"])

    @pytest.mark.parametrize("family, targets, conditions", [
        ("I2V", ["k_img", "v_img", "img_emb.proj.*"], ["start image"]),
        ("Camera", ["control_adapter.*"], ["camera", "start image"]),
        ("Control V1.1", ["ref_conv", "patch_embedding"], ["control video", "reference image"]),
    ])  # fmt: skip
    def test_adapters_and_convolutions_learn_and_load(self, family, targets, conditions, tmp_path):
        model = families.model(family)
        trainee = new_lora(model, 2, targets)
        train(trainee, FamilyClips(*conditions), QUICK, tmp_path)
        ups = [parameter for name, parameter in trainee.parameters.items() if name.endswith(".up")]
        assert ups and all(up.abs().max() > 1e-3 for up in ups)
        lora = load_lora(tmp_path / "epoch-1.safetensors")
        assert not lora.unread and not fit(lora, model.module).skipped
        expected = answer(trainee.model, *conditions)
        assert families.relative_error(answer(model.with_lora(lora), *conditions), expected) < 1e-5
        assert families.relative_error(answer(model, *conditions), expected) > 1e-4

    def test_alpha_weakens_the_change_and_its_beginning_is_another_s_end(self, tmp_path):
        first = new_lora(small_model(), 4)
        train(first, Clips(), QUICK, tmp_path / "first")
        start = load_lora(tmp_path / "first" / "epoch-1.safetensors")
        again = new_lora(small_model(), 4, start=start)
        weaker = new_lora(small_model(), 4, start=start, alpha=1)
        for name, parameter in first.parameters.items():
            assert torch.equal(parameter, again.parameters[name])
            times = 4 if name.endswith(".up") else 1  # the same change, of which a quarter counts
            torch.testing.assert_close(parameter * times, weaker.parameters[name])
        assert len({trainee.origin for trainee in (first, again, weaker)}) == 3
        weaker.write(tmp_path / "weaker.safetensors", {})
        file = load_file(tmp_path / "weaker.safetensors")
        assert file["diffusion_model.blocks.0.ffn.0.alpha"] == 1
        with pytest.raises(InputError, match="lora_rank"):
            new_lora(small_model(), 2, start=start)


    def test_what_comfyui_s_nodes_make_can_be_trained(self, monkeypatch):
        """They run in inference mode, in which a move to another device makes tensors that know no gradients."""
        monkeypatch.setattr(trainees, "module_digest", lambda module: "")
        with torch.inference_mode():
            trainee = new_lora(replace(small_model(), device=torch.device("meta")), 2)
        assert all(p.is_meta and p.requires_grad and not p.is_inference() for p in trainee.parameters.values())


class TestDoRA:
    def test_begins_without_effect_learns_and_loads(self, tmp_path):
        model = families.model("T2V")
        trainee = new_lora(model, 2, kind="dora")
        assert families.relative_error(answer(trainee.model), answer(model)) < 1e-5
        train(trainee, FamilyClips(), QUICK, tmp_path)
        lora = load_lora(tmp_path / "epoch-1.safetensors")
        file = load_file(tmp_path / "epoch-1.safetensors")
        lengths = file["diffusion_model.blocks.0.ffn.0.dora_scale"]
        assert lengths.shape == (64, 1)
        before = torch.linalg.vector_norm(model.trunk.blocks[0].ffn[0].weight, dim=1, keepdim=True)
        assert (lengths - before).abs().max() > 1e-3
        expected = answer(trainee.model)
        assert families.relative_error(answer(model.with_lora(lora)), expected) < 1e-5
        assert families.relative_error(answer(model), expected) > 1e-3

    def test_equals_peft_s(self):
        """The same beginning, gradients and answer. peft takes the length for a constant on the way back."""
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        ours = new_lora(small_model(), 2, ["ffn.0"], kind="dora")
        layer = torch.nn.Sequential()
        layer.add_module("ffn", small_model().trunk.blocks[0].ffn[0])
        theirs = peft.get_peft_model(layer, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["ffn"], use_dora=True))
        state = {name: p for name, p in theirs.named_parameters() if "lora" in name}
        name = "blocks.0.ffn.0.weight"
        with torch.no_grad():
            up, down = torch.randn(64, 2), torch.randn(2, 128)
            for key, value in state.items():
                if "lora_A" in key:
                    value.copy_(down)
                if "lora_B" in key:
                    value.copy_(up)
            ours.parameters[f"{name}.change.up"].copy_(up)
            ours.parameters[f"{name}.change.down"].copy_(down)
        x = torch.randn(5, 128)
        with ours.model.attached() as network:
            found = network.trunk.blocks[0].ffn[0](x)
        torch.testing.assert_close(found, theirs(x), rtol=1e-4, atol=1e-4)

    def test_an_unknown_kind_is_refused(self):
        with pytest.raises(InputError, match="lora, dora"):
            new_lora(small_model(), kind="lokr")


def plain_base(tmp_path):
    file = tmp_path / "model.safetensors"
    if not file.exists():
        save_file(small_model(layers=3).trunk.state_dict(), file)
    return file


def in_fp32(tmp_path, device):
    return load_model(plain_base(tmp_path), device=device)


def in_fp8(tmp_path, device):
    return load_model(plain_base(tmp_path), weight_dtype="fp8_e4m3fn", device=device)


def in_gguf(tmp_path, device):
    model = load_model(plain_base(tmp_path), device=device)
    for name, layer in list(model.trunk.blocks.named_modules()):
        if type(layer) is Linear:
            raw = gguf.quants.quantize(layer.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
            packed = Packed(tuple(layer.weight.shape), {"weight": torch.from_numpy(raw)}, ggml.TYPES["Q8_0"])
            assert keep_packed(model.trunk.blocks, f"{name}.weight", packed)
    return replace(model, residency=type(model.residency)(model.trunk))


class TestFrozenWeights:
    """Wherever the weights lie, and in however few bits: the same numbers come out of the training."""

    @pytest.mark.parametrize("kind", ["lora", "dora"])
    @pytest.mark.parametrize("base", [in_fp32, in_fp8, in_gguf])
    def test_streamed_or_in_place(self, base, kind, tmp_path):
        def run(device, budget, **options):
            model = base(tmp_path, device)
            trainee = new_lora(model, 2, kind=kind)
            (lora, _), = trainee.model.loras
            lora.residency._rest = device  # as on a card, where the factors are made
            model.residency.ensure(budget, device)
            folder = tmp_path / f"{device}{budget}{options}".replace(":", "")
            losses = train(trainee, Clips(3), Settings(learning_rate=1e-2, num_epochs=2, **options), folder)
            assert all(parameter.device.type == "cpu" for parameter in model.trunk.parameters())
            return losses, trainee.parameters

        losses, factors = run(torch.device("cpu"), None)
        assert max(p.abs().max() for name, p in factors.items() if name.endswith(".up")) > 1e-2
        for device, budget, options in (
            (ELSEWHERE, 0, {}),
            (ELSEWHERE, 10**9, {}),
            (ELSEWHERE, 0, {"gradient_checkpointing": False}),
        ):
            again, others = run(device, budget, **options)
            assert again == losses
            for name, factor in factors.items():
                assert torch.equal(factor, others[name]), name

    @pytest.mark.parametrize("base", [in_fp8, in_gguf])
    def test_packed_weights_train_as_their_numbers_do(self, base, tmp_path):
        packed, plain = base(tmp_path, "cpu"), in_fp32(tmp_path, "cpu")
        for name, layer in packed.trunk.named_modules():
            if isinstance(layer, PackedLinear):
                plain.trunk.get_submodule(name).weight.data = layer.numbers(torch.float32)
        runs = [
            train(new_lora(model, 2), Clips(3), QUICK, tmp_path / str(i)) for i, model in enumerate((packed, plain))
        ]
        assert runs[0] == pytest.approx(runs[1], rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
class TestOnACard:
    @pytest.mark.parametrize("base", [in_fp32, in_fp8, in_gguf])
    def test_streamed_weights_train_the_same_in_less_memory(self, base, tmp_path):
        def run(budget):
            model = base(tmp_path, "cuda")
            trainee = new_lora(model, 2)
            model.residency.limit_to(budget)
            torch.cuda.reset_peak_memory_stats()
            losses = train(trainee, Clips(3), QUICK, tmp_path / str(budget))
            return losses, trainee.parameters, torch.cuda.max_memory_allocated()

        losses, factors, most = run(None)
        again, others, least = run(0)
        assert again == pytest.approx(losses, rel=1e-2) and least < most  # attention's way back adds up in any order
        for name, factor in factors.items():
            assert factor.is_cuda
            torch.testing.assert_close(factor, others[name], rtol=1e-2, atol=1e-3)


class TestBesideWholeParts:
    def test_a_lora_on_the_trunk_and_the_whole_motion_controller(self, tmp_path):
        model = families.model("speed")
        trainee = mixed(model, ["motion_controller"], ["dit"], rank=2)
        train(trainee, FamilyClips("motion speed"), QUICK, tmp_path)
        lora = load_lora(tmp_path / "epoch-1.safetensors")
        assert not fit(lora, model.module).skipped and len(lora.changes) == 20
        parts = load_file(tmp_path / "epoch-1.motion_controller.safetensors")
        before = model.module.motion_controller.state_dict()
        assert parts.keys() == before.keys() and any(not torch.equal(parts[name], before[name]) for name in parts)
        expected = answer(trainee.model, "motion speed")
        model.module.motion_controller.load_state_dict(parts)
        assert families.relative_error(answer(model.with_lora(lora), "motion speed"), expected) < 1e-5

    def test_a_lora_on_vace(self, tmp_path):
        model = families.model("VACE")
        trainee = new_lora(model, 2, parts=["vace"])
        assert layers_of(trainee) and all(name.startswith("vace_blocks.") for name in layers_of(trainee))
        train(trainee, FamilyClips("VACE pictures"), QUICK, tmp_path)
        lora = load_lora(tmp_path / "epoch-1.safetensors")
        assert not lora.unread and not fit(lora, model.module).skipped
        expected = answer(trainee.model, "VACE pictures")
        assert families.relative_error(answer(model.with_lora(lora), "VACE pictures"), expected) < 1e-5
        projections = new_lora(model, 2, ["before_proj", "after_proj"], parts=["vace"])
        assert layers_of(projections) == {"vace_blocks.0.before_proj", "vace_blocks.0.after_proj"}
        with pytest.raises(ModelError, match="no VACE module"):
            new_lora(small_model(), 2, parts=["vace"])
