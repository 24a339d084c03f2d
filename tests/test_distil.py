"""Few-step models: what they are trained on, how WanTiny is distilled, and how they are set up."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.nodes.lora import ApplyLora
from comfyui_wanflow.nodes.sample import FewSteps, Sampler
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.loading.load import load_model, load_text_encoder
from comfyui_wanflow.wan_core.loading.lora_files import load_lora
from comfyui_wanflow.wan_core.lora import fit
from comfyui_wanflow.wan_core.models.vae import normalised
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from comfyui_wanflow.wan_core.sampling.presets import FEW_STEPS
from comfyui_wanflow.wan_core.sampling.schedules import read_timesteps
from comfyui_wanflow.wan_core.tiny import distil
from comfyui_wanflow.wan_core.training.examples import Example
from comfyui_wanflow.wan_core.training.flow import line
from comfyui_wanflow.wan_core.training.objective import Objective
from comfyui_wanflow.wan_core.training.settings import Settings as TrainingSettings
from families import model, random, vace
from safetensors.torch import load_file
from toy_data import write_encoders

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    return load_text_encoder(write_encoders(tmp_path_factory.mktemp("encoders"))["text"], device="cpu")


def error(trained, examples):
    """The loss on all pieces."""
    with torch.no_grad(), trained.attached() as network:
        everything = examples.batch(range(len(examples.pieces)), [])
        return Objective(network, trained, TrainingSettings())(everything, [torch.Generator()] * len(examples.pieces))


def test_a_line_is_where_it_has_to_be_at_both_levels():
    x, y = random(1, 16, 2, 4, 4), random(1, 16, 2, 4, 4, seed=1)
    clean, noise = line(x, 0.8, y, 0.3)
    torch.testing.assert_close(0.2 * clean + 0.8 * noise, x)
    torch.testing.assert_close(0.7 * clean + 0.3 * noise, y)


def test_the_loss_is_that_of_the_step_from_one_place_to_the_next():
    small, text = model("T2V"), random(2, 3, 8, seed=2)
    x, y = random(2, 16, 2, 4, 4), random(2, 16, 2, 4, 4, seed=1)
    sigmas, lower = torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.0])
    clean, noise = line(x, sigmas.view(-1, 1, 1, 1, 1), y, lower.view(-1, 1, 1, 1, 1))
    with torch.no_grad(), small.attached() as network:
        objective = Objective(network, small, TrainingSettings())
        example = Example(clean, text, noise=noise, sigmas=sigmas)
        loss = objective(example, [torch.Generator().manual_seed(seed) for seed in range(2)])
        step = y - x - network.trunk(x, sigmas * 1000, text) * (lower - sigmas).view(-1, 1, 1, 1, 1)
    gaps = (sigmas - lower).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(loss, (step / gaps).square().mean())


def test_the_noise_of_an_example_is_for_the_clip_not_for_what_stands_before_it():
    small = model("VACE")
    clip, generators = random(1, 16, 5, 6, 6), [torch.Generator().manual_seed(3)]
    given = Example(clip, random(1, 3, 8), (vace(references=1),))
    drawn = torch.randn(16, 6, 6, 6, generator=torch.Generator().manual_seed(3))
    named = Example(clip, given.text, given.conditions, noise=drawn[None, :, 1:], sigmas=torch.tensor([0.7]))
    with torch.no_grad(), small.attached() as network:
        objective = Objective(network, small, TrainingSettings())
        expected = objective(given, [torch.Generator().manual_seed(3)], torch.tensor([0.7]))
        assert torch.equal(objective(named, generators), expected)


def test_the_places_are_those_of_the_sampler(text_encoder):
    positive, negative = (distil.read(text_encoder, [text]) for text in ("a red circle", ""))
    settings = Settings(seed=3, steps=4, cfg=3.0, shift=3.0)
    places = distil.walk(model("T2V"), positive, negative, 9, settings)
    made = sample(model("T2V"), positive, negative, torch.zeros(1, 16, 3, 8, 8), settings)
    torch.testing.assert_close(places[:, -1], normalised(made))
    torch.testing.assert_close(places[:, 0], torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(3)))


def test_the_student_comes_nearer_to_the_teacher(text_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "ROWS", 2)
    teacher = model("T2V")
    examples = distil.ways(teacher, text_encoder, 4, tmp_path / "ways.pt")
    assert [tuple(way.shape) for way in examples.places] == 2 * [(5, 16, 5, 8, 8)] + 2 * [(5, 16, 3, 8, 8)]
    file = distil.distil(teacher, examples, tmp_path, steps=30)
    assert {tensor.dtype for name, tensor in load_file(file).items() if "lora" in name} == {torch.float16}
    lora = load_lora(file)
    assert not fit(lora, teacher.module).skipped
    examples.places = examples.places[:2]  # one batch holds videos of one length
    examples.pieces = examples.pieces[:8]
    assert error(teacher.with_lora(lora), examples) < 0.85 * error(teacher, examples)


def test_the_bundled_one_fits_the_bundled_model():
    toy = load_model("WanTiny-T2V", device="cpu")
    changed, report = ApplyLora.execute(toy, distil.NAME, 1.0).args
    lora = changed.loras[0][0]
    assert f"{len(lora.changes)} of {len(lora.changes)} parts fit" in report
    assert lora.metadata["modelspec.title"] == distil.NAME


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", FEW_STEPS)
def test_presets_can_be_sampled_and_are_explained(name):
    row = FEW_STEPS[name]
    levels = Settings(0, **asdict(row) | {"timesteps": read_timesteps(row.timesteps)}).levels()
    assert len(levels) == row.steps + 1 and row.cfg == 1
    page = (ROOT / "docs/few_steps.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if f"| `{name}` |" in line)
    assert [cell.strip().strip("`") for cell in line.split("|")[3:7]] == [
        str(row.steps), f"{row.shift:g}" if not row.timesteps else "", row.timesteps, row.scheduler,
    ]  # fmt: skip


def test_the_node_sets_the_sampler():
    values = FewSteps.execute("FastWan").args
    names = FewSteps.GET_NODE_INFO_V1()["output_name"]
    assert dict(zip(names, values, strict=True)) == asdict(FEW_STEPS["FastWan"])
    inputs = Sampler.GET_NODE_INFO_V1()["input"]
    for name, kind in zip(names, FewSteps.GET_NODE_INFO_V1()["output"], strict=True):
        assert (inputs["required"] | inputs["optional"])[name][0] == kind


def test_an_unknown_preset_is_refused_in_a_sentence():
    with pytest.raises(InputError, match="Choose one of .*FastWan"):
        FewSteps.execute("FastWon")
