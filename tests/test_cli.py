"""The `wanflow` command as a user meets it: what it prints where, and its exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import comfyui_wanflow.nodes as pack
import fake_nodes
import pytest
from comfyui_wanflow.nodes.headless import workflows
from comfyui_wanflow.nodes.headless.cli import main
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory with the fake pack and its workflow.json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pack, "node_classes", lambda: fake_nodes.NODES)
    for name, value in {"models_dir": "models", "input_directory": "input", "output_directory": "output"}.items():
        monkeypatch.setattr(host, name, tmp_path / value)
    monkeypatch.setattr(host, "quiet", False)
    handler = signal.getsignal(signal.SIGINT)
    (tmp_path / "workflow.json").write_text(json.dumps(fake_nodes.workflow()))
    yield tmp_path
    signal.signal(signal.SIGINT, handler)


class TestRun:
    def test_prints_the_files_and_nothing_else_on_stdout(self, folder, capsys):
        assert main(["run", "workflow.json"]) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines() == [
            str(folder / "output/fake/picture_00001_.png"), str(folder / "output/mode_00001_.txt")]
        assert "Fake Sampler" in printed.err and "2/2" in printed.err

    def test_quiet(self, capsys):
        assert main(["run", "workflow", "--quiet"]) == 0
        assert capsys.readouterr().err == ""

    def test_folders(self, folder, capsys):
        for name in ("weights", "pictures"):
            (folder / name).mkdir()
        arguments = ["--output-dir", "elsewhere", "--models-dir", "weights", "--input-dir", "pictures"]
        assert main(["run", "workflow.json", *arguments]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "elsewhere/mode_00001_.txt"
        assert (folder / "elsewhere/mode_00001_.txt").is_file()
        assert (host.models_dir, host.input_directory) == (Path("weights"), Path("pictures"))

    @pytest.mark.parametrize("name", ["2", "The Sampler", "FakeSampler"])
    def test_set(self, name, capsys, monkeypatch):
        seen = {}

        def execute(cls, **inputs):
            seen.update(inputs)
            raise InputError("Enough.")

        monkeypatch.setattr(fake_nodes.FakeSampler, "execute", classmethod(execute))
        main(["run", "workflow.json", "--set", f"{name}.seed=99", "--set", f"{name}.merge=yes", "--set", "2.cfg=1e-1"])
        assert (seen["seed"], seen["merge"], seen["cfg"]) == (99, True, 0.1)

    def test_set_keeps_text_as_it_is_written(self, folder):
        assert main(["run", "workflow.json", "--set", 'FakeSave.text=["a", 0] = 1e3']) == 0
        assert (folder / "output/mode_00001_.txt").read_text() == '["a", 0] = 1e3'

    def test_set_a_link(self, folder):
        workflow = fake_nodes.workflow()
        workflow["6"] = {**workflow["2"], "inputs": {**workflow["2"]["inputs"], "steps": 13}, "_meta": {}}
        (folder / "workflow.json").write_text(json.dumps(workflow))
        assert main(["run", "workflow.json"]) == 0
        assert main(["run", "workflow.json", "--set", '3.latent=["6", 0]']) == 1

    @pytest.mark.parametrize("setting, expected", [
        ("seed=1", "write NODE.INPUT=VALUE"),
        ("2.seed", "write NODE.INPUT=VALUE"),
        ("8.seed=1", "'8' is no node. There are 1 (FakeModel), 2 (FakeSampler)"),
        ("2.sed=1", "no input 'sed' (did you mean 'seed'?)"),
        ("2.seed=-1", "'seed' is -1; it takes INT from 0"),
        ("2.seed=1.5", "'seed' is '1.5', which is no INT"),
        ("2.merge=maybe", "'maybe' is neither true nor false"),
        ("1.model=big", "'model' is 'big'; it takes one of: tiny, large"),
        ("2.model=tiny", "it takes a link to WAN_MODEL"),
    ])
    def test_a_setting_that_does_not_fit(self, setting, expected, capsys):
        assert main(["run", "workflow.json", "--set", setting]) == 2
        assert expected in capsys.readouterr().err

    def test_all_wrong_settings_are_named(self, capsys):
        assert main(["run", "workflow.json", "--set", "seed=1", "--set", "9.a=1"]) == 2
        assert capsys.readouterr().err.count("--set") == 2

    def test_a_name_of_two_nodes_is_ambiguous(self, folder, capsys):
        workflow = fake_nodes.workflow()
        workflow["6"] = workflow["2"]
        (folder / "workflow.json").write_text(json.dumps(workflow))
        assert main(["run", "workflow.json", "--set", "FakeSampler.seed=1"]) == 2
        assert "the nodes 2 and 6; use an id" in capsys.readouterr().err

    def test_an_invalid_workflow_is_2_with_every_mistake(self, folder, capsys):
        workflow = fake_nodes.workflow(seed=-1, steps=0)
        (folder / "workflow.json").write_text(json.dumps(workflow))
        assert main(["run", "workflow.json"]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n  - ") == 2

    @pytest.mark.parametrize("text, expected", [
        ("{", "is not JSON"), ("\xff", "is not JSON"), ("[]", "not a list"), ('{"nodes": []}', "Export (API)")])
    def test_a_file_that_is_no_workflow_is_2(self, folder, capsys, text, expected):
        (folder / "workflow.json").write_bytes(text.encode("latin1"))
        assert main(["run", "workflow.json"]) == 2
        assert expected in capsys.readouterr().err

    def test_a_user_s_mistake_is_1_and_one_sentence(self, capsys):
        assert main(["run", "workflow.json", "--set", "2.steps=13", "--quiet"]) == 1
        printed = capsys.readouterr()
        assert printed.err == "Fake Sampler (node 2): 13 steps bring bad luck. Use 12 or 14.\n"

    def test_our_mistake_is_1_and_a_traceback(self, capsys):
        assert main(["run", "workflow.json", "--set", "2.steps=66"]) == 1
        error = capsys.readouterr().err
        assert "Traceback" in error and "fake_nodes.py" in error and "a mistake in the code" in error

    @pytest.mark.parametrize("output", ["taken", "taken/below"])
    def test_an_output_folder_that_cannot_be_made_is_1_before_anything_runs(self, folder, output, capsys):
        (folder / "taken").touch()
        assert main(["run", "workflow.json", "--output-dir", output]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "taken is not a folder. Name another --output-dir." in error

    def test_an_output_folder_that_cannot_be_written_is_1_before_anything_runs(self, folder, capsys, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # the tests may run as root
        assert main(["run", "workflow.json"]) == 1
        assert f"{folder} cannot be written. Name another --output-dir." in capsys.readouterr().err
        assert not (folder / "output").exists()

    @pytest.mark.parametrize("option", ["--models-dir", "--input-dir"])
    def test_a_folder_to_read_that_is_not_there_is_2(self, option, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(["run", "workflow.json", option, "nowhere"])
        assert "there is no folder nowhere" in capsys.readouterr().err


class TestNames:
    def test_a_workflow_is_found_here_first_then_in_the_package(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(workflows, "PACKAGE", tmp_path / "package")
        installed = tmp_path / "package" / "example_workflows" / "api" / "quick.json"
        installed.parent.mkdir(parents=True)
        installed.write_text("{}")
        for name in ("quick", "quick.json", "example_workflows/api/quick.json", "example_workflows/api/quick"):
            assert workflows.find_workflow(name) == installed
        (folder / "quick.json").write_text("{}")
        assert workflows.find_workflow("quick") == Path("quick.json")

    def test_an_unknown_name_lists_those_there_are(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(workflows, "PACKAGE", tmp_path)
        (tmp_path / "example_workflows" / "api").mkdir(parents=True)
        (tmp_path / "example_workflows" / "api" / "quickstart.json").write_text("{}")
        assert main(["run", "quikstart"]) == 2
        assert "did you mean 'quickstart'?" in capsys.readouterr().err


class TestNodes:
    def test_lists_ours_and_the_stand_ins(self, capsys):
        assert main(["nodes"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "FakeSampler               Fake Sampler" in lines
        assert any(line.startswith("LoadImageMask ") for line in lines)

    def test_shows_one(self, capsys):
        assert main(["nodes", "FakeSampler"]) == 0
        printed = capsys.readouterr().out
        assert "seed: INT from 0 to 18446744073709551615, default 0. Where the noise begins." in printed
        assert "latent: LATENT, optional" in printed and "-> latent: LATENT" in printed

    def test_an_unknown_one_is_1(self, capsys):
        assert main(["nodes", "FakeSampla"]) == 1
        assert "did you mean 'FakeSampler'?" in capsys.readouterr().err


class TestInspect:
    def test_a_missing_file_is_1(self, capsys):
        assert main(["inspect", "none.safetensors"]) == 1
        assert "none.safetensors" in capsys.readouterr().err


def python(code, folder, **options):
    """A fresh interpreter in which this checkout is `comfyui_wanflow`; -c code."""
    prelude = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest\n"
    return subprocess.Popen([sys.executable, "-c", prelude + code], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


class TestModels:
    def test_says_what_is_here_and_what_is_missing(self, folder, capsys):
        for name in ("vae/Wan2.1_VAE.pth", "text_encoders/models_t5_umt5-xxl-enc-bf16.pth"):
            (folder / "models" / name).parent.mkdir(parents=True)
            (folder / "models" / name).touch()
        assert main(["models"]) == 0
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert len(lines) == 28
        assert lines["Wan2.1-T2V-14B"] == "missing: dit, tokenizer"
        assert lines["Wan2.1-I2V-14B-480P"] == "missing: dit, tokenizer, image encoder"
        assert all(lines[name].startswith("here, ") for name in lines if name.startswith("WanTiny-"))

    def test_shows_the_files_of_one(self, folder, capsys):
        (folder / "models/Wan-AI/Wan2.1-T2V-14B").mkdir(parents=True)
        (folder / "models/Wan-AI/Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors").touch()
        assert main(["models", "Wan2.1-T2V-14B"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].endswith("Wan-AI/Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors (0 bytes)")
        assert "vae: missing, Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth (about 508 MB)" in lines

    @pytest.mark.parametrize("command", ["models", "download"])
    def test_an_unknown_one_is_1(self, command, capsys):
        assert main([command, "Wan2.1-T2V-13B"]) == 1
        assert "did you mean 'Wan2.1-T2V-1.3B'?" in capsys.readouterr().err

    def test_offline_is_1(self, capsys, monkeypatch):
        monkeypatch.setenv("WANFLOW_OFFLINE", "1")
        assert main(["download", "Wan2.1-T2V-14B"]) == 1
        assert "forbids downloads" in capsys.readouterr().err


def test_help_is_there_at_once_and_without_torch(folder):
    code = """
from comfyui_wanflow.nodes.headless.cli import main
try:
    main(["run", "--help"])
finally:
    print("heavy:", {"torch", "numpy", "PIL"} & set(sys.modules))
"""
    start = time.monotonic()
    out, _ = python(code, folder).communicate(timeout=60)
    assert "--output-dir" in out and "heavy: set()" in out
    assert time.monotonic() - start < 5  # about 0.2 s on an idle machine


SLOW = """
import time, fake_nodes, comfyui_wanflow.nodes as pack
from comfyui_wanflow.nodes.headless.cli import main
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from safetensors.torch import save_file
pack.node_classes = lambda: fake_nodes.NODES
progress = host.progress
def slow(total, node_id=None):
    bar = progress(total, node_id)
    update = bar.update
    def wait(step, preview=None):
        print("step", step, file=sys.stderr, flush=True)
        time.sleep(0.5)
        if {stuck} and step == 1: time.sleep(60)
        update(step, preview)
    bar.update = wait
    return bar
host.progress = slow
sys.exit(main(["run", "workflow.json", "--set", "2.steps=50"]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("stuck", [False, True])
def test_ctrl_c_stops_at_the_next_step_and_the_second_at_once(folder, stuck):
    process = python(SLOW.format(stuck=stuck), folder)
    while "step 1" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    while "press ctrl-C again" not in process.stderr.readline():
        assert process.poll() is None
    if stuck:
        process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == "" and "Stopped." in error and "step 9" not in error
