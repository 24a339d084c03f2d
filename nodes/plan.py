"""What a run will need, before it begins (menu report)."""

from __future__ import annotations

import numpy
import torch

from ..wan_core.errors import InputError
from ..wan_core.models.tokenizer import MAX_TOKENS
from ..wan_core.planning.chart import draw
from ..wan_core.planning.forecast import forecast
from ..wan_core.planning.here import this_machine
from ..wan_core.planning.machines import CARDS, GIB, Machine, card_like
from ..wan_core.planning.phases import (
    Phase,
    decoding_phase,
    encoding_phase,
    free_for,
    image_phase,
    moved,
    sampling_phase,
    saving_phase,
    text_phase,
)
from ..wan_core.planning.report import page
from ..wan_core.sampling.loop import Settings
from ..wan_core.size import pixel_size
from .host import host, io
from .wires import WanConditions, WanImageEncoder, WanModel, WanTextEncoder, WanVAE, latent_samples

HERE = "this machine"


class Plan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowPlan",
            display_name="Wan Plan",
            category="WanFlow/report",
            description="Tells what a run will need of the card and of main memory, which weights stay on the card and "
            "which travel, and whether that costs time. Nothing is computed.",
            is_output_node=True,
            inputs=[
                WanModel.Input("model", tooltip="The model as it goes to Wan Sampler."),
                io.Latent.Input("latent", tooltip="The latent that goes to Wan Sampler."),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="As in Wan Sampler."),
                io.Float.Input(
                    "cfg", default=5.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="As in Wan Sampler."
                ),
                io.Boolean.Input("cfg_merge", default=False, tooltip="As in Wan Sampler."),
                io.Combo.Input(
                    "card",
                    options=[HERE, *(card.name for card in CARDS)],
                    default=HERE,
                    tooltip="The card to plan for: this machine's, or another one.",
                ),
                io.Float.Input(
                    "vram_gb", default=0.0, min=0.0, max=1024.0, step=1.0, round=0.01,
                    tooltip="Its memory in GiB, if it has another size. 0: as it is.",
                ),
                io.Float.Input(
                    "ram_gb", default=0.0, min=0.0, max=8192.0, step=1.0, round=0.01,
                    tooltip="Main memory in GiB. 0: this machine's, or what is usual beside the card.",
                ),
                WanConditions.Input("conditions", optional=True, tooltip="What goes to Wan Sampler."),
                WanTextEncoder.Input("text_encoder", optional=True, tooltip="To plan the prompts too."),
                WanImageEncoder.Input("image_encoder", optional=True, tooltip="To plan looking at a picture too."),
                WanVAE.Input("vae", optional=True, tooltip="To plan encoding and decoding too."),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="A page of text, for any node that shows text."),
                io.Image.Output(display_name="chart", tooltip="The same as a picture."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, latent, steps, cfg, cfg_merge, card, vram_gb, ram_gb, conditions=(), text_encoder=None,
        image_encoder=None, vae=None,
    ):  # fmt: skip
        engines = [engine for engine in (model, text_encoder, image_encoder, vae) if engine is not None]
        machine = machine_of(card, vram_gb, ram_gb, sum(engine.resident_bytes() for engine in engines))
        model, text_encoder, image_encoder, vae = (
            engine and moved(engine, machine) for engine in (model, text_encoder, image_encoder, vae)
        )
        shape = tuple(latent_samples(latent).shape)
        phases = encoders(text_encoder, image_encoder, vae, shape, machine, bool(conditions))
        phases.append(sampling_phase(model, shape, Settings(0, steps, cfg, cfg_merge), conditions))
        frames, height, width = pixel_size(*shape[2:])
        if vae:
            phases.append(decoding_phase(vae, shape, free_for(vae, machine)))
            phases.append(saving_phase(shape[0] * frames, height, width))
        found = forecast(phases, machine)
        report = page(found, f"{model.name}, {width}x{height} with {frames} frames,")
        host.say(report)
        picture = numpy.asarray(draw(found, model.name), dtype=numpy.float32) / 255
        return io.NodeOutput(report, torch.from_numpy(picture)[None], ui={"text": (report,)})


def machine_of(name: str, vram_gb: float, ram_gb: float, held: int) -> Machine:
    """held: bytes of the engines' weights that lie on this machine's card now, and do not count as taken."""
    if name != HERE and name not in (card.name for card in CARDS):
        raise InputError(f"There is no card '{name}' to choose. Choose '{HERE}', or one of the list.")
    machine = this_machine(host.device(), held) if name == HERE else card_like(name)
    return machine.with_sizes(int(vram_gb * GIB) or None, int(ram_gb * GIB) or None)


def encoders(text_encoder, image_encoder, vae, shape, machine: Machine, pictures: bool) -> list[Phase]:
    """What comes before sampling; pictures: whether there are conditions, which the VAE encodes."""
    phases = [text_phase(text_encoder, "?" * MAX_TOKENS)] if text_encoder else []
    phases += [image_phase(image_encoder)] if image_encoder else []
    if vae and pictures:
        phases.append(encoding_phase(vae, *pixel_size(*shape[2:]), free_for(vae, machine)))
    return phases


NODES = [Plan]
