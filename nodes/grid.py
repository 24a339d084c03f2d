"""Menu WanFlow/training: what a training made, step by step and side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..wan_core.errors import FileError, InputError
from ..wan_core.loading.lora_files import load_lora
from ..wan_core.sampling.loop import Settings, sample, working_room
from ..wan_core.sampling.schedules import SOLVERS
from ..wan_core.sheet import video_sheet
from ..wan_core.training.results import results
from .host import host, io
from .lora import lora_file
from .wires import (
    WanConditions,
    WanModel,
    WanVAE,
    conditioning_text,
    decode_with,
    latent_samples,
    refuse_noise_mask,
)


class CheckpointGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowCheckpointGrid",
            display_name="Wan Checkpoint Grid",
            category="WanFlow/training",
            description="The same video with each LoRA of a training, at each strength and seed, side by side: to see "
            "which of them to keep.",
            inputs=[
                WanModel.Input("model", tooltip="The model that was trained, without the LoRA."),
                io.Conditioning.Input("positive", tooltip="What the videos show, from Wan Prompt."),
                io.Latent.Input("latent", tooltip="From Empty Wan Latent: size and length of each video."),
                WanVAE.Input("vae", tooltip="From Load Wan VAE."),
                io.String.Input(
                    "loras",
                    default="",
                    multiline=True,
                    tooltip="One a line: the folder of a training (all that it saved), a file in models/loras, or "
                    "a path.",
                ),
                io.String.Input("strengths", default="1", tooltip="Numbers with commas, such as 0.5, 1."),
                io.String.Input("seeds", default="0", tooltip="Whole numbers with commas: a column each."),
                io.Boolean.Input("without", default=True, tooltip="Also a row without any LoRA, to compare with."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="As in Wan Sampler."),
                io.Float.Input(
                    "cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="As in Wan Sampler."
                ),
                io.Float.Input(
                    "shift", default=5.0, min=0.01, max=100.0, step=0.1, round=0.01, tooltip="As in Wan Sampler."
                ),
                io.Combo.Input("scheduler", options=list(SOLVERS), default="unipc", tooltip="As in Wan Sampler."),
                io.Int.Input("cell_height", default=240, min=16, max=4096, tooltip="Larger videos are shrunk to this."),
                io.Conditioning.Input("negative", optional=True, tooltip="As in Wan Sampler."),
                WanConditions.Input("conditions", optional=True, tooltip="As in Wan Sampler."),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The grid as one video, for Save Wan Video.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, vae, loras, strengths, seeds, without, steps, cfg, shift, scheduler, cell_height,
        negative=None, conditions=(),
    ):  # fmt: skip
        samples = latent_samples(latent)[:1]
        refuse_noise_mask(latent)
        text = conditioning_text(positive, "positive")
        negative_text = None if negative is None or cfg == 1 else conditioning_text(negative, "negative")
        rows = [("no LoRA", model)] if without else []
        columns, shares = numbers(seeds, "seeds", int), numbers(strengths, "strengths", float)
        for name, file in chosen(loras):
            lora = load_lora(file)
            rows += [(f"{name}, {share:g}", model.with_lora(lora, share)) for share in shares]
        progress = host.progress(len(rows) * len(columns) * steps, cls.hidden.unique_id)
        done, videos = 0, []

        def on_step(step, steps, denoised):
            nonlocal done
            done += 1
            progress.update(done, denoised)

        for _, changed in rows:
            videos.append([])
            for seed in columns:
                settings = Settings(seed, steps, cfg, shift=shift, scheduler=scheduler)
                with host.attached(changed, working_room(changed, samples.shape, settings, conditions)):
                    made = sample(changed, text, negative_text, samples, settings, conditions, on_step, host.say)
                videos[-1].append(decode_with(vae)(made))
        sheet = video_sheet(videos, [name for name, _ in rows], [f"seed {seed}" for seed in columns], cell_height)
        return io.NodeOutput(sheet.to(host.intermediate_device()))


def chosen(text: str) -> Iterator[tuple[str, Path]]:
    """(name, file) of every LoRA that the lines of a text stand for."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError("loras is empty. Enter the folder of a training, or LoRA files, one a line.")
    for line in lines:
        folders = [folder for folder in (Path(line), host.output_dir() / line) if folder.is_dir()]
        if folders:
            yield from ((file.stem, file) for _, file in results(folders[0]))
        elif Path(line).is_file():
            yield Path(line).stem, Path(line)
        else:
            yield Path(line).stem, found(line)


def found(name: str) -> Path:
    try:
        return lora_file(name)
    except FileError as error:
        raise FileError(f"{error} Nor is it the folder of a training below {host.output_dir()}.") from error


def numbers(text: str, name: str, kind: type) -> list:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"{name} is {text!r}, which is no list of numbers. Write such as 1, 2.") from error
    if not found:
        raise InputError(f"{name} is empty. Write at least one number.")
    return found


NODES = [CheckpointGrid]
