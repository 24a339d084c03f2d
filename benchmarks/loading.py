"""Loading a checkpoint of 2 GB: as it is (C6), and into 8-bit floats (C7).

Every way runs in a process of its own: it loads, then reads a number of each page of memory, as a first run would. The
processes are copies of one that has imported everything and loaded a tiny model each way, so that only loading counts.
The test files stay in the setting's folder (4 GB, by default in the system's temporary folder) and are used again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import contestants
import torch
from comfyui_wanflow.wan_core.loading.keymaps import published_names
from comfyui_wanflow.wan_core.loading.load import load_model
from comfyui_wanflow.wan_core.loading.mapped import open_safetensors
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from measure import CPU, OURS, Result, Sample, Workload, measure, memory_mb, summed_up
from safetensors.torch import save_file
from setting import Setting
from torch import nn

TINY = DiTLayout(dim=128, ffn_dim=128, layers=1, heads=1)
LAYERS = 21  # of the 1.3B model's width: 2.0 GB in bf16
PAGE = 4096
FP8 = torch.float8_e4m3fn
BARE = "bare mmap and assign"


class Files:
    """The same weights under the published names and as a folder of diffusers."""

    def __init__(self, folder: Path, layout: DiTLayout):
        self.layout, self.published, self.diffusers = layout, folder / "published.safetensors", folder / "transformer"
        if not self.published.exists():
            self.write()

    def write(self) -> None:
        from diffusers import WanTransformer3DModel

        weights = contestants.random_dit(self.layout, torch.bfloat16).state_dict()
        with torch.device("meta"):
            theirs = WanTransformer3DModel(
                num_attention_heads=self.layout.heads, ffn_dim=self.layout.ffn_dim, num_layers=self.layout.layers
            )
        self.diffusers.mkdir(parents=True, exist_ok=True)
        theirs.save_config(self.diffusers)
        names = {stored: name for name, stored in published_names(theirs.state_dict()).items()}
        stored = {name: weights[published] for name, published in names.items()}
        save_file(stored, self.diffusers / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        save_file(weights, self.published, {"format": "pt"})

    def forget(self) -> None:
        """Let the system drop what it remembers of them, so that the next reading comes from the disk."""
        for file in (self.published, *self.diffusers.iterdir()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------- the ways


def bare_mmap(files: Files) -> nn.Module:
    """The least that can be done: map the file, lay the tensors over it, assign them to an empty module."""
    with torch.device("meta"):
        module = DiT(files.layout)
    entries, _ = open_safetensors(files.published)
    module.load_state_dict({name: entry.read() for name, entry in entries.items()}, assign=True)
    return module


def ours(weight_dtype: str) -> Callable[[Files], nn.Module]:
    return lambda files: load_model(files.published, weight_dtype, device="cpu").module


def diffusers_folder(files: Files) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(files.diffusers, torch_dtype=torch.bfloat16)


def diffusers_file(files: Files) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_single_file(
        str(files.published), config=str(files.diffusers), torch_dtype=torch.bfloat16, local_files_only=True
    )


def diffusers_fp8(files: Files) -> nn.Module:
    model = diffusers_folder(files)
    model.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.bfloat16)
    return model


def diffsynth(dtype: torch.dtype) -> Callable[[Files], nn.Module]:
    def load(files: Files) -> nn.Module:
        network = contestants.import_diffsynth("diffsynth.models.wan_video_dit").WanModel
        loader = contestants.import_diffsynth("diffsynth.core.loader.model")
        arguments = contestants.diffsynth_arguments(files.layout)
        return loader.load_model(network, str(files.published), arguments, torch_dtype=dtype)

    return load


def comfyui(dtype: torch.dtype) -> Callable[[Files], nn.Module]:
    """As its loader does, once it knows what it has."""

    def load(files: Files) -> nn.Module:
        weights = contestants.import_comfyui("comfy.utils").load_torch_file(str(files.published))
        model = contestants.empty_comfyui_dit(files.layout, dtype, CPU).to_empty(device=CPU)
        model.load_state_dict(weights)
        return model

    return load


Ways = dict[str, Callable[[Files], nn.Module]]
AS_IT_IS: Ways = {
    OURS: ours("auto"),
    BARE: bare_mmap,
    "diffusers": diffusers_folder,
    "diffusers from_single_file": diffusers_file,
    "diffsynth": diffsynth(torch.bfloat16),
    "comfyui": comfyui(torch.bfloat16),
}
INTO_FP8: Ways = {
    OURS: ours("fp8_e4m3fn_cast"),
    "diffusers": diffusers_fp8,
    "diffsynth": diffsynth(FP8),
    "comfyui": comfyui(FP8),
}


# ---------------------------------------------------------------- measuring


def touch(module: nn.Module) -> None:
    """Read a number of each page."""
    for parameter in module.parameters():
        numbers = parameter.detach().view(-1)
        numbers[:: PAGE // numbers.element_size()].float().sum()


def size_of_all(module: nn.Module) -> float:
    """A number that tells whether two ways loaded the same."""
    return sum(parameter.detach().float().abs().sum(dtype=torch.float64).item() for parameter in module.parameters())


def in_a_copy(work: Callable[[], list]) -> list:
    """What `work` finds in a copy of this process."""
    answer, tell = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = os.write(tell, json.dumps(work()).encode()) == 0
        finally:
            os._exit(status)
    os.close(tell)
    with os.fdopen(answer) as told:
        text = told.read()
    os.waitpid(child, 0)
    return json.loads(text)


def timed(way: Callable[[Files], nn.Module], files: Files) -> list:
    """What loading and reading takes, and how much anonymous memory is held then."""
    held, anonymous = [], memory_mb("RssAnon")

    def load() -> None:
        held.append(way(files))
        touch(held[0])

    return [*astuple(measure(load)), memory_mb("RssAnon") - anonymous]


def check(ways: Ways, files: Files, tolerance: float) -> dict[str, float]:
    """By how much what each way loads differs from what ours does."""
    sizes = {name: in_a_copy(lambda way=way: [size_of_all(way(files))])[0] for name, way in ways.items()}
    errors = {name: abs(size / sizes[OURS] - 1) for name, size in sizes.items()}
    if max(errors.values()) > tolerance:
        raise SystemExit(f"Not the same was loaded: {errors}. There is nothing to compare.")
    return errors


def raced(ways: Ways, setting: Setting, tolerance: float, cold: bool = False) -> tuple[list[Result], dict[str, float]]:
    """Medians of all ways in turn, and the anonymous memory of each. cold: each time from the disk."""
    for way in ways.values():
        touch(way(Files(setting.folder / "tiny", TINY)))
    files = Files(setting.folder / ("toy" if setting.toy else "large"), setting.layout("1.3B", LAYERS))
    errors = check(ways, files, tolerance)
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    anonymous = dict.fromkeys(ways, 0.0)
    for _ in range(setting.rounds):
        for name, way in ways.items():
            if cold:
                files.forget()
            *sample, held = in_a_copy(lambda way=way: timed(way, files))
            samples[name].append(Sample(*sample))
            anonymous[name] = max(anonymous[name], held)
    return [summed_up(name, runs, errors[name]) for name, runs in samples.items()], anonymous


def present(ways: Ways) -> Ways:
    missing = {library for library in contestants.PEERS if not contestants.installed(library)}
    return {name: way for name, way in ways.items() if name.split()[0] not in missing}


def c6(setting: Setting) -> list[Workload]:
    ways, name = present(AS_IT_IS), "Load 2 GB in bf16 and read it"
    warm, anonymous = raced(ways, setting, tolerance=1e-6)
    results = [replace(result, peak_mb=anonymous[result.library]) for result in warm]
    cold, _ = raced(ways, setting, tolerance=1e-6, cold=True)
    return [
        Workload(f"{name}, anonymous memory", results, target=1.2, aim=1.0, against=(BARE,)),
        Workload(f"{name}, from the disk", cold, target=1.2, aim=1.0, against=(BARE,), time="seconds"),
    ]


def c7(setting: Setting) -> list[Workload]:
    results, _ = raced(present(INTO_FP8), setting, tolerance=1e-2)
    return [Workload("Load 2 GB of bf16 into fp8", results, target=1.0)]
