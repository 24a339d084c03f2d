"""Menu WanFlow/sampling: the canvas and the sampler."""

from __future__ import annotations

import torch

from ..wan_core.sampling.loop import DENOISE_AS, STATES, Settings, sample, working_room
from ..wan_core.sampling.presets import FEW_STEPS, few_steps
from ..wan_core.sampling.schedules import SOLVERS, read_timesteps
from ..wan_core.size import latent_shape, snap_size
from .host import host, io
from .wires import Choice, WanConditions, WanModel, conditioning_text, latent_samples, refuse_noise_mask


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        side = {"min": 16, "max": 8192, "step": 16}
        return io.Schema(
            node_id="WanFlowEmptyLatent",
            display_name="Empty Wan Latent",
            category="WanFlow/sampling",
            description="The canvas: it alone sets the size and the length of the video for the whole graph.",
            inputs=[
                io.Int.Input("width", default=832, **side, tooltip="Pixels; rounded up to a multiple of 16."),
                io.Int.Input("height", default=480, **side, tooltip="Pixels; rounded up to a multiple of 16."),
                io.Int.Input(
                    "num_frames",
                    default=81,
                    min=1,
                    max=4097,
                    step=4,
                    tooltip="Frames; rounded up to 4n+1. Wan makes 16 a second, and 81 is what it was trained on.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos made in one run."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For latent of Wan Sampler.")],
        )

    @classmethod
    def execute(cls, width, height, num_frames, batch_size):
        width, height, num_frames, note = snap_size(width, height, num_frames)
        if note:
            host.say(note)
        samples = torch.zeros(latent_shape(width, height, num_frames, batch_size), device=host.intermediate_device())
        return io.NodeOutput({"samples": samples})


class FewSteps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowFewSteps",
            display_name="Wan Few Steps",
            category="WanFlow/sampling",
            description="The settings that a distilled model or LoRA was made for, for Wan Sampler: connect each "
            "output to the input of its name.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(FEW_STEPS),
                    default="lightx2v 14B",
                    tooltip="What was loaded, as a checkpoint or as a LoRA. WanTiny-T2V-4steps is built in.",
                ),
            ],
            outputs=[
                io.Int.Output(display_name="steps", tooltip="For steps of Wan Sampler."),
                io.Float.Output(display_name="cfg", tooltip="For cfg: 1, so that no negative is needed."),
                io.Float.Output(display_name="shift", tooltip="For shift."),
                Choice.Output(display_name="scheduler", tooltip="For scheduler."),
                io.String.Output(display_name="timesteps", tooltip="For timesteps; empty where shift spaces them."),
            ],
        )

    @classmethod
    def execute(cls, preset):
        settings = few_steps(preset)
        return io.NodeOutput(settings.steps, settings.cfg, settings.shift, settings.scheduler, settings.timesteps)


class Sampler(io.ComfyNode):
    WORKS_TOGETHER = True  # where several processes run a workflow, all of them have to come here

    @classmethod
    def define_schema(cls):
        part = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001}
        return io.Schema(
            node_id="WanFlowSampler",
            display_name="Wan Sampler",
            category="WanFlow/sampling",
            description="Makes a video in latent space. With an encoded video as latent and denoise below 1, "
            "it changes that video.",
            inputs=[
                WanModel.Input("model", tooltip="From Load Wan Model."),
                io.Conditioning.Input(
                    "positive", tooltip="What the video shows: Wan Prompt, or core's CLIP Text Encode."
                ),
                io.Latent.Input("latent", tooltip="Empty Wan Latent, or a video from Wan VAE Encode."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed and settings give the same video.",
                ),
                io.Combo.Input(
                    "rand_device",
                    options=["cpu", "cuda"],
                    default="cpu",
                    tooltip="Where the noise is drawn. cpu gives the same noise on every machine.",
                ),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="More steps, finer result. WanTiny: 20."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the prompt is followed. Exactly 1 needs no negative and takes half the time.",
                ),
                io.Boolean.Input(
                    "cfg_merge",
                    default=False,
                    tooltip="Runs the positive and the negative prompt as one batch: sometimes faster, more memory.",
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Larger: more steps for the motion; smaller: for detail. Wan: 5; 480p image-to-video: 3.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(SOLVERS),
                    default="euler",
                    tooltip="How the steps are computed. unipc and dpm++ reach a given quality in fewer steps; lcm is "
                    "for distilled models only.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="How much of the latent is made anew. Below 1 only with a video from Wan VAE Encode.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What the video must not show. Needed unless cfg is exactly 1."
                ),
                WanConditions.Input("conditions", optional=True, tooltip="Images, control videos and the like."),
                io.Combo.Input(
                    "denoise_as",
                    options=list(DENOISE_AS),
                    default="DiffSynth",
                    optional=True,
                    tooltip="Where denoise below 1 begins. DiffSynth: exactly there. ComfyUI: as core's KSampler, at "
                    "the nearest step of a longer run. Both run all steps.",
                ),
                io.Combo.Input(
                    "rounding",
                    options=list(STATES),
                    default="none",
                    optional=True,
                    tooltip="none is best. DiffSynth rounds latents and timesteps to bf16 in every step, as "
                    "DiffSynth-Studio does, to make the same video.",
                ),
                io.Float.Input(
                    "cfg_start",
                    default=0.0,
                    **part,
                    optional=True,
                    tooltip="The part of the run from which cfg works. Before it only positive is used, in half the "
                    "time.",
                ),
                io.Float.Input(
                    "cfg_end",
                    default=1.0,
                    **part,
                    optional=True,
                    tooltip="The part of the run up to which cfg works. After it only positive is used, in half the "
                    "time: 0.5 saves a quarter of the run.",
                ),
                io.String.Input(
                    "timesteps",
                    default="",
                    optional=True,
                    tooltip="For distilled models: the noise level of each step, 1000 to 0, such as 1000, 757, 522 for "
                    "FastWan. Empty: as shift spaces them.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For Wan VAE Decode, or core's VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, seed, rand_device, steps, cfg, cfg_merge, shift, scheduler, denoise,
        negative=None, conditions=(), denoise_as="DiffSynth", rounding="none",
        cfg_start=0.0, cfg_end=1.0, timesteps="",
    ):  # fmt: skip
        settings = Settings(
            seed, steps, cfg, cfg_merge, shift, scheduler, denoise, rand_device, denoise_as, rounding,
            cfg_start, cfg_end, read_timesteps(timesteps),
        )  # fmt: skip
        samples = latent_samples(latent)
        refuse_noise_mask(latent)
        text = conditioning_text(positive, "positive")
        negative_text = None if negative is None or cfg == 1 else conditioning_text(negative, "negative")
        progress = host.progress(steps, cls.hidden.unique_id)

        def on_step(step, steps, denoised):
            progress.update(step + 1, denoised)

        with host.attached(model, working_room(model, samples.shape, settings, conditions)):
            result = sample(model, text, negative_text, samples, settings, conditions, on_step, host.say, host.team)
        return io.NodeOutput({"samples": result.to(host.intermediate_device())})


NODES = [EmptyLatent, FewSteps, Sampler]
