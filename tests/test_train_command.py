"""`wanflow train`: its arguments, those from a file, and what happens from the command to the result."""

import csv
import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import fields
from pathlib import Path

import families
import pytest
from comfyui_wanflow.nodes.headless import train_run
from comfyui_wanflow.nodes.headless.cli import main, parser
from comfyui_wanflow.nodes.headless.train_arguments import ARGUMENTS, REQUIRED
from comfyui_wanflow.nodes.headless.train_config import complete
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.loading import load
from comfyui_wanflow.wan_core.loading.lora_files import load_lora
from comfyui_wanflow.wan_core.lora import fit
from comfyui_wanflow.wan_core.offload.options import REST_ON
from comfyui_wanflow.wan_core.training import framing, settings, trainee
from comfyui_wanflow.wan_core.training.settings import Settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_data import SIZE, write_data, write_encoders

ROOT = Path(__file__).resolve().parents[1]
# DiffSynth-Studio's arguments and defaults (wan21.md 1.11), as its scripts would write them.
REFERENCE = {
    "dataset_base_path": REQUIRED, "dataset_metadata_path": None, "max_pixels": 921600, "height": None, "width": None,
    "num_frames": 81, "data_file_keys": "image,video", "dataset_repeat": 1, "model_paths": [],
    "model_id_with_origin_paths": "", "learning_rate": 1e-4, "num_epochs": 1, "output_path": "models",
    "remove_prefix_in_ckpt": "pipe.dit.", "trainable_models": "", "lora_base_model": "",
    "lora_target_modules": "q,k,v,o,ffn.0,ffn.2", "lora_rank": 32, "extra_inputs": "",
    "use_gradient_checkpointing_offload": False, "gradient_accumulation_steps": 1, "save_steps": None,
    "dataset_num_workers": 0, "weight_decay": 0.01, "lora_checkpoint": None, "max_timestep_boundary": 1.0,
    "min_timestep_boundary": 0.0, "find_unused_parameters": False,
}  # fmt: skip


def options(*arguments):
    return complete(parser().parse_args(["train", *arguments]))


class TestArguments:
    def test_the_reference_s_are_there_with_their_defaults(self):
        defaults = {argument.name: argument.default for argument in ARGUMENTS}
        for name, value in REFERENCE.items():
            found = defaults[name]
            assert (",".join(found) if isinstance(value, str) and isinstance(found, list) else found) == (
                Path(value) if name == "output_path" else value
            ), name

    def test_all_that_the_loop_can_be_told(self):
        given, usual = options("--dataset_base_path", "."), Settings()
        assert train_run.settings_of(given) == usual
        names = {train_run.RENAMED.get(field.name, field.name) for field in fields(Settings)}
        assert names <= {argument.name for argument in ARGUMENTS}

    def test_choices_are_the_core_s(self):
        choices = {argument.name: argument.choices for argument in ARGUMENTS if argument.choices}
        core = {**settings.CHOICES, "frame_sampling": framing.SAMPLINGS, "lora_kind": trainee.KINDS, "rest_on": REST_ON}
        assert choices == {name: tuple(known) for name, known in core.items()}

    def test_help_needs_no_torch(self):
        program = (
            "import runpy, sys; runpy.run_path('tests/conftest.py')\n"
            "from comfyui_wanflow.nodes.headless.cli import main\n"
            "try: main(['train', '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith("False")
        for name in REFERENCE:
            assert f"--{name}" in done.stdout

    @pytest.mark.parametrize("wrong", [["--lora_chekpoint", "a"], ["--seed", "x"], ["--frame_sampling", "tail"],
        ["--model_paths", "a.safetensors"], ["--optimizer_options", "[1]"], ["--length_buckets", "a"]])  # fmt: skip
    def test_what_is_none(self, wrong, capsys):
        with pytest.raises(SystemExit):
            main(["train", "--dataset_base_path", ".", *wrong])
        assert wrong[0] in capsys.readouterr().err


class TestConfig:
    def write(self, tmp_path, text, suffix="toml"):
        file = tmp_path / f"config.{suffix}"
        file.write_text(text)
        return str(file)

    def test_the_command_line_goes_before(self, tmp_path):
        config = self.write(tmp_path, """
            seed = 3
            [model]
            dataset_base_path = "clips"
            data_file_keys = ["video", "control_video"]
            model_paths = ["a.safetensors", ["b-1.safetensors", "b-2.safetensors"]]
            length_buckets = [17, 33]
            flip = true
            gradient_checkpointing = false
            learning_rate = 1
            optimizer_options = { eps = 1e-6 }
            local_model_path = "/models"
            [validation_inputs]
            motion_bucket_id = 50
        """)  # fmt: skip
        found = options("--num_epochs", "7", "--config", config, "--seed", "4", "--no-flip")
        assert found.seed == 4 and found.num_epochs == 7 and not found.flip and not found.gradient_checkpointing
        assert found.data_file_keys == ["video", "control_video"] and found.dataset_base_path == Path("clips")
        assert found.model_paths == ["a.safetensors", ["b-1.safetensors", "b-2.safetensors"]]
        assert found.length_buckets == [17, 33] and found.learning_rate == 1.0 and found.models_dir == Path("/models")
        assert found.optimizer_options == {"eps": 1e-6} and found.validation_inputs == {"motion_bucket_id": 50}
        assert found.batch_size == 1 and options("--config", config).flip
        as_json = self.write(tmp_path, json.dumps({"dataset_base_path": "b", "extra_inputs": "input_image"}), "json")
        assert options("--config", as_json).extra_inputs == ["input_image"]

    @pytest.mark.parametrize("text, sentence", [
        ("learning_rat = 1", "there is no argument 'learning_rat' (did you mean 'learning_rate'?)"),
        ("[data]\nwidht = 1", "'widht' (did you mean 'width'?)"), ("seed = 1.5", "seed cannot be 1.5"),
        ("flip = 1", "switch"), ("seed = true", "no switch"), ("optimizer = 'sgd'", "Choose one of adamw"),
        ("seed", "cannot be read"), ("seed = 1", "--dataset_base_path is missing: the folder of clips"),
        ("model_paths = 'a'", "not a JSON list")])  # fmt: skip
    def test_what_is_wrong_is_told(self, tmp_path, capsys, text, sentence):
        assert main(["train", "--config", self.write(tmp_path, text)]) == 1
        assert sentence in capsys.readouterr().err

    def test_no_file(self, tmp_path, capsys):
        assert main(["train", "--config", "gone"]) == 1 and "such as lora/Wan2.1-VACE-14B" in capsys.readouterr().err
        assert main(["train", "--config", "lora/wan2.1-t2v-1.3"]) == 1
        assert "did you mean 'lora/Wan2.1-T2V-1.3B'" in capsys.readouterr().err
        assert main(["train", "--config", self.write(tmp_path, "", "yaml")]) == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small models: those of `families`, and encoders that fit."""
    folder = tmp_path_factory.mktemp("models")
    found = write_encoders(folder)
    for family in ("T2V", "VACE", "speed", "I2V"):
        network = families.model(family).module
        save_file(network.trunk.state_dict() | (network.vace.state_dict() if network.vace else {}),
                  folder / f"{family}.safetensors")  # fmt: skip
        found[family] = folder / f"{family}.safetensors"
    save_file(families.model("speed").module.motion_controller.state_dict(), folder / "controller.safetensors")
    return found | {"controller": folder / "controller.safetensors"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture
def command(files, data, tmp_path, monkeypatch):
    """`command(model, …)`: the arguments of a short training."""
    monkeypatch.chdir(tmp_path)
    for name in ("models_dir", "output_directory", "quiet"):
        monkeypatch.setattr(host, name, getattr(host, name))  # to be put back

    def command(*models, work="train"):
        paths = json.dumps([str(files[name]) for name in (*models, "vae", "text", "image")])
        return [work, "--dataset_base_path", str(data), "--dataset_metadata_path", str(data / "all.json"),
                "--model_paths", paths, "--height", str(SIZE), "--width", str(SIZE), "--num_frames", "5",
                "--output_path", "out", "--lora_rank", "2"]  # fmt: skip

    return command


class TestTraining:
    def test_a_lora_that_goes_on_from_another(self, command, capsys, tmp_path):
        lora = [*command("T2V"), "--lora_base_model", "dit", "--lora_target_modules", "q,ffn.0", "--held_out", "1"]
        assert main(lora) == 0
        printed = capsys.readouterr()
        assert printed.out.split() == ["out/epoch-0.safetensors"] and "1 steps are done" in printed.err
        first = tmp_path / "out" / "epoch-0.safetensors"
        model = families.model("T2V")
        assert len(fit(load_lora(first), model.module).changes) == 6
        with safe_open(first, "pt") as stored:
            assert len(json.loads(stored.metadata()["ss_tag_frequency"])["captions"]) == 1
        assert list(csv.DictReader((tmp_path / "out" / "validation.csv").open()))
        more = ["--lora_checkpoint", str(first), "--output_path", "more", "--learning_rate", "1e-12"]
        assert main([*lora, *more]) == 0
        one, other = (load_file(file) for file in (first, tmp_path / "more" / "epoch-0.safetensors"))
        name = "diffusion_model.blocks.0.self_attn.q.lora_B.weight"
        assert one[name].any() and (one[name] - other[name]).abs().max() < 1e-6
        assert main([*lora, *more, "--lora_rank", "3", "--output_path", "third"]) == 1
        assert "Go on from a LoRA of this model" in capsys.readouterr().err

    def test_a_lora_with_a_whole_part_beside_it(self, command, capsys, tmp_path, files):
        mixed = [*command("speed", "controller"), "--lora_base_model", "dit", "--trainable_models",
                 "motion_controller", "--extra_inputs", "motion_bucket_id", "--sample_steps", "1",
                 "--num_inference_steps", "1", "--validation_prompt", "a red circle"]  # fmt: skip
        assert main(mixed) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.split() == ["out/epoch-0.safetensors"]
        out = tmp_path / "out"
        own, before = load_file(out / "epoch-0.motion_controller.safetensors"), load_file(files["controller"])
        assert own.keys() == before.keys() and any(not own[name].equal(before[name]) for name in own)
        assert load_lora(out / "epoch-0.safetensors").changes
        assert sorted(file.name for file in (out / "samples").iterdir()) == ["step-000001.mp4", "step-000002.mp4"]
        older = out / "step-9.safetensors"  # of an earlier training, and with more steps
        save_file(load_file(out / "epoch-0.safetensors"), older, {"steps": "9"})
        os.utime(older, (0, 0))
        assert main(["validate", *mixed[1:], "--cfg_scale", "1"]) == 0, capsys.readouterr().err
        assert (out / "validation" / "epoch-0.mp4").is_file()

    def test_a_model_by_its_name(self, command, tmp_path, capsys):
        tiny = command()
        del tiny[tiny.index("--model_paths") : tiny.index("--model_paths") + 2]
        small = ["--lora_target_modules", "blocks.0.self_attn.q", "--max_train_steps", "1", "--num_frames", "1"]
        dtype = ["--weight_dtype", "fp8_e4m3fn"]
        assert main([*tiny, *small, *dtype, "--model", "WanTiny-T2V", "--lora_base_model", "dit"]) == 0
        assert len(load_lora(tmp_path / "out" / "step-1.safetensors").changes) == 1
        assert main([*tiny, "--model", "WanTiny", "--lora_base_model", "dit"]) == 1
        assert "did you mean 'WanTiny-T2V'" in capsys.readouterr().err

    def test_two_processes_are_one_with_twice_the_batches(self, command, tmp_path, monkeypatch, capfd):
        """Really started; the first prepares the data and tells, the second finds all of it."""
        (tmp_path / "python").mkdir()
        (tmp_path / "python" / "comfyui_wanflow").symlink_to(ROOT)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        start = [*command("T2V"), "--lora_base_model", "dit", "--lora_target_modules", "q", "--dataset_repeat", "2"]
        assert main([*start, "--processes", "2"]) == 0
        printed = capfd.readouterr()
        assert printed.out.split() == ["out/epoch-0.safetensors"] and printed.err.count("Clips: 2") == 1
        assert main([*start, "--gradient_accumulation_steps", "2", "--output_path", "alone"]) == 0
        one, other = (load_file(tmp_path / name / "epoch-0.safetensors") for name in ("out", "alone"))
        for name, value in one.items():
            assert (value - other[name]).abs().max() <= 1e-5, name

    def test_a_model_that_does_not_look_is_told(self, command, files, capsys):
        blind = [*command("I2V"), "--lora_base_model", "dit", "--extra_inputs", "input_image", "--max_train_steps", "1"]
        blind[blind.index("--model_paths") + 1] = json.dumps([str(files[name]) for name in ("I2V", "vae", "text")])
        assert main(blind) == 0
        assert "does not look at input_image" in capsys.readouterr().err

    def test_whole_parts_are_loaded_as_published(self, command, tmp_path):
        vace = ["--trainable_models", "dit,vace", "--extra_inputs", "vace_video,vace_video_mask"]
        assert main([*command("VACE"), *vace]) == 0
        model = load.load_model(tmp_path / "out" / "epoch-0.safetensors", device="cpu")
        assert model.module.vace is not None

    def test_encoders_leave_memory(self, command, monkeypatch):
        """When the training begins nothing holds them any more, and started again it does not ask them."""
        alive, run_loop = [], train_run.run_loop

        def kept(loader):
            def loading(*arguments, **options):
                engine = loader(*arguments, **options)
                alive.append(weakref.ref(engine.module))
                return engine

            return loading

        def loop(*arguments, **options):
            gc.collect()
            assert len(alive) == 3 and not [reference for reference in alive if reference() is not None]
            alive.clear()
            return run_loop(*arguments, **options)

        for name in ("load_vae", "load_text_encoder", "load_image_encoder"):
            monkeypatch.setattr(load, name, kept(getattr(load, name)))
        monkeypatch.setattr(train_run, "run_loop", loop)
        start = [*command("I2V"), "--lora_base_model", "dit", "--extra_inputs", "input_image"]
        assert main(start) == 0
        for engine in (train_run.Encoders, load.WanVAE, load.WanTextEncoder, load.WanImageEncoder):
            for method in ("encode", "latents", "text", "condition"):
                if hasattr(engine, method):
                    monkeypatch.setattr(engine, method, None)
        assert main([*start, "--num_epochs", "2"]) == 0

    @pytest.mark.parametrize("more, sentence", [
        ([], "lora_base_model dit for a LoRA"),
        (["--lora_base_model", "vace"], "has no VACE module to train"),
        (["--trainable_models", "text_encoder"], "'text_encoder' cannot be trained"),
        (["--trainable_models", "dit", "--lora_base_model", "dit"], "whole and with a LoRA at once"),
        (["--lora_base_model", "dit", "--extra_inputs", "control_video"], "takes no control video"),
        (["--lora_base_model", "dit", "--extra_inputs", "control"], "no extra input 'control'"),
        (["--lora_base_model", "dit", "--held_out", "2"], "held_out is 2"),
        (["--lora_base_model", "dit", "--sample_steps", "1", "--validation_inputs", '{"motion_bucket_id": 1}'],
         "motion_bucket_id, which extra_inputs does not name"),
        (["--lora_base_model", "dit", "--num_frames", "8"], "no latent"),
        (["--lora_base_model", "dit", "--model_paths", "[]"], "No diffusion model is among the models"),
        (["--lora_base_model", "dit", "--max_train_steps", "0"], "max_train_steps is 0"),
    ])  # fmt: skip
    def test_what_is_wrong_is_told(self, command, capsys, more, sentence, tmp_path):
        assert main([*command("T2V"), *more]) == 1
        assert sentence in capsys.readouterr().err and not list(tmp_path.glob("out/*.safetensors"))
