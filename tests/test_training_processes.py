"""Two processes that train together, really started: on the CPU, by gloo."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.training import team
from comfyui_wanflow.wan_core.training.loop import train
from safetensors.torch import load_file
from test_training_loop import Clips, Settings, lora, small_model, whole

WORKER = Path(__file__).with_name("training_worker.py")
OPTIONS = {"learning_rate": 1e-3, "num_epochs": 2, "warmup_steps": 2}
SHARED = {**OPTIONS, "ema_decay": 0.9}
ZERO = {  # what accelerate says of DeepSpeed's settings
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
}  # fmt: skip
LAUNCHERS = {
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                   "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    "torch": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(the folder of two processes, what each of them tells)"""
    folder = tmp_path_factory.mktemp("together")
    launcher = next(launcher for name, launcher in LAUNCHERS.items() if importlib.util.find_spec(name))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(WORKER), str(folder)],
        cwd=WORKER.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"process{rank}.json").read_text()) for rank in range(2)]


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-5)


def test_with_the_whole_model_in_each_two_are_one_with_twice_the_batches(together, tmp_path):
    folder, told = together
    alone = lora()
    losses = train(alone, Clips(), Settings(gradient_accumulation_steps=2, **OPTIONS), tmp_path)
    assert [one["lora"] for one in told] == [["Team", 2, pytest.approx(losses, rel=1e-5)]] * 2
    assert_close(load_file(tmp_path / "epoch-1.safetensors"), load_file(folder / "lora" / "epoch-1.safetensors"))
    for rank in range(2):
        own = torch.load(folder / f"process{rank}.pt", weights_only=True)
        assert_close({name: p.detach() for name, p in alone.parameters.items()}, own)


def test_with_parts_in_each_they_are_too_and_go_on_after_a_stop(together, tmp_path):
    """Begun by DeepSpeed's settings, with parts in main memory, and ended by those for FSDP."""
    folder, told = together
    assert [one["stopped"] for one in told] == [["ShardedTeam", 2, "stopped"]] * 2
    assert (folder / "whole" / "step-3.safetensors").is_file()
    losses = train(whole(small_model()), Clips(), Settings(gradient_accumulation_steps=2, **SHARED), tmp_path)
    assert [one["whole"] for one in told] == [["ShardedTeam", 2, pytest.approx(losses, rel=1e-5)]] * 2
    assert_close(load_file(tmp_path / "epoch-1.safetensors"), load_file(folder / "whole" / "epoch-1.safetensors"))


def test_what_cannot_be_shared_in_parts_is_told(together):
    for one in together[1]:
        assert "accelerate launch --multi_gpu" in one["refused"][2]
        assert "Choose adamw" in one["muon"][2]


@pytest.mark.parametrize("environment, kind, offload", [
    ({}, "Team", None), ({"ACCELERATE_USE_FSDP": "true"}, "ShardedTeam", False),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "ShardedTeam", True), (ZERO, "ShardedTeam", True),
    ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "Team", None),
])  # fmt: skip
def test_what_accelerate_says_is_understood(monkeypatch, environment, kind, offload):
    for name, answer in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(team.dist, name, lambda answer=answer: answer)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = team.current_team()
    assert (type(found).__name__, getattr(found, "offload", None), found.rank, found.count) == (kind, offload, 1, 2)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "zero.json")
    with pytest.raises(InputError, match="zero.json"):
        team.current_team()
