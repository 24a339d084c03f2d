"""Control LoRAs: a Text to Video model that reads a control video computes what a widened model would."""

from dataclasses import replace

import families
import gguf
import pytest
import torch
from comfyui_wanflow.nodes.lora import ApplyLora
from comfyui_wanflow.wan_core.adapters.control import ControlCondition
from comfyui_wanflow.wan_core.errors import ModelError
from comfyui_wanflow.wan_core.loading.inspect import inspect
from comfyui_wanflow.wan_core.loading.load import load_model
from comfyui_wanflow.wan_core.loading.lora_files import load_lora, save_lora
from comfyui_wanflow.wan_core.lora import Lora
from comfyui_wanflow.wan_core.models.changes import LowRank
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.planning.phases import sampling_phase
from comfyui_wanflow.wan_core.sampling.loop import Settings
from comfyui_wanflow.wan_core.sampling.windows import Windows
from families import random, relative_error, video
from safetensors.torch import load_file, save_file

LAYOUT = DiTLayout(dim=128, ffn_dim=256, layers=2, heads=1, text_dim=8, frequency_dim=16)
LAYER, INPUT = "blocks.1.self_attn.q", "patch_embedding"
ELSEWHERE = torch.device("cpu:0")  # for torch another place than "cpu"
LARGE = torch.zeros(1, 16, 1, 24, 24)  # as many tokens as make changing the weights cheaper
LARGE_CONTROL = ControlCondition(random(1, 16, *LARGE.shape[2:], seed=41))


def random_weights(layout):
    shapes = {name: tensor.shape for name, tensor in DiT(layout).state_dict().items()}
    return {name: random(*shape, seed=i) * 0.1 for i, (name, shape) in enumerate(shapes.items())}


WEIGHTS = random_weights(LAYOUT)


def factors(channels=32, seed=60):
    """Names in the file -> tensors, as spacepxl's trainer makes them."""
    return {
        f"{INPUT}.lora_A.weight": random(4, channels, 1, 2, 2, seed=seed) * 0.2,
        f"{INPUT}.lora_B.weight": random(128, 4, 1, 1, 1, seed=seed + 1) * 0.2,
        f"{LAYER}.lora_A.weight": random(4, 128, seed=seed + 2) * 0.2,
        f"{LAYER}.lora_B.weight": random(128, 4, seed=seed + 3) * 0.2,
    }


def widened(weights, *loras):
    """What a model with 32 input channels has, where these (tensors, strength) are merged into it; own arithmetic."""
    weights = dict(weights)
    plain = weights[f"{INPUT}.weight"]
    weights[f"{INPUT}.weight"] = torch.cat([plain, torch.zeros_like(plain)], dim=1)
    for tensors, strength in loras:
        down, up = tensors[f"{INPUT}.lora_A.weight"], tensors[f"{INPUT}.lora_B.weight"]
        delta = torch.einsum("or,rcthw->octhw", up[:, :, 0, 0, 0], down)
        weights[f"{INPUT}.weight"][:, : delta.shape[1]] += strength * delta
        delta = tensors[f"{LAYER}.lora_B.weight"] @ tensors[f"{LAYER}.lora_A.weight"]
        weights[f"{LAYER}.weight"] = weights[f"{LAYER}.weight"] + strength * delta
    return weights


def model_of(folder, weights, name):
    save_file(weights, folder / f"{name}.safetensors")
    return load_model(folder / f"{name}.safetensors", device="cpu")


def lora_of(folder, tensors, name="tile"):
    save_file(tensors, folder / f"{name}.safetensors")
    return load_lora(folder / f"{name}.safetensors")


@pytest.fixture
def model(tmp_path):
    return model_of(tmp_path, WEIGHTS, "text_model")


@pytest.fixture
def lora(tmp_path):
    return lora_of(tmp_path, factors())


def assert_controlled(model, reference):
    """Both make the same of a control video, of few and of many tokens, and of none."""
    assert relative_error(video(model, "control video"), video(reference, "control video")) < 1e-5
    assert relative_error(video(model), video(reference)) < 1e-5
    assert relative_error(video(model, "control video"), video(model)) > 1e-3, "nothing was read"


def lora_for(width):
    """The same kind of LoRA for models of another width."""
    changes = {f"{INPUT}.weight": LowRank(random(width, 4, 1, 1, 1), random(4, 32, 1, 2, 2))}
    return Lora("tile", changes | {f"{LAYER}.weight": LowRank(random(width, 4), random(4, width))})


class TestComputes:
    @pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
    def test_as_a_widened_model(self, tmp_path, model, lora, strength):
        reference = model_of(tmp_path, widened(WEIGHTS, (factors(), strength)), "widened")
        assert_controlled(model.with_lora(lora, strength), reference)

    def test_with_many_tokens(self, tmp_path, model, lora, monkeypatch):
        """Then the changed weights are made, in place of a product beside them."""
        monkeypatch.setitem(families.CONDITIONS, "control video", LARGE_CONTROL)
        reference = model_of(tmp_path, widened(WEIGHTS, (factors(), 1.0)), "widened")
        made, expected = (video(engine, "control video", latent=LARGE) for engine in (model.with_lora(lora), reference))
        assert relative_error(made, expected) < 1e-5

    @pytest.mark.parametrize("front, shape", [("", None), ("diffusion_model.", (128, 32, 1, 2, 2))])
    def test_both_published_writings(self, tmp_path, model, front, shape):
        tensors = {front + name: tensor for name, tensor in factors().items()}
        if shape:
            tensors[f"{front}{INPUT}.reshape_weight"] = torch.tensor(shape)
        lora = lora_of(tmp_path, tensors)
        assert lora.controls and not lora.unread
        assert_controlled(model.with_lora(lora), model_of(tmp_path, widened(WEIGHTS, (factors(), 1.0)), "widened"))

    @pytest.mark.parametrize("first", ["control", "style"])
    def test_chains_with_a_lora_for_the_latents(self, tmp_path, model, lora, first):
        style = factors(channels=16, seed=70)
        reference = model_of(tmp_path, widened(WEIGHTS, (factors(), 0.8), (style, 0.5)), "widened")
        pair = [(lora, 0.8), (lora_of(tmp_path, style, "style"), 0.5)]
        for each in pair if first == "control" else reversed(pair):
            model = model.with_lora(*each)
        assert_controlled(model, reference)

    @pytest.mark.parametrize("budget", [0, 20_000, None])
    def test_on_another_device(self, tmp_path, model, lora, budget):
        changed = replace(model.with_lora(lora), device=ELSEWHERE)
        changed.ensure(budget)
        assert_controlled(changed, model_of(tmp_path, widened(WEIGHTS, (factors(), 1.0)), "widened"))

    @pytest.mark.parametrize("stored", ["fp8", "GGUF"])
    def test_on_packed_weights(self, tmp_path, lora, stored):
        numbers, tensors = dict(WEIGHTS), dict(WEIGHTS)
        matrices = [name for name in WEIGHTS if name.startswith("blocks.") and WEIGHTS[name].ndim == 2]
        if stored == "fp8":
            for name in (*matrices, f"{INPUT}.weight"):
                tensors[name] = WEIGHTS[name].to(torch.float8_e4m3fn)
                numbers[name] = tensors[name].float()
            base = model_of(tmp_path, tensors, "packed")
        else:
            base = load_model(self.gguf_file(tmp_path, matrices, numbers), device="cpu")
        assert base.trunk.blocks[0].self_attn.q.weight.dtype.itemsize == 1
        reference = model_of(tmp_path, widened(numbers, (factors(), 1.0)), "widened")
        assert_controlled(base.with_lora(lora), reference)

    def gguf_file(self, tmp_path, matrices, numbers):
        writer = gguf.GGUFWriter(tmp_path / "packed.gguf", "wan")
        for name, tensor in WEIGHTS.items():
            if name in matrices:
                packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
                numbers[name] = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
            else:
                writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "packed.gguf"

    def test_in_windows_with_prompts_as_one_batch(self, tmp_path, model, lora):
        reference = model_of(tmp_path, widened(WEIGHTS, (factors(), 1.0)), "widened")
        made, expected = (
            video(engine.with_windows(Windows(3, 2)), "control video", cfg_merge=True)
            for engine in (model.with_lora(lora), reference)
        )
        assert relative_error(made, expected) < 1e-5


class TestHandles:
    def test_share_everything(self, model, lora):
        before, wide = video(model), model.with_lora(lora)
        assert wide.layout.in_dim == 32 and dict(wide.layout.concat) == {"control": 16}
        assert wide.trunk.layout is wide.layout and wide.residency is model.residency
        assert list(wide.module.parameters()) and all(
            own is other for own, other in zip(wide.module.parameters(), model.module.parameters(), strict=True)
        )
        assert relative_error(video(wide), before) > 1e-3
        assert model.layout.in_dim == model.trunk.layout.in_dim == 16 and model.loras == ()
        assert torch.equal(video(model), before)

    def test_strength_0_reads_without_effect(self, model, lora):
        silent = model.with_lora(lora, 0.0)
        assert torch.equal(video(silent, "control video"), video(model))

    def test_runs_of_several_handles_do_not_mix(self, model, lora):
        with model.with_lora(lora).attached(), pytest.raises(RuntimeError, match="in use with other LoRAs"):
            video(model)


class TestRefuses:
    def test_a_second_one(self, tmp_path, model, lora):
        depth = lora_of(tmp_path, factors(seed=80), "depth")
        with pytest.raises(ModelError, match="depth gives text_model a control video, .* another LoRA already"):
            model.with_lora(lora).with_lora(depth)

    @pytest.mark.parametrize("family", ["I2V", "Control"])
    def test_models_that_look_at_pictures(self, family):
        model = families.model(family)
        with pytest.raises(ModelError, match=r"of another kind \(.*in_dim (36|48)\). Load a Text to Video model"):
            model.with_lora(lora_for(families.DIM))

    def test_another_size(self, model):
        with pytest.raises(ModelError, match="trained for width 256, and this model has width 128"):
            model.with_lora(lora_for(256))

    @pytest.mark.parametrize("condition, sentence", [
        ("start image", "takes no first or last image .*Text to Video with control model, in_dim 32"),
        ("reference image", "reference image"),
        ("camera", "no camera adapter"),
        ("VACE video", "VACE"),
        ("motion speed", "motion speed"),
    ])  # fmt: skip
    def test_conditions_that_it_does_not_read(self, model, lora, condition, sentence):
        with pytest.raises(ModelError, match=sentence):
            video(model.with_lora(lora), condition)

    def test_a_control_video_without_it(self, model):
        with pytest.raises(ModelError, match="takes no control video .* with a control LoRA"):
            video(model, "control video")

    def test_a_camera_models_lora_is_none(self, tmp_path, model):
        tensors = factors() | {"control_adapter.conv.diff": random(128, 64 * 24, 2, 2)}
        lora = lora_of(tmp_path, tensors)
        changed = model.with_lora(lora)
        assert not lora.controls and changed.layout is model.layout

    def test_a_reshape_that_does_not_fit(self, tmp_path):
        tensors = factors() | {f"{INPUT}.reshape_weight": torch.tensor([128, 36, 1, 2, 2])}
        assert lora_of(tmp_path, tensors).unread == {
            "damaged: tensors are missing or do not fit together": (INPUT,),
        }


class TestFiles:
    @pytest.mark.parametrize("key_format, key", [
        ("comfyui", "diffusion_model.patch_embedding.reshape_weight"),
        ("kohya", "lora_unet_patch_embedding.reshape_weight"),
        ("diffsynth", None),
    ])  # fmt: skip
    def test_saved_it_tells_comfyui_the_shape(self, tmp_path, model, lora, key_format, key):
        save_lora(lora, tmp_path / "again.safetensors", key_format)
        shapes = {
            name: x.tolist() for name, x in load_file(tmp_path / "again.safetensors").items() if "reshape" in name
        }
        assert shapes == ({key: [128, 32, 1, 2, 2]} if key else {})
        again = model.with_lora(load_lora(tmp_path / "again.safetensors"))
        assert relative_error(video(again, "control video"), video(model.with_lora(lora), "control video")) < 1e-6

    def test_a_merged_model_is_one_too(self, tmp_path):
        """Read from its tensors: 32 channels, and eyes for no image."""
        model = model_of(tmp_path, widened(WEIGHTS, (factors(), 1.0)), "merged")
        assert model.layout.family == "Text to Video with control" and dict(model.layout.concat) == {"control": 16}
        page = inspect([tmp_path / "merged.safetensors"])
        assert "32 channels: 16 latent + 16 control" in page and "a control video" in page

    def test_inspected(self, tmp_path, lora):
        assert "a control video to what Text to Video models read (32 input channels)" in inspect(
            [tmp_path / "tile.safetensors"]
        )

    def test_planned(self, model, lora):
        latent, settings = (1, 16, *families.SIZE), Settings(seed=0)
        assert "a control video beside the latents" in sampling_phase(model.with_lora(lora), latent, settings).detail
        assert "control" not in sampling_phase(model, latent, settings).detail

    def test_node(self, tmp_path, model, lora, capsys):
        changed, text = ApplyLora.execute(model=model, lora_name="none", strength=1.0, lora=lora).args
        assert "2 of 2 parts fit" in text and "reads a control video now, from Wan Control Video" in text
        assert changed.layout.is_controlled and text.splitlines()[0] in capsys.readouterr().err
