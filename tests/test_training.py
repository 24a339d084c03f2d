"""Training: the objective, the data, what the trunk is given, resuming after a kill, and the LoRA that comes out."""

import json
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.errors import FileError, InputError
from comfyui_wanflow.wan_core.loading.load import load_model, load_text_encoder, load_vae
from comfyui_wanflow.wan_core.loading.lora_files import load_lora
from comfyui_wanflow.wan_core.lora import fit
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.sampling.loop import Settings as SamplingSettings
from comfyui_wanflow.wan_core.sampling.loop import sample
from comfyui_wanflow.wan_core.tiny import world
from comfyui_wanflow.wan_core.training.cache import Cache
from comfyui_wanflow.wan_core.training.dataset import list_items
from comfyui_wanflow.wan_core.training.examples import Encoders, prepare
from comfyui_wanflow.wan_core.training.flow import training_levels
from comfyui_wanflow.wan_core.training.framing import Framing
from comfyui_wanflow.wan_core.training.loop import Settings, train
from comfyui_wanflow.wan_core.training.objective import Objective
from comfyui_wanflow.wan_core.training.order import epoch_steps
from comfyui_wanflow.wan_core.training.trainee import new_lora, whole
from comfyui_wanflow.wan_core.video import save_video
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_data import SIZE, render, save_random, write_encoders

GOLDEN = Path(__file__).parent / "data" / "golden" / "scheduler.safetensors"
FRAMING = Framing(num_frames=5, height=SIZE, width=SIZE)
SCENES = [world.Scene("red", "circle", "left", "blue"), world.Scene("green", "square", "up", "white")]
LAYOUT = DiTLayout(dim=128, ffn_dim=64, layers=2, heads=1, text_dim=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small random models: a dit, and encoders that fit."""
    folder = tmp_path_factory.mktemp("models")
    return write_encoders(folder) | {"dit": save_random(DiT(LAYOUT), folder / "dit.safetensors")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of two clips of the toy world and a picture, with captions beside them."""
    folder = tmp_path_factory.mktemp("data")
    for number, scene in enumerate(SCENES):
        save_video(render(scene), folder / f"clip{number}.mp4", quality=10)
        (folder / f"clip{number}.txt").write_text(scene.caption)
    Image.new("RGB", (48, 40), "red").save(folder / "picture.png")
    (folder / "picture.txt").write_text("a red")
    return folder


@pytest.fixture
def encoders(files):
    return Encoders(load_vae(files["vae"], device="cpu"), load_text_encoder(files["text"], device="cpu"))


@pytest.fixture
def model(files):
    return load_model(files["dit"], device="cpu")


@pytest.fixture
def examples(data, encoders, tmp_path):
    return prepare(list_items(data)[0], FRAMING, encoders, Cache(tmp_path / "cache"))[0]


class TestObjective:
    def test_equals_the_recorded_reference(self):
        golden, levels = load_file(GOLDEN), training_levels(Settings())
        torch.testing.assert_close(levels.sigmas, golden["train_sigmas"], rtol=0, atol=1e-7)
        torch.testing.assert_close(levels.weights, golden["train_weights"], rtol=0, atol=1e-6)

    def test_levels_are_drawn_evenly_between_the_boundaries(self):
        levels = training_levels(Settings(min_timestep_boundary=0.5, max_timestep_boundary=0.75))
        assert len(levels.sigmas) == 250
        sigmas, weights = levels.draw(4000, torch.Generator().manual_seed(0))
        assert torch.isin(sigmas, levels.sigmas).all() and len(sigmas.unique()) == 250
        assert weights.mean() == pytest.approx(levels.weights.mean().item(), rel=0.02)


class TestOrder:
    def test_an_epoch_shows_all_clips_in_batches_of_one_shape(self):
        shapes = [(16, 1, 4, 4), (16, 2, 4, 4), (16, 1, 4, 4)]
        settings = Settings(repeat=3, batch_size=2, gradient_accumulation_steps=2)
        first, second = (epoch_steps(shapes, settings, epoch) for epoch in (0, 1))
        batches = [indices for step in first for indices in step]
        assert sorted(sum(batches, [])) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(first) == 3
        assert all(len({shapes[i] for i in indices}) == 1 and len(indices) <= 2 for indices in batches)
        assert first != second and first == epoch_steps(shapes, settings, 0)


def total_loss(model, examples):
    """At some levels, the same ones at each call."""
    with torch.no_grad(), model.attached() as network:
        objective = Objective(network, model, Settings())
        draws = [[torch.Generator().manual_seed(seed)] for seed in range(4 * len(examples))]
        return sum(objective(examples[i % len(examples)], draw).item() for i, draw in enumerate(draws))


class TestLora:
    def test_targets_have_the_reference_s_names(self, model):
        layers = {name.rsplit(".", 2)[0] for name in new_lora(model, 2).parameters}
        parts = [f"{which}_attn.{part}" for which in ("self", "cross") for part in "qkvo"] + ["ffn.0", "ffn.2"]
        assert layers == {f"blocks.{i}.{part}" for i in (0, 1) for part in parts}
        with pytest.raises(InputError, match="'qq'"):
            new_lora(model, 2, ["q", "qq"])

    def test_learns_and_loads_with_equal_effect(self, model, examples, tmp_path):
        before = {name: tensor.clone() for name, tensor in model.trunk.state_dict().items()}
        trainee = new_lora(model, rank=4)
        settings = Settings(learning_rate=3e-3, num_epochs=10, repeat=2, batch_size=2)
        loss = total_loss(trainee.model, examples)
        train(trainee, examples, settings, tmp_path)
        assert total_loss(trainee.model, examples) < 0.9 * loss
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.trunk.state_dict().items())

        file = tmp_path / "epoch-9.safetensors"
        with safe_open(file, "pt") as stored:
            names, metadata = set(stored.keys()), stored.metadata()
        assert {f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight" for side in "AB"} <= names
        assert metadata["lora_rank"] == metadata["lora_alpha"] == "4" and json.loads(metadata["training"])["seed"] == 0
        lora = load_lora(file)
        assert not lora.unread and not fit(lora, model.module).skipped and len(lora.changes) == 20

        def video(model):
            text, latent = examples[0].text, torch.zeros(1, 16, 2, 4, 4)
            return sample(model, text, None, latent, SamplingSettings(seed=1, steps=2, cfg=1))

        trained = video(trainee.model)
        torch.testing.assert_close(video(model.with_lora(lora)), trained, rtol=1e-5, atol=1e-5)
        assert (video(model) - trained).abs().max() > 1e-2

    def test_activations_in_main_memory_change_nothing(self, model, examples, tmp_path):
        kept, moved = (
            train(new_lora(model, 2), examples, Settings(offload_activations=there), tmp_path / str(there))
            for there in (False, True)
        )
        assert kept == moved


class TestWholeModel:
    def test_learns_in_fp32_and_is_saved_in_its_own_types(self, files, model, examples, tmp_path):
        weights = load_file(files["dit"])
        narrow = tmp_path / "narrow.safetensors"
        save_file({name: t.bfloat16() if t.ndim > 1 else t for name, t in weights.items()}, narrow)
        model = load_model(narrow, device="cpu")
        trainee = whole(model)
        before = total_loss(trainee.model, examples)
        train(trainee, examples, Settings(learning_rate=1e-3, num_epochs=8), tmp_path)
        assert total_loss(trainee.model, examples) < 0.9 * before
        assert all(p.dtype == torch.float32 for p in trainee.parameters.values())
        result, before = load_file(tmp_path / "epoch-7.safetensors"), load_file(narrow)
        assert {name: t.dtype for name, t in result.items()} == {name: t.dtype for name, t in before.items()}
        assert not torch.equal(result["blocks.0.ffn.0.weight"], before["blocks.0.ffn.0.weight"])
        assert all(torch.equal(t, before[name]) for name, t in model.trunk.state_dict().items())
        load_model(tmp_path / "epoch-7.safetensors", device="cpu")


SETTINGS = Settings(
    learning_rate=1e-3, num_epochs=2, warmup_steps=3, gradient_accumulation_steps=2, repeat=2, save_steps=2
)


class TestResuming:
    @pytest.mark.parametrize("make", [lambda model: new_lora(model, 2), whole], ids=["lora", "whole"])
    def test_a_stop_changes_nothing(self, model, examples, tmp_path, make):
        whole = make(model)
        losses = train(whole, examples, SETTINGS, tmp_path / "whole")

        def stop(done, total, loss):
            if done == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(make(model), examples, SETTINGS, tmp_path / "stopped", stop)
        assert (tmp_path / "stopped" / "step-5.safetensors").is_file()
        again = make(model)
        assert train(again, examples, SETTINGS, tmp_path / "stopped") == losses and len(losses) == 6
        for name, parameter in whole.parameters.items():
            assert torch.equal(parameter, again.parameters[name]), name

    def test_other_settings_are_refused_and_more_epochs_taken(self, model, examples, tmp_path):
        train(new_lora(model, 2), examples, Settings(), tmp_path)
        for changed in ({"seed": 1}, {"learning_rate": 1e-3}):
            with pytest.raises(InputError, match="other settings"):
                train(new_lora(model, 2), examples, Settings(**changed), tmp_path)
        assert len(train(new_lora(model, 2), examples, Settings(num_epochs=2), tmp_path)) == 2 * len(examples)
        (tmp_path / "training.pt").write_bytes(b"half a file")
        with pytest.raises(FileError, match="damaged"):
            train(new_lora(model, 2), examples, Settings(), tmp_path)
