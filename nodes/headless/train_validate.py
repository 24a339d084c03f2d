"""What `wanflow validate` does: a video with what was trained, at the training's size and with its extra inputs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from ...wan_core.errors import InputError
from ...wan_core.loading.checkpoint import open_checkpoint
from ...wan_core.loading.identify import identify
from ...wan_core.loading.load import add_module
from ...wan_core.loading.lora_files import load_lora
from ...wan_core.model import WanModel
from ...wan_core.sampling.loop import working_room
from ...wan_core.training.examples import Encoders
from ...wan_core.training.framing import WAN_RATE
from ...wan_core.training.results import results
from ...wan_core.video import save_video
from ..host.standalone import host
from ..wires import decode_with
from .train_data import items_of, validation_sample
from .train_models import load_engines


def validate(options: Namespace) -> Path:
    """The file of the video."""
    file = options.result or last_saved(options.output_path)
    found = parts_of(file)
    engines = load_engines(options, {"dit": [found["dit"]]} if "dit" in found else {})
    model = with_result(engines.pop("dit"), found)
    encoders = Encoders(**engines)
    sample = validation_sample(options, items_of(options), encoders)
    progress = host.progress(sample.settings.steps)

    def on_step(step: int, steps: int, denoised: Any) -> None:
        progress.update(step + 1, denoised)

    with host.attached(model, working_room(model, sample.shape, sample.settings, sample.conditions)):
        latents = sample.latents(model, on_step)
    video = options.output_path / "validation" / f"{file.stem}.mp4"
    save_video(decode_with(encoders.vae)(latents), video, WAN_RATE)
    return video


def last_saved(folder: Path) -> Path:
    """Not the one with the most steps: an earlier, longer training may have left its files there."""
    return max((file for _, file in results(folder)), key=lambda file: file.stat().st_mtime_ns)


def parts_of(file: Path) -> dict[str, Path]:
    """The files of a result by their kinds: parts that were trained whole may lie beside it."""
    files = [file, *sorted(file.parent.glob(f"{file.stem}.*{file.suffix}"))]
    found = {identify(open_checkpoint([one]).shapes).kind: one for one in files}
    if not found.keys() <= {"lora", "dit", "vace_module", "motion_controller"}:
        raise InputError(f"{file} is no result of a training. Name one with --result.")
    return found


def with_result(model: WanModel, found: dict[str, Path]) -> WanModel:
    for kind in ("vace_module", "motion_controller"):
        if kind in found:
            model = add_module(model, found[kind])
    return model.with_lora(load_lora(found["lora"])) if "lora" in found else model
