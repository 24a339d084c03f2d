"""The rows that need a graphics card: G1 to G8 of the plan. None has run on one yet; toys of them run without."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import contestants
import pipeline
import torch
import training
from comfyui_wanflow.nodes.host.standalone import StandaloneHost
from comfyui_wanflow.wan_core.loading.load import load_model
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.compiled import Compile, compiled
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.slots import Run
from comfyui_wanflow.wan_core.offload.options import Offload
from comfyui_wanflow.wan_core.planning.machines import GIB
from comfyui_wanflow.wan_core.sampling.easycache import EasyCache
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample, working_room
from floors import convolution_rate, dit_operations, lora_step_operations, product_rate, vae_operations
from measure import OURS, Contestants, Result, Workload, measure, race, relative_error, summed_up
from random_weights import on_meta, write_random
from setting import Setting
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
SMALL, LARGE = (480, 832), (720, 1280)  # height, width
IN_BF16 = 3e-2  # what results may differ by
CAP = 8 * GIB  # of the card, where weights travel
Make = Callable[[ExitStack], Callable[[], Tensor]]


def tokens_of(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2] // 4


def g1(setting: Setting) -> list[Workload]:
    """14B, 4 of its 40 blocks, at both sizes of video."""
    ours = contestants.random_dit(setting.layout("14B", 4), setting.dtype, setting.device)
    rate, found = product_rate(setting, setting.dtype), []
    for size in (SMALL, LARGE):
        grid = setting.grid(81, *size)
        name = f"DiT 14B, {ours.layout.layers} of 40 layers, {tokens_of(grid)} tokens, bf16"
        racing = contestants.dits(ours, contestants.inputs(grid, setting.device))
        results = race(name, racing, setting.rounds, setting.tolerance, device=setting.device)
        floor = dit_operations(ours.layout, tokens_of(grid)) / rate
        found.append(Workload(name, results, floor, target=1.0, time=setting.time))
        alone = f"{name}, against diffusers"
        found.append(Workload(alone, results, floor, target=0.7, against=("diffusers",), time=setting.time))
    return found


def g2(setting: Setting) -> list[Workload]:
    """1.3B whole, as it is and compiled."""
    ours = contestants.random_dit(setting.layout("1.3B"), setting.dtype, setting.device)
    grid = setting.grid(81, *SMALL)
    given = contestants.inputs(grid, setting.device)
    name = f"DiT 1.3B, {tokens_of(grid)} tokens, bf16, compiled"
    racing = contestants.dits(ours, given)
    racing[f"{OURS}, not compiled"] = racing[OURS]
    twin = on_meta(lambda: DiT(ours.layout))
    twin.load_state_dict(ours.state_dict(), assign=True)
    with compiled(Network(twin), Compile(backend="eager" if setting.toy else "inductor")):
        racing[OURS] = contestants.dits(twin, given)[OURS]
        if contestants.installed("diffusers"):
            theirs = contestants.diffusers_dit(ours)
            theirs.compile_repeated_blocks(fullgraph=True, backend="eager" if setting.toy else "inductor")
            racing["diffusers, compiled"] = partial(contestants.run_diffusers, theirs, *given)
        results = race(name, racing, setting.rounds, setting.tolerance, device=setting.device)
    floor = dit_operations(ours.layout, tokens_of(grid)) / product_rate(setting, setting.dtype)
    return [Workload(name, results, floor, target=0.95, time=setting.time)]


def random_file(setting: Setting, model: str, layers: int | None = None):
    layout = setting.layout(model, layers)
    setting.folder.mkdir(parents=True, exist_ok=True)
    path = setting.folder / f"dit {layout.dim} {layout.layers}.safetensors"
    return write_random(path, [on_meta(lambda: DiT(layout))], torch.bfloat16)


def forward(model: WanModel, network: Network, given: contestants.Inputs, dtype: torch.dtype) -> Tensor:
    return network.trunk(*given, run=Run(compute_dtype=dtype, attention=model.attention))


def g3(setting: Setting) -> list[Workload]:
    """The first of G1 with products in fp8, against our own bf16; the others keep fp8 too."""
    path, grid = random_file(setting, "14B", 4), setting.grid(81, *SMALL)
    given = contestants.inputs(grid, setting.device)
    name = f"DiT 14B, 4 of 40 layers, {tokens_of(grid)} tokens, products in fp8"
    with ExitStack() as stack:

        def ours(**options) -> Callable[[], Tensor]:
            model = load_model(path, device=setting.device, **options)
            return partial(forward, model, stack.enter_context(model.attached()), given, setting.dtype)

        in_bf16 = f"{OURS}, in bf16"
        racing = {OURS: ours(weight_dtype="fp8_e4m3fn", fp8_matmul=True), in_bf16: ours()}
        plain = load_model(path, device="cpu").trunk
        if contestants.installed("diffsynth"):
            kept = setting.device, FP8
            studio = wrapped_diffsynth(plain, setting, rest=kept, ready=kept)
            racing["diffsynth"] = partial(contestants.run_diffsynth, studio, *given)
        if contestants.installed("comfyui"):
            comfyui = contestants.empty_comfyui_dit(plain.layout, FP8, setting.device, fast=True)
            comfyui.to_empty(device=setting.device).load_state_dict(plain.state_dict())
            racing["comfyui"] = partial(contestants.run_comfyui, comfyui, *given)
        results = race(name, racing, setting.rounds, tolerance=0.3, device=setting.device)
    return [Workload(name, results, target=0.88, against=(in_bf16,), time=setting.time)]


def g4(setting: Setting) -> list[Workload]:
    """Decoding in bf16, and encoding in fp32."""
    found = []
    for doing, dtype, size in (
        ("decode", setting.dtype, SMALL), ("decode", setting.dtype, LARGE), ("encode", torch.float32, SMALL)
    ):  # fmt: skip
        frames, height, width = setting.clip(81, *size)
        coders = contestants.vaes(setting.vae_width, dtype, setting.device)
        shape = (3, frames, height, width) if doing == "encode" else (16, (frames + 3) // 4, height // 8, width // 8)
        clip = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1)).to(setting.device, dtype)
        racing = {library: partial(getattr(coder, doing), clip) for library, coder in coders.items()}
        name = f"VAE {doing} {frames} x {height} x {width}, {str(dtype).removeprefix('torch.')}"
        tolerance = setting.tolerance if dtype != torch.float32 else 1e-4
        results = race(name, racing, setting.rounds, tolerance, device=setting.device)
        operations = vae_operations(frames, height, width, setting.vae_width)[doing == "decode"]
        floor = operations / convolution_rate(setting, dtype)
        found.append(Workload(name, results, floor, target=0.6, time=setting.time))
    return found


# ---------------------------------------------------------------- weights that travel


def g5(setting: Setting) -> list[Workload]:
    """14B out of main memory, within 8 GB of the card, for three lengths of video."""
    path, found = random_file(setting, "14B"), []
    still = f"{OURS}, all weights stay"
    for frames, against, target, aim in ((81, (still,), 1.05, 1.02), (41, (still,), 1.05, 1.02), (1, (), 0.9, None)):
        grid = setting.grid(frames, *SMALL)
        given = contestants.inputs(grid, setting.device)
        makers: dict[str, Make] = {
            OURS: partial(ours_travelling, path, setting, given, Offload("cpu", vram_limit=CAP)),
            still: partial(ours_travelling, path, setting, given, Offload()),
        }
        makers |= {
            library: partial(make, path, setting, given)
            for library, make in TRAVELLING.items() if contestants.installed(library)
        }  # fmt: skip
        name = f"DiT 14B within 8 GB, {tokens_of(grid)} tokens, bf16"
        results = one_by_one(name, makers, setting)
        found.append(Workload(name, results, target=target, aim=aim, against=against, time=setting.time))
    return found


def one_by_one(name: str, makers: dict[str, Make], setting: Setting) -> list[Result]:
    """As `race`, but each alone on the card: its memory is all that it takes there."""
    results, wanted = [], None
    for library, make in makers.items():
        with free_card(setting), ExitStack() as stack, torch.inference_mode():
            held = allocated(setting)
            work = make(stack)
            out = work()
            wanted = out.cpu() if wanted is None else wanted
            samples = []
            for _ in range(setting.rounds):
                before = allocated(setting) - held
                sample = measure(work, setting.device)
                samples.append(replace(sample, peak_mb=sample.peak_mb + before / 2**20))
            results.append(summed_up(library, samples, relative_error(out, wanted)))
    errors = {result.library: result.error for result in results}
    if not max(errors.values()) <= IN_BF16:
        raise SystemExit(f"{name}: the results differ: {errors}. There is nothing to compare.")
    return results


def allocated(setting: Setting) -> int:
    return torch.cuda.memory_allocated() if setting.device.type == "cuda" else 0


@contextmanager
def free_card(setting: Setting) -> Iterator[None]:
    yield
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def ours_travelling(path, setting: Setting, given: contestants.Inputs, offload: Offload, stack: ExitStack) -> Callable:
    model = load_model(path, device=setting.device, offload=offload)
    room = working_room(model, given.x.shape, Settings(0, 1, 1.0))
    network = stack.enter_context(StandaloneHost().attached(model, room))
    return partial(forward, model, network, given, setting.dtype)


def on_processor(path) -> DiT:
    return load_model(path, device="cpu").trunk


def diffusers_travelling(path, setting: Setting, given: contestants.Inputs, stack: ExitStack) -> Callable:
    theirs = contestants.diffusers_dit(on_processor(path))
    theirs.enable_group_offload(
        onload_device=setting.device, offload_device=torch.device("cpu"), offload_type="block_level",
        num_blocks_per_group=1, use_stream=setting.device.type == "cuda",
    )  # fmt: skip
    return partial(contestants.run_diffusers, theirs, *given)


def diffsynth_travelling(path, setting: Setting, given: contestants.Inputs, stack: ExitStack) -> Callable:
    plain, cap = on_processor(path), None if setting.toy else CAP / GIB
    rest, ready = (torch.device("cpu"), torch.bfloat16), (setting.device, torch.bfloat16)
    theirs = wrapped_diffsynth(plain, setting, rest, ready, cap)
    return partial(contestants.run_diffsynth, theirs, *given)


Kept = tuple[torch.device, torch.dtype]


def wrapped_diffsynth(plain: DiT, setting: Setting, rest: Kept, ready: Kept, cap: float | None = None) -> nn.Module:
    """Layers that bring their weights from where and how they rest to where they are ready, up to `cap` GB of the card,
    and for a call to the type that is computed in."""
    layers = contestants.import_diffsynth("diffsynth.core.vram.layers")
    library = contestants.import_diffsynth("diffsynth.models.wan_video_dit")
    theirs, wrapped = contestants.diffsynth_dit(plain), layers.AutoWrappedModule
    kinds = {
        library.DiTBlock: layers.AutoWrappedNonRecurseModule, library.Head: wrapped, library.RMSNorm: wrapped,
        nn.Linear: layers.AutoWrappedLinear, nn.Conv3d: wrapped, nn.LayerNorm: wrapped,
    }  # fmt: skip
    stages = {"offload": rest, "onload": rest, "preparing": ready, "computation": (setting.device, torch.bfloat16)}
    how = {f"{stage}_device": str(device) for stage, (device, _) in stages.items()}
    how |= {f"{stage}_dtype": dtype for stage, (_, dtype) in stages.items()}
    theirs = layers.enable_vram_management(theirs, kinds, how, vram_limit=cap)
    theirs.freqs = [angles.to(setting.device) for angles in theirs.freqs]
    for module in theirs.modules():
        if isinstance(module, layers.AutoTorchModule):
            module.onload()
    return theirs


def comfyui_travelling(path, setting: Setting, given: contestants.Inputs, stack: ExitStack) -> Callable:
    theirs = contestants.comfyui_dit(on_processor(path))
    patcher = contestants.import_comfyui("comfy.model_patcher").ModelPatcher(
        theirs, setting.device, torch.device("cpu")
    )
    room = working_room(load_model(path, device=setting.device), given.x.shape, Settings(0, 1, 1.0))
    patcher.load(setting.device, lowvram_model_memory=max(1, CAP - room))
    stack.callback(patcher.unpatch_model, torch.device("cpu"))
    return partial(contestants.run_comfyui, theirs, *given)


TRAVELLING = {"diffusers": diffusers_travelling, "diffsynth": diffsynth_travelling, "comfyui": comfyui_travelling}


# ---------------------------------------------------------------- whole runs


def g7(setting: Setting) -> list[Workload]:
    """What deciding costs where nothing is left out."""
    model = load_model(random_file(setting, "1.3B"), device=setting.device)
    shape, text = (1, 16, *setting.grid(81, *SMALL)), torch.randn(1, 512, 4096)

    def steps(model: WanModel) -> Tensor:
        return sample(model, text, None, torch.zeros(shape), Settings(0, 6, 1.0))

    name, plain = "EasyCache that leaves nothing out, 6 steps of 1.3B", f"{OURS}, no cache"
    racing: Contestants = {OURS: partial(steps, model.with_cache(EasyCache(0.0))), plain: partial(steps, model)}
    with StandaloneHost().attached(model, working_room(model, shape, Settings(0, 6, 1.0))):
        results = race(name, racing, setting.rounds, setting.tolerance, device=setting.device)
    return [Workload(name, results, target=1.005, against=(plain,), time=setting.time)]


def g8(setting: Setting) -> list[Workload]:
    found, grid = [], setting.grid(33, *SMALL)
    rate = product_rate(setting, setting.dtype)
    for model, layers in (("1.3B", None), ("14B", 4)):
        trunk = contestants.random_dit(setting.layout(model, layers), setting.dtype, setting.device)
        name = f"LoRA, a step, {model}, {trunk.layout.layers} layers, {tokens_of(grid)} tokens"
        racing = training.steps(trunk, training.at_hand(trunk, grid))
        results = race(name, racing, setting.rounds, setting.tolerance, gradients=True, device=setting.device)
        floor = lora_step_operations(trunk.layout, tokens_of(grid)) / rate
        found.append(Workload(name, results, floor, target=0.85, time=setting.time))
    return found


ROWS = {"G1": g1, "G2": g2, "G3": g3, "G4": g4, "G5": g5, "G6": pipeline.g6, "G7": g7, "G8": g8}
