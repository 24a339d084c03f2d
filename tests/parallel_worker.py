"""One process of several, for test_parallel.py: `python parallel_worker.py FILE`, with torchrun's environment.

Makes every video of `CASES` alone and together with the others, and writes how much they differ. At last one of the
processes goes without a word.
"""

import json
import os
import runpy
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("conftest.py")))

import torch  # noqa: E402
from comfyui_wanflow.wan_core.errors import Lost  # noqa: E402
from comfyui_wanflow.wan_core.parallel.team import Team, join  # noqa: E402
from comfyui_wanflow.wan_core.sampling.easycache import EasyCache  # noqa: E402
from comfyui_wanflow.wan_core.sampling.magcache import MagCache  # noqa: E402
from comfyui_wanflow.wan_core.sampling.teacache import TeaCache  # noqa: E402
from comfyui_wanflow.wan_core.sampling.windows import Windows  # noqa: E402
from families import model, random, relative_error, video  # noqa: E402

EAGERLY = TeaCache(threshold=0.3, method="DiffSynth", coefficients="T2V-1.3B")
# name -> family, conditions, settings, how the model is used
CASES = {
    "T2V": ("T2V", (), {}, {}),
    "without guidance": ("T2V", (), {"cfg": 1.0}, {}),
    "merged guidance": ("T2V", (), {"cfg_merge": True}, {}),
    "several videos": ("T2V", (), {"latent": torch.zeros(3, 16, 3, 4, 6)}, {}),
    "video to video": ("T2V", (), {"latent": random(1, 16, 3, 4, 6), "denoise": 0.6}, {}),
    "I2V": ("I2V", ("start image",), {}, {}),
    "FLF2V": ("FLF2V", ("start and end image",), {}, {}),
    "control and reference": ("Control V1.1", ("control video", "reference image"), {}, {}),
    "camera": ("Camera", ("start image", "camera"), {}, {}),
    "VACE": ("VACE", ("VACE pictures",), {}, {}),
    "motion speed": ("speed", ("motion speed",), {}, {}),
    "TeaCache": ("T2V", (), {"steps": 8}, {"with_cache": EAGERLY}),
    "EasyCache": ("T2V", (), {"steps": 8}, {"with_cache": EasyCache(1.0)}),
    "MagCache": ("T2V", (), {"steps": 8}, {"with_cache": MagCache(1.0)}),
    "part guided": ("T2V", (), {"steps": 8, "cfg_start": 0.2, "cfg_end": 0.6}, {"with_cache": EAGERLY}),
    "windows": ("VACE", ("VACE pictures",), {}, {"with_windows": Windows(3, 2)}),
}


def made(wan, team, conditions, settings):
    """The video, and what this process did for it: how many rows and tokens a block saw, and in how many calls."""
    seen = []
    hook = wan.trunk.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    result = video(wan, *conditions, team=team, **settings)
    hook.remove()
    return result, [max(shape[0] for shape in seen), max(shape[1] for shape in seen), len(seen)]


def findings(team):
    """Case -> way of sharing -> the relative error, and what this process did."""
    found = {}
    for name, (family, conditions, settings, uses) in CASES.items():
        wan = model(family)
        for use, value in uses.items():
            wan = getattr(wan, use)(value)
        expected, work = made(wan, None, conditions, settings)
        found[name] = {"alone": (0, work)}
        for way in ("auto", "tokens"):
            got, work = made(wan, Team(team.rank, team.size, team.store, way), conditions, settings)
            found[name][way] = relative_error(got, expected), work
    return found


def left_alone(team):
    """What happens when the last process is gone."""
    if team.rank == team.size - 1:
        os._exit(0)
    try:
        while True:
            team.same(torch.zeros(1))
    except Lost as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    team, file = join(), Path(f"{sys.argv[1]}.{os.environ['RANK']}")
    found = findings(team)
    file.write_text(json.dumps(found))
    file.write_text(json.dumps(found | {"lost": left_alone(team)}))
