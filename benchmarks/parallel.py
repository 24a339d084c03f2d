"""What several graphics cards gain: `torchrun --nproc-per-node N benchmarks/parallel.py [--model 14B] [--frames 81]`.

Sampling steps with two prompts on random weights: first the first card alone, then all cards, sharing the prompts, the
tokens, or both. The videos must agree. Writes results/parallel.json: seconds a step, the speed against one card as a
share of what N cards could give, and the peak memory of the fullest card. It has not run on cards yet.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace

import torch
from comfyui_wanflow.wan_core.compute import compute_dtype, default_device
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.parallel.team import Team, join
from comfyui_wanflow.wan_core.planning.machines import GIB
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from comfyui_wanflow.wan_core.size import latent_shape
from measure import HERE, git
from torch import Tensor
from torch import distributed as dist

LAYOUTS = {
    "tiny": DiTLayout(256, 512, layers=2, heads=4),  # to try the script on a CPU
    "1.3B": DiTLayout(1536, 8960, layers=30, heads=12),
    "14B": DiTLayout(5120, 13824, layers=40, heads=40),
}
WARM_UP = 1


@dataclass(frozen=True)
class Way:
    name: str
    share: str = "auto"  # see parallel.Team
    settings: Settings = Settings(seed=0, steps=3)


WAYS = (
    Way("prompts, then tokens"),
    Way("tokens", "tokens"),
    Way("tokens, both prompts at once", "tokens", Settings(seed=0, steps=3, cfg_merge=True)),
)


def random_model(layout: DiTLayout, device: torch.device) -> WanModel:
    dtype = compute_dtype(device)
    with torch.device("meta"):
        trunk = DiT(layout).to(dtype)
    trunk.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return WanModel(
        module=Network(trunk), name="random", device=device, compute_dtype=dtype, residency=Residency(trunk),
        layout=layout,
    )  # fmt: skip


def measured(model: WanModel, shape: tuple[int, ...], settings: Settings, team: Team | None) -> tuple[Tensor, dict]:
    """The video, and what it took: of all processes the slowest and the fullest."""
    cuda, ends = model.device.type == "cuda", [time.perf_counter()]
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def on_step(*_) -> None:
        if cuda:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    texts = torch.randn(2, 512, 4096, generator=torch.Generator().manual_seed(1)).split(1)
    settings = replace(settings, steps=settings.steps + WARM_UP)
    video = sample(model, *texts, torch.zeros(shape), settings, on_step=on_step, team=team)
    seconds = (ends[-1] - ends[WARM_UP]) / (len(ends) - 1 - WARM_UP)
    numbers = torch.tensor([seconds, torch.cuda.max_memory_allocated() / GIB if cuda else 0], device=model.device)
    if team is not None:
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return video, dict(zip(("seconds a step", "peak GB"), numbers.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=LAYOUTS, default="14B")
    for name, value in {"width": 1280, "height": 720, "frames": 81}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    team = join()
    if team is None:
        parser.error("start it with torchrun, in two processes or more")
    model = random_model(LAYOUTS[options.model], default_device())
    shape = latent_shape(options.width, options.height, options.frames)
    found, alone = {}, 0.0
    with team.in_turn("alone"):  # the others wait, and leave the machine to the first
        if team.leads:
            expected, found["one process"] = measured(model, shape, WAYS[0].settings, None)
            alone = found["one process"]["seconds a step"]
    for way in WAYS:
        video, numbers = measured(model, shape, way.settings, replace(team, way=way.share))
        if team.leads:
            error = ((video - expected).norm() / expected.norm()).item()
            numbers |= {"efficiency": alone / numbers["seconds a step"] / team.size, "relative error": error}
            found[way.name] = numbers
    if team.leads:
        commit = git("rev-parse", "--short", "HEAD")
        facts = {**vars(options), "processes": team.size, "device": str(model.device), "commit": commit}
        (HERE / "results" / "parallel.json").write_text(json.dumps(facts | {"found": found}, indent=1) + "\n")
        print(json.dumps(found, indent=1))
    team.leave()


if __name__ == "__main__":
    main()
