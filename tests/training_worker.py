"""One of two processes that train together, started by test_training_processes.py with a folder to write to."""

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tests" / "conftest.py"))
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from comfyui_wanflow.wan_core.errors import InputError  # noqa: E402
from comfyui_wanflow.wan_core.training.team import current_team, joined  # noqa: E402
from test_training_loop import Clips, Settings, lora, small_model, train, whole  # noqa: E402
from test_training_processes import OPTIONS, SHARED, ZERO  # noqa: E402

folder = Path(sys.argv[1])


def stop(done, total, loss):
    if done == 3:
        raise KeyboardInterrupt


def run(trainee, name, options, on_step=None):
    team = current_team()
    watch = on_step if team.is_main else None
    try:
        losses = train(trainee, Clips(), Settings(**options), folder / name, watch, held_out=Clips(1, seed=9))
    except (KeyboardInterrupt, InputError) as error:
        losses = str(error) or "stopped"
    return [type(team).__name__, team.count, losses]


with joined() as team:
    trainee = lora()
    told = {"lora": run(trainee, "lora", OPTIONS)}
    torch.save({name: p.detach() for name, p in trainee.parameters.items()}, folder / f"process{team.rank}.pt")
    os.environ |= ZERO
    told["stopped"] = run(whole(small_model()), "whole", SHARED, stop)
    for name in ZERO:
        del os.environ[name]
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    told["whole"] = run(whole(small_model()), "whole", SHARED)
    told["refused"] = run(lora(), "refused", OPTIONS)
    told["muon"] = run(whole(small_model()), "refused", {**OPTIONS, "optimizer": "muon"})
    (folder / f"process{team.rank}.json").write_text(json.dumps(told))
