"""The targets of streaming on a graphics card: `python benchmarks/streaming.py [TARGET ...] [--folder FOLDER]`.

fits       14B image to video at 832x480x81, from prompt to frames, under a cap of 8 GB on torch's allocator
hidden     at least 90 % of the transfer goes on behind the computing, 14B at 832x480x81 under 8 GB
overhead   less than 1 % of the time for weights that are attached and all stay, against the bare network
comfyui    no higher peak than ComfyUI's native nodes for the same file, size and cap (COMFYUI_PATH, COMFYUI_PYTHON)

Random weights; needs a CUDA card (`hidden` and `overhead` one of 48 GB), 70 GB of disk and 48 GB of main memory. Writes
results/streaming.json. It has not run on a card yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import memory
import torch
from comfyui_wanflow.nodes.host.standalone import StandaloneHost
from comfyui_wanflow.wan_core.adapters.image import image_condition
from comfyui_wanflow.wan_core.offload.options import Offload
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.planning.machines import GIB
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample, working_room
from comfyui_wanflow.wan_core.size import latent_shape
from measure import HERE, git

CAP = 8  # GB
SIZE = (832, 480, 81)
SHAPE = latent_shape(*SIZE)
HIDDEN, OVERHEAD = 0.9, 0.01
COMFYUI = """
import json, os, sys
sys.path.insert(0, os.environ["COMFYUI_PATH"])
path, cap, shape = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
sys.argv = sys.argv[:1]
import torch
torch.cuda.set_per_process_memory_fraction(cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
import comfy.sample, comfy.sd
model = comfy.sd.load_diffusion_model(path)
text, latent = [[torch.randn(1, 512, 4096), {}]], torch.zeros(shape)
with torch.inference_mode():
    noise = comfy.sample.prepare_noise(latent, 0)
    comfy.sample.sample(model, noise, 1, 5.0, "euler", "simple", text, text, latent, seed=0)
print(json.dumps({"peak": torch.cuda.max_memory_allocated()}))
"""


@dataclass(frozen=True)
class Found:
    target: str
    reached: bool
    numbers: dict


@contextmanager
def capped(gigabytes: float | None):
    """A card of this size, as far as torch's allocator goes."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * GIB / total) if gigabytes else 1.0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def engine(folder: Path, cap: int | None, **case):
    """A loaded engine of `memory.Case`, limited to `cap` GB of the card."""
    case = memory.Case(limit=cap or 0, **case)
    return memory.engine_of(case, memory.files_of(case, folder), torch.device("cuda"))


def timed(work) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def fits(folder: Path) -> Found:
    host, peaks = StandaloneHost(), {}
    with capped(CAP), torch.inference_mode():
        text, look, vae = (engine(folder, CAP, kind=kind) for kind in ("text", "image", "decoding"))
        model = engine(folder, CAP, kind="sampling", model="14B", beside="i2v")

        def step(name, weights, room, work):
            torch.cuda.reset_peak_memory_stats()
            with host.attached(weights, room):
                result = work()
            peaks[name] = torch.cuda.max_memory_allocated() / GIB
            return result

        words = step("text", text, text.working_room(memory.PROMPT), lambda: text.encode([memory.PROMPT])[0])
        picture = torch.rand(1, SIZE[1], SIZE[0], 3)
        condition = image_condition(
            picture, None, SHAPE[2:],
            lambda pixels: step("encoding", vae, 0, lambda: vae.encode(pixels)),
            lambda pixels: step("image", look, look.working_room(), lambda: look.encode(pixels)),
        )  # fmt: skip
        settings = Settings(0, 2)
        room = working_room(model, SHAPE, settings, [condition])
        latent = step("sampling", model, room, lambda: sample(
            model, words, words, torch.zeros(SHAPE), settings, [condition]))  # fmt: skip
        frames = step("decoding", vae, 0, lambda: vae.decode(latent))
    good = tuple(frames.shape[2:]) == (SIZE[2], SIZE[1], SIZE[0]) and max(peaks.values()) <= CAP
    return Found("fits", good, peaks)


def forwards(model, count: int = 3) -> list[float]:
    """Seconds of passes over the whole model, the first of which does not count."""
    text = torch.randn(1, 512, 4096)
    work = lambda: sample(model, text, None, torch.zeros(SHAPE), Settings(0, 1, 1.0))  # noqa: E731
    with StandaloneHost().attached(model, working_room(model, SHAPE, Settings(0, 1, 1.0))), torch.inference_mode():
        return [timed(work) for _ in range(1 + count)][1:]


def hidden(folder: Path) -> Found:
    whole = min(forwards(engine(folder, None, kind="sampling", model="14B")))
    torch.cuda.empty_cache()
    with capped(CAP):
        model = engine(folder, CAP, kind="sampling", model="14B")
        streamed = min(forwards(model))
        planned = model.plans(Offload(vram_limit=CAP * GIB), working_room(model, SHAPE, Settings(0, 1, 1.0)),
                              (CAP * GIB, CAP * GIB - GIB // 2))  # fmt: skip
    size = sum(plan.streamed_bytes for plan in planned)
    pinned, there = torch.empty(GIB // 2, dtype=torch.uint8, pin_memory=True), torch.empty(
        GIB // 2, dtype=torch.uint8, device="cuda"
    )
    copy = min(timed(lambda: there.copy_(pinned, non_blocking=True)) for _ in range(4))
    transfer = size / (GIB // 2) * copy
    share = 1 - max(0.0, streamed - whole) / transfer
    numbers = {"resident s": whole, "streamed s": streamed, "transfer s": transfer, "hidden": share}
    return Found("hidden", share >= HIDDEN, numbers)


def overhead(folder: Path) -> Found:
    model = engine(folder, None, kind="sampling", model="1.3B")
    attached = min(forwards(model, 5))
    model.release()
    model.module.to("cuda")  # the bare network: its weights lie where it computes
    model = replace(model, residency=Residency(model.trunk, model.compute_dtype), beside={})  # so nothing is attached
    bare = min(forwards(model, 5))
    return Found("overhead", attached / bare - 1 < OVERHEAD, {"attached s": attached, "bare s": bare})


def comfyui(folder: Path) -> Found:
    if "COMFYUI_PATH" not in os.environ:
        return Found("comfyui", False, {"not measured": "COMFYUI_PATH is not set"})
    numbers = {}
    for name in ("1.3B", "14B"):
        case = memory.Case("sampling", SIZE, name, limit=CAP)
        path = memory.files_of(case, folder)
        with capped(CAP), torch.inference_mode():
            forwards(engine(folder, CAP, kind="sampling", model=name), 1)
            ours = torch.cuda.max_memory_allocated()
        command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "-c", COMFYUI, path, str(CAP), json.dumps(SHAPE)]
        done = subprocess.run(command, capture_output=True, text=True)
        theirs = json.loads(done.stdout.splitlines()[-1])["peak"] if done.returncode == 0 else float("inf")
        numbers |= {f"{name} ours GB": ours / GIB, f"{name} ComfyUI GB": theirs / GIB}
    good = all(numbers[f"{name} ours GB"] <= numbers[f"{name} ComfyUI GB"] for name in ("1.3B", "14B"))
    return Found("comfyui", good, numbers)


TARGETS = {"fits": fits, "hidden": hidden, "overhead": overhead, "comfyui": comfyui}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"which of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument("--folder", type=Path, help="where the random weights are kept (a temporary folder)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA card here: nothing was measured.")
    with tempfile.TemporaryDirectory() as temporary:
        found = []
        for name in options.targets or TARGETS:
            found.append(TARGETS[name](options.folder or Path(temporary)))
            print(f"{name}: {'reached' if found[-1].reached else 'NOT reached'} {found[-1].numbers}", flush=True)
    facts = {"commit": git("rev-parse", "--short", "HEAD"), "card": torch.cuda.get_device_name()}
    kept = {"machine": facts, "results": [asdict(one) for one in found]}
    (HERE / "results" / "streaming.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
