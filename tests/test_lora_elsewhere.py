"""A LoRA that was trained here has the same effect in other programs; ComfyUI's is in test_comfyui.py."""

import pytest
import torch
from comfyui_wanflow.wan_core.loading.load import load_model
from comfyui_wanflow.wan_core.loading.lora_files import load_lora, save_lora
from comfyui_wanflow.wan_core.training.examples import Example
from comfyui_wanflow.wan_core.training.loop import Settings, train
from comfyui_wanflow.wan_core.training.trainee import new_lora
from safetensors.torch import load_file, save_file
from test_dit import TINY, diffusers_twin, inputs, random_dit, relative_error

RANK = 4
EQUAL = 1e-5  # relative, of the LoRA's effect on the output


class Clips(list):
    """One clip of noise, in memory."""

    groups, facts = ["one"], []

    def batch(self, indices, generators):
        return self[indices[0]]


@pytest.fixture(scope="module")
def dit():
    return random_dit(TINY)


@pytest.fixture(scope="module")
def lora(dit, tmp_path_factory):
    """Trained for some steps, with an alpha of its own, and loaded from its file."""
    folder = tmp_path_factory.mktemp("trained")
    save_file(dit.state_dict(), folder / "model.safetensors")
    model = load_model(folder / "model.safetensors", device="cpu")
    clip = Example(torch.randn(1, 16, 1, 4, 4), torch.randn(1, 3, TINY.text_dim))
    settings = Settings(learning_rate=1e-2, num_epochs=8)
    train(new_lora(model, RANK, alpha=2 * RANK), Clips([clip]), settings, folder / "training")
    return load_lora(folder / "training" / "epoch-7.safetensors")


@pytest.fixture(scope="module")
def expected(dit, lora, tmp_path_factory):
    """(output without, effect of the LoRA) by our own Apply LoRA."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(dit.state_dict(), path)
    model = load_model(path, device="cpu")
    outputs = []
    for engine in (model, model.with_lora(lora)):
        with torch.no_grad(), engine.attached() as network:
            outputs.append(network.trunk(*inputs(TINY)))
    plain, changed = outputs
    assert relative_error(changed, plain) > 0.02  # there is something to compare
    return plain, changed - plain


def saved(lora, tmp_path, key_format):
    save_lora(lora, tmp_path / "lora.safetensors", key_format)
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize("key_format", ["comfyui", "kohya", "diffusers"])
def test_diffusers(dit, lora, expected, tmp_path, key_format):
    pytest.importorskip("peft")
    from diffusers.loaders import WanLoraLoaderMixin

    twin, file = diffusers_twin(dit), saved(lora, tmp_path, key_format)
    state, metadata = WanLoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name=file.name, return_lora_metadata=True
    )
    WanLoraLoaderMixin.load_lora_into_transformer(state, twin, metadata=metadata)
    with torch.no_grad():
        effect = twin(*inputs(TINY), return_dict=False)[0] - expected[0]
    assert relative_error(effect, expected[1]) < EQUAL


def test_peft(dit, lora, expected, tmp_path):
    peft = pytest.importorskip("peft")
    layers = [name.removesuffix(".weight") for name in lora.changes]
    wrapped = peft.get_peft_model(random_dit(TINY), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers))
    found = peft.set_peft_model_state_dict(wrapped, load_file(saved(lora, tmp_path, "peft")))
    assert not found.unexpected_keys
    with torch.no_grad():
        effect = wrapped(*inputs(TINY)) - expected[0]
    assert relative_error(effect, expected[1]) < EQUAL


def test_diffsynth(lora, expected, tmp_path):
    """As its loader works: the partner of every .lora_B. by its name, then W += B @ A."""
    dit, tensors, count = random_dit(TINY), load_file(saved(lora, tmp_path, "diffsynth")), 0
    weights = dict(dit.named_parameters())
    with torch.no_grad():
        for key in (key for key in tensors if ".lora_B." in key):
            layer = key.partition(".lora_B.")[0].replace("diffusion_model.", "")
            weights[f"{layer}.weight"] += tensors[key] @ tensors[key.replace("lora_B", "lora_A")]
            count += 1
        effect = dit(*inputs(TINY)) - expected[0]
    assert count == len(lora.changes) and relative_error(effect, expected[1]) < EQUAL
