"""The training loop: optimizers, rates, levels, resuming, averages, logs, and several processes."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.errors import InputError, MemoryShortage, ModelError
from comfyui_wanflow.wan_core.loading.catalog import Preset
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.training.examples import Example
from comfyui_wanflow.wan_core.training.flow import training_levels
from comfyui_wanflow.wan_core.training.logs import read_losses
from comfyui_wanflow.wan_core.training.loop import Settings, train
from comfyui_wanflow.wan_core.training.objective import Objective
from comfyui_wanflow.wan_core.training.optimizers import OPTIMIZERS
from comfyui_wanflow.wan_core.training.order import epoch_steps, share, steps_from
from comfyui_wanflow.wan_core.training.team import Team
from comfyui_wanflow.wan_core.training.trainee import new_lora, whole
from comfyui_wanflow.wan_core.training.validation import validation_losses
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def small_model(seed=0, **layout):
    """A transformer of two blocks with random weights."""
    torch.manual_seed(seed)
    layout = DiTLayout(**{"dim": 128, "ffn_dim": 64, "layers": 2, "heads": 1, "text_dim": 16, **layout})
    trunk = DiT(layout).requires_grad_(False)
    torch.nn.init.normal_(trunk.head.head.weight, std=0.05)
    network = Network(trunk)
    return WanModel(
        module=network, name="small", device=CPU, compute_dtype=torch.float32, residency=Residency(trunk),
        layout=layout, preset=Preset(),
    )  # fmt: skip


class Clips(list):
    """Examples in memory; of two shapes."""

    def __init__(self, count=5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for number in range(count):
            latents = 2 + torch.randn(1, 16, 1 + number % 2, 4, 4, generator=generator)
            super().append(Example(latents, torch.randn(1, 3, 16, generator=generator)))
        self.facts = [count, seed]

    @property
    def groups(self):
        return [tuple(example.latents.shape) for example in self]

    def batch(self, indices, generators):
        assert len(indices) == len(generators)
        latents, text = (torch.cat([getattr(self[i], name) for i in indices]) for name in ("latents", "text"))
        return Example(latents, text)


def lora(model=None):
    return new_lora(model or small_model(), rank=2)


def parts(trainee):
    return {name: parameter.detach().clone() for name, parameter in trainee.parameters.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def fixed_loss(trainee):
    """On the clips that are trained on, always at the same levels."""
    with trainee.model.attached() as network:
        return sum(validation_losses(Objective(network, trainee.model, Settings()), Clips()).values())


class Stopped(Exception):
    pass


def stop_at(step):
    def on_step(done, total, loss):
        if done == step:
            raise Stopped

    return on_step


class TestSettings:
    @pytest.mark.parametrize("wrong, said", [
        ({"batch_size": 0}, "batch_size"), ({"max_train_steps": 0}, "max_train_steps"),
        ({"learning_rate": 0}, "0.0001"), ({"optimizer": "sgd"}, "adamw8bit"),
        ({"lr_scheduler": "step"}, "cosine"), ({"warmup_steps": -1}, "negative"),
        ({"timestep_sampling": "sd3"}, "logit_normal"), ({"ema_decay": 1.0}, "0.999"), ({"shift": 0}, "above 0"),
        ({"optimizer": "schedule_free", "lr_scheduler": "cosine"}, "constant"),
        ({"optimizer": "prodigy", "lora_plus_ratio": 16}, "one rate"), ({"min_timestep_boundary": 1.0}, "none"),
        ({"gradient_checkpointing": False, "offload_activations": True}, "both"),
    ])  # fmt: skip
    def test_what_cannot_work_is_refused_in_a_sentence(self, wrong, said):
        with pytest.raises(InputError, match=said):
            Settings(**wrong)


class TestRates:
    def test_the_rate_rises_and_then_stays(self):
        settings = Settings(learning_rate=0.4, warmup_steps=3)
        assert [settings.rate(step, 9) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
        assert Settings().rate(0, 9) == Settings().learning_rate  # not a third of it, as the reference has it

    def test_linear_and_cosine_fall_to_the_end(self):
        linear = Settings(learning_rate=1.0, lr_scheduler="linear", warmup_steps=1)
        assert [linear.rate(step, 5) for step in range(5)] == pytest.approx([0.5, 1, 0.75, 0.5, 0.25])
        cosine = Settings(learning_rate=1.0, lr_scheduler="cosine")
        assert [cosine.rate(step, 4) for step in range(4)] == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
        twice = Settings(learning_rate=1.0, lr_scheduler="linear", lr_cycles=2)
        assert [twice.rate(step, 8) for step in range(8)] == pytest.approx([1, 0.75, 0.5, 0.25] * 2)

    def test_a_run_uses_them(self, tmp_path):
        settings = Settings(lr_scheduler="cosine", warmup_steps=2, num_epochs=2)
        train(lora(), Clips(), settings, tmp_path)
        with (tmp_path / "losses.csv").open() as file:
            rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
        assert rates == pytest.approx([settings.rate(step, 10) for step in range(10)])


class TestLevels:
    def test_shifted_uniform_and_logit_normal(self):
        uniform = training_levels(Settings(timestep_sampling="uniform", timestep_weighting="none"))
        assert uniform.sigmas.mean() == pytest.approx(0.5, abs=1e-3) and (uniform.weights == 1).all()
        shifted = training_levels(Settings())
        assert shifted.sigmas.median() == pytest.approx(5 / 6, abs=1e-2) and shifted.weights.mean() == pytest.approx(1)
        middle = training_levels(Settings(timestep_sampling="logit_normal", logit_std=0.5))
        logits = torch.logit(middle.sigmas.double())
        assert logits.mean() == pytest.approx(0, abs=1e-3) and logits.std() == pytest.approx(0.5, rel=0.01)
        assert middle.weights.mean() == pytest.approx(1)

    @pytest.mark.parametrize("sampling", ["shifted", "uniform", "logit_normal"])
    def test_the_boundaries_are_shares_of_the_draws(self, sampling):
        every = training_levels(Settings(timestep_sampling=sampling)).sigmas
        cleaner = training_levels(Settings(timestep_sampling=sampling, min_timestep_boundary=0.5))
        assert len(cleaner.sigmas) == 500 and torch.equal(cleaner.sigmas, every[500:])


class TestOrder:
    def test_processes_share_a_step_and_its_mean(self):
        groups = [(i % 3,) for i in range(11)]
        settings = Settings(batch_size=2, gradient_accumulation_steps=2, repeat=2)
        for batches in epoch_steps(groups, settings, 0, processes=3):
            shares = [list(share(batches, (0, 5), rank, 3)) for rank in range(3)]
            assert len({len(one) for one in shares}) == 1  # all make as many calls
            rows = sum(map(len, batches))
            done = [entry for one in shares for entry in one if entry[2]]
            assert sorted(map(tuple, (batch for batch, _, _ in done))) == sorted(map(tuple, batches))
            for batch, generators, weight in done:
                assert weight / 3 == pytest.approx(len(batch) / rows) and len(generators) == len(batch)
            seeds = [g.initial_seed() for _, generators, _ in done for g in generators]
            assert len(set(seeds)) == rows

    def test_resuming_takes_up_the_order_where_it_was(self):
        settings, groups = Settings(num_epochs=3), [0] * 4
        every = list(steps_from(0, 10, groups, settings))
        assert [number for number, _ in every] == list(range(10))
        assert list(steps_from(5, 10, groups, settings)) == every[5:]


class TestMethods:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_each_optimizer_learns_and_goes_on_exactly_after_a_stop(self, optimizer, tmp_path):
        pytest.importorskip(OPTIMIZERS[optimizer].module.partition(".")[0])
        rate = {"prodigy": 1.0}.get(optimizer, 1e-2)
        options = {"adamw8bit": {"min_8bit_size": 64}, "prodigy": {"d0": 1e-3}}.get(optimizer, {})
        settings = Settings(
            optimizer=optimizer, learning_rate=rate, num_epochs=4, optimizer_options=options, batch_size=3
        )
        straight = whole(small_model())
        before = fixed_loss(straight)
        losses = train(straight, Clips(), settings, tmp_path / "straight")
        assert fixed_loss(straight) < 0.97 * before
        with pytest.raises(Stopped):
            train(whole(small_model()), Clips(), settings, tmp_path / "stopped", stop_at(5))
        again = whole(small_model())
        assert train(again, Clips(), settings, tmp_path / "stopped") == losses
        assert_equal(parts(straight), parts(again))
        result = [load_file(tmp_path / where / "epoch-3.safetensors") for where in ("straight", "stopped")]
        assert_equal(*result)

    def test_a_missing_library_and_a_wrong_option_are_told(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "prodigyopt", None)
        with pytest.raises(InputError, match="pip install prodigyopt"):
            train(lora(), Clips(), Settings(optimizer="prodigy"), tmp_path)
        with pytest.raises(InputError, match="optimizer_options"):
            train(lora(), Clips(), Settings(optimizer_options={"momentum": 1}), tmp_path)

    def test_lora_plus_lets_the_second_factor_learn_faster(self, tmp_path):
        """AdamW's first step is as long as the rate, whatever the gradient."""
        settings = Settings(learning_rate=1e-3, lora_plus_ratio=16, max_train_steps=1, weight_decay=0)
        trainee = lora()
        train(trainee, Clips(), settings, tmp_path)
        up = [p.abs().max().item() for name, p in trainee.parameters.items() if name.endswith(".up")]
        assert max(up) == pytest.approx(16e-3, rel=1e-3)

    def test_gradients_are_cut(self, tmp_path):
        def lengths(longest):
            settings = Settings(max_grad_norm=longest, optimizer="adafactor", optimizer_options={"clip_threshold": 1e9})
            train(lora(), Clips(), settings, tmp_path / str(longest))
            with (tmp_path / str(longest) / "losses.csv").open() as file:
                return [float(row["gradient_norm"]) for row in csv.DictReader(file)]

        pytest.importorskip("transformers")
        assert lengths(0)[0] == lengths(1e-4)[0] > 1e-4  # told as it was
        parameter = torch.nn.Parameter(torch.ones(4))
        parameter.grad = torch.full((4,), 10.0)
        assert Team().gather({"a": parameter}, 1.0) == pytest.approx(20)
        assert torch.allclose(parameter.grad, torch.full((4,), 0.5))

    def test_accumulated_batches_are_one_large_batch(self, tmp_path):
        clips = Clips(6)
        clips[:] = [clip for clip in clips if clip.latents.shape[2] == 1] * 2
        trainees = lora(), lora()
        options = {"num_epochs": 2, "learning_rate": 1e-3}
        train(trainees[0], clips, Settings(batch_size=3, **options), tmp_path / "large")
        train(trainees[1], clips, Settings(gradient_accumulation_steps=3, **options), tmp_path / "small")
        for one, other in zip(*(trainee.parameters.values() for trainee in trainees), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    def test_the_average_is_what_is_saved(self, tmp_path):
        trainee = whole(small_model())
        options = {"learning_rate": 1e-3, "num_epochs": 2}
        train(trainee, Clips(), Settings(ema_decay=0.9, **options), tmp_path / "average")
        plain = whole(small_model())
        train(plain, Clips(), Settings(**options), tmp_path / "last")
        name = "blocks.0.ffn.0.weight"
        average, last = (load_file(tmp_path / kind / "epoch-1.safetensors")[name] for kind in ("average", "last"))
        assert torch.equal(trainee.parameters[name], average) and not torch.equal(average, last)

        trained = whole(small_model())
        seen = [trained.parameters[name].detach().clone()]
        watched = lambda done, total, loss: seen.append(trained.parameters[name].detach().clone())  # noqa: E731
        train(trained, Clips(), Settings(**options), tmp_path / "watched", watched)
        expected = seen[0]
        for step, value in enumerate(seen[1:], start=1):
            expected = torch.lerp(expected, value, 1 - min(0.9, (1 + step) / (10 + step)))
        torch.testing.assert_close(average, expected)

    def test_checkpointing_and_offloading_change_nothing(self, tmp_path):
        options = [{}, {"gradient_checkpointing": False}, {"offload_activations": True}]
        runs = [train(lora(), Clips(), Settings(**more), tmp_path / str(i)) for i, more in enumerate(options)]
        assert runs[0] == runs[1] == runs[2]

    def test_it_ends_after_so_many_steps(self, tmp_path):
        assert len(train(lora(), Clips(), Settings(num_epochs=9, max_train_steps=7), tmp_path)) == 7
        assert {file.name for file in tmp_path.glob("*.safetensors")} == {"epoch-0.safetensors", "step-7.safetensors"}


class TestFailures:
    def test_a_step_that_runs_out_of_memory_leaves_all_before_it_saved(self, tmp_path, monkeypatch):
        settings = Settings(num_epochs=2)
        straight = train(lora(), Clips(), settings, tmp_path / "straight")
        trainee, clips = lora(), Clips()
        batch, left = Clips.batch, 3

        def fail(self, indices, generators):
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return batch(self, indices, generators)

        monkeypatch.setattr(Clips, "batch", fail)
        with pytest.raises(MemoryShortage, match="in step 4.*all steps|in step 4.*All steps"):
            train(trainee, clips, settings, tmp_path / "stopped")
        assert (tmp_path / "stopped" / "step-3.safetensors").is_file()
        monkeypatch.setattr(Clips, "batch", batch)
        assert train(lora(), clips, settings, tmp_path / "stopped") == straight

    def test_a_loss_that_is_no_number_stops(self, tmp_path):
        clips = Clips()
        clips[2].latents.fill_(float("nan"))
        with pytest.raises(ModelError, match="lower learning_rate"):
            train(lora(), clips, Settings(num_epochs=2), tmp_path)

    def test_so_does_a_gradient_before_it_spoils_the_parameters(self, tmp_path):
        trainee, step = lora(), 0

        def spoil(gradient):
            nonlocal step
            step += 1
            return gradient * float("inf") if step == 3 else gradient

        factors = trainee.parameters
        next(iter(factors.values())).register_hook(spoil)
        with pytest.raises(ModelError, match="step 3 the gradient was"):
            train(trainee, Clips(), Settings(num_epochs=2), tmp_path)
        assert all(factor.isfinite().all() for factor in factors.values())
        assert len(read_losses(tmp_path)) == 2 and (tmp_path / "step-2.safetensors").is_file()


class TestLogs:
    def test_a_resumed_table_has_each_step_once(self, tmp_path):
        settings = Settings(num_epochs=2, save_steps=3)

        with pytest.raises(Stopped):
            train(lora(), Clips(), settings, tmp_path, stop_at(5))
        with (tmp_path / "losses.csv").open("a") as file:
            file.write("6,1,0.5,0.1,1.0,0.1\n7,1,0.")  # beyond the checkpoint, and torn
        (tmp_path / ".losses.part.csv").write_text("of a process that was killed")
        losses = train(lora(), Clips(), settings, tmp_path)
        with (tmp_path / "losses.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == list(range(1, 11))
        assert [int(row["epoch"]) for row in rows] == [0] * 5 + [1] * 5
        assert read_losses(tmp_path) == losses

    def test_tensorboard_has_the_same_numbers(self, tmp_path):
        pytest.importorskip("tensorboard")
        losses = train(lora(), Clips(), Settings(tensorboard=True), tmp_path, held_out=Clips(2, seed=9))
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses)
        assert len(board.Scalars("validation/0.2-0.4")) == 1

    def test_without_tensorboard_there_is_a_sentence(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(InputError, match="pip install tensorboard"):
            train(lora(), Clips(), Settings(tensorboard=True), tmp_path)


class TestValidation:
    def test_equal_draws_each_time_and_no_effect_on_the_training(self, tmp_path):
        held_out, settings = Clips(2, seed=9), Settings(num_epochs=2, validation_steps=2, learning_rate=1e-3)
        watched, alone = lora(), lora()
        losses = train(watched, Clips(), settings, tmp_path / "watched", held_out=held_out)
        assert losses == train(alone, Clips(), settings, tmp_path / "alone")
        assert_equal(parts(watched), parts(alone))
        with (tmp_path / "watched" / "validation.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows[::5]] == [2, 4, 5, 6, 8, 10] and len(rows) == 30
        assert (rows[0]["low"], rows[0]["high"], rows[4]["high"]) == ("0.0", "0.2", "1.0")
        still = Settings(learning_rate=1e-12, validation_steps=2)
        train(lora(), Clips(), still, tmp_path / "frozen", held_out=held_out)
        with (tmp_path / "frozen" / "validation.csv").open() as file:
            rows = [float(row["loss"]) for row in csv.DictReader(file)]
        assert rows[:5] == pytest.approx(rows[5:10])

    def test_samples_that_fail_end_the_training_saved(self, tmp_path):
        settings = Settings(num_epochs=2, ema_decay=0.9, learning_rate=1e-2, sample_steps=4)
        losses = train(lora(), Clips(), settings, tmp_path / "straight")

        def stop(model, step):
            raise Stopped

        with pytest.raises(Stopped):
            train(lora(), Clips(), settings, tmp_path / "stopped", on_sample=stop)
        assert (tmp_path / "stopped" / "step-4.safetensors").is_file()
        assert train(lora(), Clips(), settings, tmp_path / "stopped") == losses

    def test_samples_are_made_with_the_model_as_it_would_be_saved(self, tmp_path):
        trainee, seen = lora(), {}

        def on_sample(model, step):
            assert model is trainee.model and not torch.is_grad_enabled()
            seen[step] = parts(trainee)

        settings = Settings(num_epochs=2, sample_steps=4, ema_decay=0.9, learning_rate=1e-2)
        train(trainee, Clips(), settings, tmp_path, on_sample=on_sample)
        assert list(seen) == [4, 5, 8, 10]
        assert_equal(seen[10], parts(trainee))
        saved = load_file(tmp_path / "epoch-1.safetensors")
        name = "blocks.0.self_attn.q"
        assert torch.equal(seen[10][f"{name}.weight.up"], saved[f"diffusion_model.{name}.lora_B.weight"])


KILL = """
import os, runpy, signal, sys
runpy.run_path("tests/conftest.py")
sys.path.insert(0, "tests")
import test_training_loop as t
import torch
kind, folder, moment = sys.argv[1], t.Path(sys.argv[2]), int(sys.argv[3])
calls, save = 0, torch.save
def torn(state, file, *rest, **more):
    global calls
    calls += 1
    if calls == moment:  # half a checkpoint is on the disk when the process dies
        save(state, file)
        with open(file, "r+b") as stream:
            stream.truncate(os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file, *rest, **more)
def die(done, total, loss):
    if done == moment:
        os.kill(os.getpid(), signal.SIGKILL)
if kind == "writing":
    torch.save = torn
t.train(t.lora(), t.Clips(), t.KILLED, folder, die if kind == "step" else None)
"""
KILLED = Settings(
    learning_rate=1e-3, num_epochs=2, warmup_steps=3, lr_scheduler="cosine", ema_decay=0.9, save_steps=2, batch_size=2
)


def run_python(program, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment},
        capture_output=True,
        text=True,
    )


class TestKilled:
    @pytest.mark.parametrize("kind, moment", [("step", 1), ("step", 4), ("writing", 1), ("writing", 3)])
    def test_at_any_moment_the_curve_goes_on_bit_for_bit(self, kind, moment, tmp_path):
        whole_run = lora()
        losses = train(whole_run, Clips(), KILLED, tmp_path / "straight")
        done = run_python(KILL, kind, tmp_path / "killed", moment)
        assert done.returncode == -signal.SIGKILL, done.stderr
        again = lora()
        assert train(again, Clips(), KILLED, tmp_path / "killed") == losses == read_losses(tmp_path / "killed")
        assert_equal(parts(whole_run), parts(again))
        assert_equal(*(load_file(tmp_path / name / "epoch-1.safetensors") for name in ("straight", "killed")))
        assert not list((tmp_path / "killed").glob(".*"))  # the torn file was replaced


class TestRecipe:
    def test_what_changes_no_step_may_change(self, tmp_path):
        train(lora(), Clips(), Settings(), tmp_path)
        longer = Settings(num_epochs=2, save_steps=1, gradient_checkpointing=False, validation_steps=3)
        assert len(train(lora(), Clips(), longer, tmp_path)) == 10
        for other in ({"ema_decay": 0.9}, {"optimizer_options": {"eps": 1e-6}}, {"timestep_sampling": "uniform"}):
            with pytest.raises(InputError, match="other settings"):
                train(lora(), Clips(), Settings(num_epochs=2, **other), tmp_path)

    def test_a_falling_rate_depends_on_the_length(self, tmp_path):
        train(lora(), Clips(), Settings(lr_scheduler="linear"), tmp_path)
        with pytest.raises(InputError, match="other settings"):
            train(lora(), Clips(), Settings(lr_scheduler="linear", num_epochs=2), tmp_path)

    def test_the_settings_are_in_the_file(self, tmp_path):
        from safetensors import safe_open

        settings = Settings(max_train_steps=1, optimizer_options={"eps": 1e-6})
        train(lora(), Clips(), settings, tmp_path)
        with safe_open(tmp_path / "step-1.safetensors", "pt") as file:
            told = json.loads(file.metadata()["training"])
        assert told == {name: value for name, value in asdict(settings).items() if value is not None}
