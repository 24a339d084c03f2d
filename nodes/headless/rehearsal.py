"""A workflow without the work: its nodes pass on sizes in place of tensors, and note what they would do.

Loaders open outlines (no weight is read, nothing downloaded), nodes that only set something up run as they are, and of
those that compute a stand-in notes the phase. So what comes out are the phases of the run that would have been.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...wan_core.errors import InputError, WanError
from ...wan_core.loading.catalog import BY_NAME
from ...wan_core.loading.load import add_module, load_image_encoder, load_model, load_text_encoder, load_vae
from ...wan_core.loading.outline import Outline, open_outline
from ...wan_core.model import Engine, WanVAE, most_tokens
from ...wan_core.planning.forecast import Files, Forecast, forecast
from ...wan_core.planning.machines import Machine
from ...wan_core.planning.phases import (
    Phase,
    decoding_phase,
    encoding_phase,
    free_for,
    image_phase,
    sampling_phase,
    saving_phase,
    text_phase,
)
from ...wan_core.sampling.loop import Settings
from ...wan_core.size import latent_shape, pixel_size, snap_size
from ...wan_core.video import parse_size
from .. import node_classes
from ..host import schema as io
from ..host.standalone import host
from ..library import library_of
from ..load import chosen
from ..vae import tiling
from .core_nodes import NODES as CORE_NODES
from .runner import NodeError, Runner

A_CLIP = 81  # frames, of a video whose length is not known before it is read


@dataclass(frozen=True)
class Sketch:
    """Of a condition: what of it takes memory in the sampler (see adapters.Condition)."""

    in_front: int = 0
    embedded: int = 0


def tensor(*shape: int) -> torch.Tensor:
    """Only a shape."""
    return torch.empty(shape, device="meta")


class Rehearsal:
    """A workflow's run on a machine: its phases, and the files that it loads."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.device = "cpu" if machine.vram is None else "cuda"
        self.phases: list[Phase] = []
        self.files: list[Files] = []
        self.private: dict[nn.Module, int] = {}  # by network, the bytes of its weights that were converted in loading
        self.runner = Runner([cast(self, node) for node in (*node_classes(), *CORE_NODES)], host)

    def run(self, workflow: dict) -> Forecast:
        """What a workflow (ComfyUI's API format) takes of the machine.

        Raises WorkflowError for what is wrong with the workflow, InputError for nodes that cannot be planned.
        """
        quiet, host.quiet = host.quiet, True
        try:
            self.runner.run(workflow)
        except NodeError as error:
            if isinstance(error.__cause__, WanError):
                raise InputError(str(error)) from error
            raise
        finally:
            host.quiet = quiet
        if not any(phase.engine for phase in self.phases):
            raise InputError("Nothing in this workflow loads or runs a model, so there is nothing to plan.")
        machine = replace(self.machine, base=self.machine.base + sum(self.private.values()))
        return forecast(self.phases, machine, self.files)

    # ---- loaders

    def load_model(self, model, weight_dtype, attention, files="", offload=None, library=None):
        outline = self.open("dit", "diffusion_models", model, files, library)
        engine = load_model(outline, weight_dtype, device=self.device, offload=offload)
        self.private[engine.trunk] = converted(engine.module, outline)
        row = BY_NAME.get(model) if not files.strip() else None
        if row and "motion_controller" in row.files:
            engine = add_module(engine, self.open("motion_controller", "diffusion_models", model, files, library))
        return (replace(engine, name=model, **({"preset": row.preset} if row else {})),)

    def add_module(self, model, module, files="", library=None):
        row = BY_NAME.get(module) if not files.strip() else None
        kind = "vace_module" if row is None else "dit" if "vace" in row.adapters else "motion_controller"
        return (add_module(model, self.open(kind, "diffusion_models", module, files, library)),)

    def load_text_encoder(self, text_encoder, weight_dtype, files="", offload=None, library=None, **_):
        outline = self.open("text_encoder", "text_encoders", text_encoder, files, library)
        engine = load_text_encoder(outline, weight_dtype, self.device, offload=offload)
        self.private[engine.module] = converted(engine.module, outline)
        return (engine,)

    def load_vae(self, vae, weight_dtype, files="", library=None, offload=None):
        outline = self.open("vae", "vae", vae, files, library)
        return (load_vae(outline, weight_dtype, self.device, offload=offload),)

    def load_image_encoder(self, image_encoder, weight_dtype, files="", library=None, offload=None):
        outline = self.open("image_encoder", "clip_vision", image_encoder, files, library)
        return (load_image_encoder(outline, weight_dtype, self.device, offload=offload),)

    def open(self, kind: str, folder: str, name: str, files: str, library: Any):
        outline = open_outline(chosen(folder, name, files), kind, library_of(folder, library))
        noted = Files(f"{name} ({kind.replace('_', ' ')})", outline.bytes, outline.missing)
        if noted not in self.files:
            self.files.append(noted)
        return outline

    # ---- what computes

    def encode_text(self, text_encoder, text):
        self.note(text_phase(text_encoder, text))
        return [[tensor(1, most_tokens(text), 1), {}]], ""

    def sample(self, model, positive, latent, seed, steps, cfg, cfg_merge, shift, scheduler, denoise, rand_device,
               negative=None, conditions=(), **_):  # fmt: skip
        settings = Settings(seed, steps, cfg, cfg_merge, shift, scheduler, denoise, rand_device)
        tokens = max(text[0][0].shape[1] for text in (positive, negative) if text is not None)
        self.note(sampling_phase(model, latent["samples"].shape, settings, conditions, tokens))
        return (latent,)

    def decode(self, vae, latent, tiled, tile_size, tile_stride, **_):
        rows, _, *size = latent["samples"].shape
        tiles = tiling(tiled, tile_size, tile_stride)
        self.note(decoding_phase(vae, latent["samples"].shape, free_for(vae, self.machine), **tiles))
        frames, height, width = pixel_size(*size)
        return (tensor(rows * frames, height, width, 3),)

    def decode_and_save(self, vae, latent, tiled, tile_size, tile_stride, **_):
        """Frames go into the file as they come: few of them wait."""
        tiles = tiling(tiled, tile_size, tile_stride)
        phase = decoding_phase(vae, latent["samples"].shape, free_for(vae, self.machine), **tiles)
        kept = phase.kept if phase.detail else phase.kept // latent["samples"].shape[2]  # tiles give all at once
        self.note(replace(phase, name="decode and save", kept=kept))
        return ("",)

    def encode(self, vae, images, fit, tiled, tile_size, tile_stride, latent=None):
        if latent is None:
            width, height, frames, _ = snap_size(images.shape[2], images.shape[1], images.shape[0])
            latent = {"samples": tensor(*latent_shape(width, height, frames))}
        self.look(vae, latent, **tiling(tiled, tile_size, tile_stride))
        return (latent,)

    def save(self, images, **_):
        self.note(saving_phase(*images.shape[:3]))
        return ("",)

    # ---- conditions

    def image_to_video(self, vae, latent, fit, start_image=None, end_image=None, image_encoder=None, conditions=()):
        pictures = [picture for picture in (start_image, end_image) if picture is not None]
        self.see(image_encoder, len(pictures))
        if pictures:
            self.look(vae, latent)
        return ((*conditions, Sketch()),)

    def control_video(self, vae, latent, control_video, fit, extend, conditions=()):
        self.look(vae, latent)
        return ((*conditions, Sketch()),)

    def reference_image(self, vae, latent, image, fit, image_encoder=None, conditions=()):
        self.see(image_encoder, 1)
        self.look(vae, latent, pictures=1)
        return ((*conditions, Sketch(in_front=1)),)

    def camera(self, latent, conditions=(), **_):
        return (*conditions, Sketch(embedded=1)), self.canvas(latent)

    def vace(self, vae, latent, reference_image=None, conditions=(), **_):
        front = 0 if reference_image is None else len(reference_image)
        self.look(vae, latent)
        self.look(vae, latent)  # what is kept, and what is changed
        if front:
            self.look(vae, latent, pictures=1)
        return (*conditions, Sketch(in_front=front)), self.canvas(latent)

    # ---- pictures

    def load_image(self, image):
        with Image.open(host.input_path(image)) as file:
            return tensor(1, file.height, file.width, 3), tensor(1, file.height, file.width)

    def load_video(self, video, frame_rate, num_frames, size):
        width, height = parse_size(size) or (832, 480)
        return tensor(num_frames or A_CLIP, height, width, 3), frame_rate

    def load_mask(self, image, channel):
        return (self.load_image(image)[1],)

    # ---- helpers

    def look(self, vae: Any, latent: dict, pictures: int | None = None, **tiles) -> None:
        """Encode a clip as large as the canvas, or so many pictures."""
        if isinstance(vae, WanVAE):
            frames, height, width = pixel_size(*latent["samples"].shape[2:])
            free = free_for(vae, self.machine)
            self.note(encoding_phase(vae, pictures or frames, height, width, free, **tiles))

    def see(self, image_encoder: Engine | None, count: int) -> None:
        for _ in range(count if image_encoder else 0):
            self.note(image_phase(image_encoder))

    def canvas(self, latent: dict) -> torch.Tensor:
        return tensor(*pixel_size(*latent["samples"].shape[2:]), 3)

    def note(self, phase: Phase) -> None:
        """The same work once more is one phase, which takes as much longer."""
        if phase.engine:
            phase = replace(phase, private=self.private.get(phase.engine.residency.module, 0))
        last = self.phases[-1] if self.phases else None
        if last and (last.name, last.engine, last.work) == (phase.name, phase.engine, phase.work):
            phase = replace(phase, room=max(last.room, phase.room), passes=last.passes + phase.passes)
            self.phases.pop()
        self.phases.append(phase)


def converted(network: nn.Module, outline: Outline) -> int:
    """Bytes of the weights that are not as they are in their file: they take main memory that cannot be given back."""
    stored = {name: outline.dtype(name) for name in outline.shapes}
    named = ((name.removeprefix("trunk.").removeprefix("vace."), x) for name, x in network.named_parameters())
    return sum(x.nbytes for name, x in named if x.is_meta and stored.get(name, x.dtype) != x.dtype)


ROLES = {
    "WanFlowLoadModel": Rehearsal.load_model,
    "WanFlowAddModule": Rehearsal.add_module,
    "WanFlowLoadTextEncoder": Rehearsal.load_text_encoder,
    "WanFlowLoadVAE": Rehearsal.load_vae,
    "WanFlowLoadImageEncoder": Rehearsal.load_image_encoder,
    "WanFlowTextEncode": Rehearsal.encode_text,
    "WanFlowSampler": Rehearsal.sample,
    "WanFlowVAEDecode": Rehearsal.decode,
    "WanFlowVAEEncode": Rehearsal.encode,
    "WanFlowSaveVideo": Rehearsal.save,
    "WanFlowDecodeAndSave": Rehearsal.decode_and_save,
    "WanFlowImageToVideo": Rehearsal.image_to_video,
    "WanFlowControlVideo": Rehearsal.control_video,
    "WanFlowReferenceImage": Rehearsal.reference_image,
    "WanFlowCamera": Rehearsal.camera,
    "WanFlowVACE": Rehearsal.vace,
    "WanFlowLoadVideo": Rehearsal.load_video,
    "LoadImage": Rehearsal.load_image,
    "LoadImageMask": Rehearsal.load_mask,
    "SaveImage": Rehearsal.save,
    "PreviewImage": Rehearsal.save,
}  # fmt: skip
# What these do costs nothing: they set something up, or make a small tensor.
REAL = {"WanFlowOffload", "WanFlowTeaCache", "WanFlowEasyCache", "WanFlowMagCache", "WanFlowSlidingWindow",
        "WanFlowRIFLEx", "WanFlowCompile", "WanFlowMotionSpeed", "WanFlowEmptyLatent", "WanFlowFewSteps",
        "WanFlowApplyLora", "WanFlowLibrary"}  # fmt: skip


def cast(rehearsal: Rehearsal, node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node with its role in the rehearsal in the place of its work."""
    name = node.GET_SCHEMA().node_id
    if name in REAL:
        return node
    role = ROLES.get(name)

    def execute(cls, **inputs):
        if role is None:
            raise InputError(f"{node.GET_SCHEMA().display_name} cannot be planned: leave it out of the workflow.")
        return io.NodeOutput(*role(rehearsal, **inputs))

    return type(node.__name__, (node,), {"execute": classmethod(execute)})
