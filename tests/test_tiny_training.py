"""WanTiny's training: it learns, and a run that was stopped goes on as if it had not been."""

import math

import numpy as np
import pytest
import torch
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.vae import LATENT_MEAN, LATENT_STD
from comfyui_wanflow.wan_core.sampling.schedules import shifted
from comfyui_wanflow.wan_core.tiny import train_dit, train_text, train_vae, world
from comfyui_wanflow.wan_core.training.flow import flow_matching_loss
from safetensors.torch import save_file

LAYOUT = DiTLayout(dim=128, ffn_dim=64, layers=1, heads=1)
SHORT = (train_vae.Stage(steps=4, batch=1, frames=5, size=16, rate=1e-3),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Untrained weights where train_dit looks for them."""
    folder = tmp_path_factory.mktemp("tiny")
    size = train_text.write_tokenizer(folder / "google" / "umt5-xxl")
    for name, module in {
        "models_t5_umt5-xxl-enc-bf16": train_text.new_encoder(size, 0),
        "Wan2.1_VAE": train_vae.new_vae(0),
    }.items():
        save_file({k: v.half().contiguous() for k, v in module.state_dict().items()}, folder / f"{name}.safetensors")
    return folder


def stop_after(monkeypatch, steps: int):
    """Let the training's optimizer fail at the step after `steps`."""
    left = iter(range(steps))
    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def assert_equal(first, second):
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_vae_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "calibrate", lambda vae, seed: None)  # takes longer than these four steps
    whole = train_vae.train(tmp_path / "nowhere", stages=SHORT, checkpoint_seconds=1e9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        train_vae.train(tmp_path, stages=SHORT, checkpoint_seconds=0)
    assert_equal(whole, train_vae.train(tmp_path, stages=SHORT, checkpoint_seconds=0))


def test_the_transformer_resumes_bit_for_bit(folder, tmp_path, monkeypatch):
    def train(checkpoint_seconds):
        return train_dit.train(folder, 4, 2, 1e-3, 0, LAYOUT, {5: 4}, checkpoint_seconds)

    whole = train(1e9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        train(0)
    assert_equal(whole, train(0))


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


def test_one_clip_can_be_learned(folder):
    """The loss of a fixed batch falls well below that of predicting nothing."""
    torch.manual_seed(0)
    dit = train_dit.DiT(LAYOUT)
    latents, noise = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4)
    text, sigmas = torch.randn(1, 4, 4096), torch.tensor([0.5])
    optimizer = train_dit.new_optimizer(dit)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * group["share"]
    losses = []
    for _ in range(30):
        loss = flow_matching_loss(dit, latents, text, sigmas, noise)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx((noise - latents).square().mean().item(), rel=1e-5)  # the head begins at zero
    assert losses[-1] < 0.3 * losses[0]


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
    _, facts = train_dit.make_latents(train_dit.load_vae(folder), 5, 4, folder / "latents_5.pt")
    assert len(facts) == 4 and not any(world.is_held_out(f) for f in facts)


def test_shifted_sigmas():
    uniform = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shifted(uniform, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert torch.equal(shifted(uniform, 1.0), uniform)


def test_learning_rates_warm_up_and_fall():
    rates = [train_dit.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] < 0.01 and max(rates) > 0.85 and rates[-1] < 0.03
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
