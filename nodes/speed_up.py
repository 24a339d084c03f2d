"""Menu WanFlow/speed: ways to run a model faster, or on longer videos, set once for the model."""

from __future__ import annotations

from ..wan_core.models.compiled import MODES, Compile
from ..wan_core.sampling.easycache import EasyCache
from ..wan_core.sampling.magcache import CURVES, MEASURED, MagCache
from ..wan_core.sampling.reuse import AUTO
from ..wan_core.sampling.teacache import COEFFICIENTS, METHODS, TeaCache
from ..wan_core.sampling.windows import FUSE_METHODS, SCHEDULES, Windows
from .host import io
from .wires import WanModel


def model_input() -> io.Input:
    return WanModel.Input("model", tooltip="From Load Wan Model, or any node that changes a model.")


def model_output() -> io.Output:
    return WanModel.Output(display_name="model", tooltip="For Wan Sampler.")


def part_inputs(start: float, why: str = "") -> list[io.Input]:
    """start: the default; why: that is so, a sentence."""
    part = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001}
    first = f"The part of the run from which steps are skipped.{why}"
    last = "The part of the run up to which steps are skipped."
    return [
        io.Float.Input("start", default=start, **part, tooltip=first),
        io.Float.Input("end", default=1.0, **part, tooltip=last),
    ]


def device_input() -> io.Input:
    return io.Combo.Input(
        "device",
        options=["auto", "cpu"],
        default="auto",
        tooltip="Where what is reused is kept. cpu needs no video memory, but takes a moment each step.",
    )


def place(device: str) -> str | None:
    """What that input says, for a cache."""
    return None if device == "auto" else device


class CacheSteps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowTeaCache",
            display_name="Wan TeaCache",
            category="WanFlow/speed",
            description="Leaves the model out in steps that would change little. Twice as fast or more, for somewhat "
            "less detail and motion. The log tells how many steps were skipped.",
            inputs=[
                model_input(),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.001,
                    max=10.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Larger: more steps are skipped. warm-up: 0.05 to 0.1 for 1.3B models, 0.1 to 0.2 for "
                    "14B ones, 0.2 to 0.3 for image models.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(METHODS),
                    default="warm-up",
                    tooltip="warm-up: the authors' better way, never skips the first 5 steps. whole run: their other "
                    "one. DiffSynth: as DiffSynth-Studio does it.",
                ),
                io.Combo.Input(
                    "coefficients",
                    options=[AUTO, *COEFFICIENTS],
                    default=AUTO,
                    tooltip="The model whose measurements are used. auto takes the nearest.",
                ),
                *part_inputs(0.0),
                device_input(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, threshold, preset, coefficients, start, end, device):
        return io.NodeOutput(model.with_cache(TeaCache(threshold, preset, coefficients, start, end, place(device))))


class CacheByItself(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowEasyCache",
            display_name="Wan EasyCache",
            category="WanFlow/speed",
            description="Leaves the model out in steps that would change little, as the run itself shows: for every "
            "model, LoRA and number of steps, without a table. The log tells how many steps were skipped.",
            inputs=[
                model_input(),
                io.Float.Input(
                    "threshold",
                    default=0.05,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    round=0.001,
                    tooltip="How much of the model's answer may be guessed wrong before it is asked again: 0.05 is "
                    "5 %. Larger: faster. 0 skips nothing.",
                ),
                *part_inputs(0.2, " The first steps decide the motion."),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, threshold, start, end):
        return io.NodeOutput(model.with_cache(EasyCache(threshold, start, end)))


class CacheBySize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowMagCache",
            display_name="Wan MagCache",
            category="WanFlow/speed",
            description="Leaves the model out in steps that would change little, by how the size of what it does falls "
            "from step to step: as published for the Wan models, or measured once. The log tells how many steps were "
            "skipped.",
            inputs=[
                model_input(),
                io.Float.Input(
                    "threshold",
                    default=0.12,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    round=0.001,
                    tooltip="The error that skipped steps in a row may add up to. The authors take 0.12 for 1.3B "
                    "models, 0.12 to 0.24 for 14B ones. Larger: faster. 0 skips nothing.",
                ),
                io.Int.Input(
                    "max_skip",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="Steps that may be skipped in a row. The authors take 2 to 4 for 1.3B models, 4 to 6 for "
                    "14B ones.",
                ),
                io.Combo.Input(
                    "curve",
                    options=[AUTO, MEASURED, *CURVES],
                    default=AUTO,
                    tooltip="The model whose sizes count. auto takes the nearest. measured: this one's, with its "
                    "LoRAs; the first run measures them and skips nothing.",
                ),
                *part_inputs(0.2, " The first steps decide the motion."),
                device_input(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, threshold, max_skip, curve, start, end, device):
        return io.NodeOutput(model.with_cache(MagCache(threshold, max_skip, curve, start, end, place(device))))


class SlideWindow(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowSlidingWindow",
            display_name="Wan Sliding Window",
            category="WanFlow/speed",
            description="For long videos: in every step the model sees one window of the video after the other, and "
            "they are blended where they overlap. Counted in latent frames, of which one is four of the video.",
            inputs=[
                model_input(),
                io.Int.Input(
                    "window_size",
                    default=21,
                    min=1,
                    max=1025,
                    tooltip="Latent frames the model sees at once. 21 (81 frames) is what Wan was trained on.",
                ),
                io.Int.Input(
                    "window_stride",
                    default=11,
                    min=1,
                    max=1025,
                    tooltip="Latent frames from one window to the next, at most window_size. Smaller: longer "
                    "overlaps, smoother, slower.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="DiffSynth",
                    optional=True,
                    tooltip="Where windows lie. DiffSynth: as there, the last may be short. standard_static: all of "
                    "full size. standard_uniform: moved in every step, so that edges do not show. looped_uniform: "
                    "round from the end to the beginning too, for videos that loop.",
                ),
                io.Combo.Input(
                    "fuse_method",
                    options=list(FUSE_METHODS),
                    default="overlap-linear",
                    optional=True,
                    tooltip="How windows are blended: in straight lines where they overlap, by the distance from "
                    "their edges, or evenly.",
                ),
                io.Boolean.Input(
                    "freenoise",
                    default=False,
                    optional=True,
                    tooltip="All windows begin with the same noise in another order, so that they resemble each "
                    "other: steadier long videos, less change.",
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls, model, window_size, window_stride, schedule="DiffSynth", fuse_method="overlap-linear", freenoise=False
    ):
        return io.NodeOutput(model.with_windows(Windows(window_size, window_stride, schedule, fuse_method, freenoise)))


class SlowPositions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowRIFLEx",
            display_name="Wan RIFLEx",
            category="WanFlow/speed",
            description="For videos so long that they begin to repeat themselves: slows the one frequency of the "
            "positions that would turn round within the video. Shorter videos stay as they are.",
            inputs=[
                model_input(),
                io.Int.Input(
                    "frequency",
                    default=6,
                    min=1,
                    max=22,
                    tooltip="Which frequency. 6 is slowed from 51 latent frames on (201 frames), 5 from 34 (133), 4 "
                    "from 23 (89). Take the one near to the length after which videos repeat.",
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, frequency):
        return io.NodeOutput(model.with_riflex(frequency))


class CompileModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowCompile",
            display_name="Wan Torch Compile",
            category="WanFlow/speed",
            description="Compiles the model's blocks with torch.compile. The first step takes minutes, the others "
            "are faster. Needs Triton on a GPU, a C++ compiler on a processor.",
            inputs=[
                model_input(),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="default",
                    tooltip="max-autotune-no-cudagraphs tries out more and takes much longer to compile.",
                ),
                io.Boolean.Input(
                    "dynamic",
                    default=True,
                    tooltip="Compiles once for all sizes of video. Off: once for each, which may run a little faster.",
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, mode, dynamic):
        return io.NodeOutput(model.with_compile(Compile(mode, dynamic)))


NODES = [CacheSteps, CacheByItself, CacheBySize, SlideWindow, SlowPositions, CompileModel]
