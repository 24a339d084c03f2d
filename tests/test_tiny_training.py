"""WanTiny's trainings: each begins with what is known, learns, and goes on after a stop as if there had been none."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from comfyui_wanflow.wan_core.loading.load import load_model, load_vae
from comfyui_wanflow.wan_core.models.image_encoder import ImageEncoderLayout
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.vae import LATENT_MEAN, LATENT_STD
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from comfyui_wanflow.wan_core.tiny import train, train_image, train_text, train_vae, world
from comfyui_wanflow.wan_core.tiny.perform import trained
from comfyui_wanflow.wan_core.tiny.tasks import TASKS, Encoders, samples
from comfyui_wanflow.wan_core.training.muon import Muon
from safetensors.torch import load_file, save_file

SHORT = (train_vae.Stage(steps=4, batch=1, frames=5, size=16, rate=1e-3),)


@pytest.fixture(scope="module", autouse=True)
def smaller():
    """The same models, with fewer layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LAYOUT", DiTLayout(dim=128, ffn_dim=64, layers=2, heads=1))
        patch.setattr(train_image, "LAYOUT", ImageEncoderLayout(dim=80, mlp_dim=80, heads=1, layers=1))
        yield


@pytest.fixture(scope="module")
def folder(smaller, tmp_path_factory):
    """Untrained encoders where trainings look for them, and a T2V model after one step."""
    folder = tmp_path_factory.mktemp("tiny")
    size = train_text.write_tokenizer(folder / "google" / "umt5-xxl")
    for file, weights in {
        train.TEXT: train_text.new_encoder(size, 0).state_dict(),
        train.VAE: train_vae.new_vae(0).state_dict(),
        train.IMAGE: train_image.complete(train_image.new_encoder(0)),
    }.items():
        save_file({name: weight.half().contiguous() for name, weight in weights.items()}, folder / file)
    train.train("T2V", folder, short("T2V", steps=1), batch_size=1)
    return folder


def short(name: str, steps: int) -> train.Recipe:
    return replace(train.RECIPES[name], clips=2, steps=steps)


def stop_after(monkeypatch, steps: int):
    """Let the training's optimizer fail at the step after `steps`."""
    left = iter(range(steps))
    real = Muon.step

    def step(self, *args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Muon, "step", step)


def test_the_vae_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "calibrate", lambda vae, seed: None)  # takes longer than these four steps
    whole = train_vae.train(tmp_path / "nowhere", stages=SHORT, checkpoint_seconds=1e9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        train_vae.train(tmp_path, stages=SHORT, checkpoint_seconds=0)
    resumed = train_vae.train(tmp_path, stages=SHORT, checkpoint_seconds=0)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", [name for name in train.RECIPES if name != "T2V"])
def test_every_model_learns_its_own_layers_from_where_it_begins(folder, name):
    recipe = short(name, steps=2)
    if recipe.begins != "T2V" and not (folder / recipe.begins / train.WEIGHTS).exists():
        train.train(recipe.begins, folder, short(recipe.begins, steps=1), batch_size=2)
    file = train.train(name, folder, recipe, batch_size=2)
    before, after = load_file(folder / name / "start.safetensors"), load_file(file)
    learned = {key for key in after if not torch.equal(after[key].float(), before[key].float())}
    assert learned
    if "dit" in recipe.parts:
        assert not any(key.startswith(("text_embedding.", "time_")) or ".ffn." in key for key in learned)
    task = recipe.tasks[-1]
    assert trained(task, folder).layout == train.begin(name, folder).layout


def test_calibrated_latents_have_the_published_statistics():
    vae = train_vae.new_vae(0)
    pixels = train_vae.random_batch(np.random.default_rng(0), train_vae.Stage(1, 4, 5, 32, 0.0))
    before = vae.decode_whole(vae.encode_whole(pixels))
    train_vae.calibrate(vae, 0, clips=16)
    latents = vae.encode_whole(train_vae.random_batch(np.random.default_rng(0), train_vae.Stage(1, 16, 9, 64, 0.0)))
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.tensor(LATENT_MEAN), atol=0.8, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)) / torch.tensor(LATENT_STD), torch.ones(16), atol=0.3, rtol=0)
    after = vae.decode_whole(vae.encode_whole(pixels))
    torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)  # the picture is the same


def test_roles_follow_from_the_caption():
    words = ("red", "circle", "left", "blue")

    class WordNumbers:  # a tokenizer of whole words
        def __call__(self, texts):
            rows = [[sum(map(ord, w)) for w in text.replace(",", " ,").split()] for text in texts]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            return type("Tokens", (), {"ids": ids, "mask": ids != 0})()

    _, _, roles = train_text.tokenized(WordNumbers(), [words], [0])
    # a red circle moves left on a blue background
    assert roles[0].tolist() == [4, 0, 1, 4, 2, 4, 4, 3, 4]


def test_training_clips_show_no_held_out_combination(folder):
    seen = samples(TASKS["T2V"], 40, seed=7, held_out=False)
    assert not any(world.is_held_out(sample.scene.words) for sample in seen)
    rows = train.encoded(TASKS["T2V"], 2, Encoders(load_vae(folder / train.VAE)))
    assert [row.captions for row in rows] == [sample.captions for sample in seen[:2]]


@pytest.mark.parametrize("name", ["VACE", "Speed"])
def test_a_module_beside_the_transformer_begins_without_a_say(folder, name):
    task, encoders = TASKS[name], Encoders(load_vae(folder / train.VAE))
    given = samples(task, 1, seed=0, held_out=False)[0]
    settings, text, latent = Settings(seed=1, steps=2, cfg=1.0), torch.randn(1, 5, 4096), torch.zeros(1, 16, 5, 8, 8)
    plain = sample(load_model(folder / "T2V" / train.WEIGHTS), text, None, latent, settings)
    model = train.begin(name, folder)
    asked = task.conditions(given, encoders)
    begun = sample(model, text, None, latent, settings, asked)
    torch.testing.assert_close(begun, plain, atol=1e-5, rtol=1e-4)
