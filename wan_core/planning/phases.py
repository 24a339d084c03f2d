"""What a graph does, phase by phase: which engine runs, what it needs beside its weights, and how much it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..adapters.injection import IMAGE_TOKENS
from ..compute import compute_dtype
from ..model import Engine, WanImageEncoder, WanModel, WanTextEncoder, WanVAE
from ..models.blocks import PRODUCT_TOKENS
from ..models.layout import PATCH
from ..models.tiling import Size, ladder, tiles
from ..models.tokenizer import MAX_TOKENS
from ..offload.residency import Residency
from ..sampling.contexts import contexts_room
from ..sampling.loop import Settings, in_front, working_room
from ..sampling.windows import spans_of
from ..size import PIXELS_PER_LATENT, pixel_size
from .machines import Machine
from .work import TINY_DECODE, TINY_ENCODE, VAE_DECODE, VAE_ENCODE, coding_work, image_work, text_work, trunk_work

CARD = torch.device("cuda")
FLOAT = 4  # bytes of a number of what waits between nodes


@dataclass(frozen=True)
class Phase:
    """A step of a run. Sizes in bytes.

    engine  whose weights are used, None where there are none
    room    on the compute device, for the run's own tensors
    spare   there too, if there is so much left when all weights stay
    kept    in main memory: what this makes and what waits for later
    passes  how often all weights are used, with `work` products and sums each time
    unread  of the weights, where they are used in place: the words that are not in the prompt
    private of the weights, those that lie in no file: they were converted when they were loaded
    detail  what a reader wants to know beside the numbers
    """

    name: str
    engine: Engine | None = None
    room: int = 0
    spare: int = 0
    kept: int = 0
    passes: int = 1
    work: float = 0.0
    unread: int = 0
    private: int = 0
    detail: str = ""


def text_phase(encoder: WanTextEncoder, text: str) -> Phase:
    """One prompt."""
    layout, table = encoder.module.layout, encoder.module.token_embedding.weight
    return Phase(
        "text encoding",
        encoder,
        encoder.working_room(text),
        kept=MAX_TOKENS * layout.dim * FLOAT,
        work=text_work(layout),
        unread=table.nbytes,
    )


def image_phase(encoder: WanImageEncoder) -> Phase:
    """One picture."""
    layout = encoder.module.layout
    room = encoder.working_room()
    return Phase("image encoding", encoder, room, layout.positions * layout.dim * FLOAT, 1, image_work(layout))


def encoding_phase(vae: WanVAE, frames: int, height: int, width: int, free: int | None, **tiling) -> Phase:
    """A clip of this size, in pixels, where `free` bytes of the device are free (None: unknown). Tiling: the VAE's."""
    shape = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    estimate = partial(vae.encoding_room, single=frames == 1)
    room, share, detail = coding(estimate, shape, free, tiling)
    work = coding_work(vae.module.width, frames, height, width, TINY_ENCODE if vae.tiny else VAE_ENCODE) * share
    kept = 3 * frames * height * width * FLOAT + reordered(vae, free)
    return Phase("VAE encoding", vae, room, kept, work=work, detail=detail)


def decoding_phase(vae: WanVAE, latent: Sequence[int], free: int | None, **tiling) -> Phase:
    """Latents (b, 16, T, h, w); the rest as for encoding."""
    rows, _, *size = latent
    frames, height, width = pixel_size(*size)
    estimate = partial(vae.decoding_room, single=frames == 1)
    room, share, detail = coding(estimate, tuple(size[1:]), free, tiling)
    work = coding_work(vae.module.width, rows * frames, height, width, TINY_DECODE if vae.tiny else VAE_DECODE) * share
    kept = rows * 3 * frames * height * width * FLOAT + reordered(vae, free)
    return Phase("VAE decoding", vae, room, kept, work=work, detail=detail)


def coding(estimate: Callable, shape: Size, free: int | None, asked: dict) -> tuple[int, float, str]:
    """The room for pictures of this shape of latents, how many times the picture is coded in all, and a word on tiles.

    The steps down to smaller tiles, and the choice among them, are the VAE's own.
    """

    def room(size: Size) -> int:
        return estimate(tuple(PIXELS_PER_LATENT * side for side in size))

    chosen = ladder(shape, **asked).first(lambda size: free is None or room(size) <= free)
    size = chosen.largest(shape)
    if not chosen.tiled:
        return room(size), 1.0, ""
    found = tiles(shape, chosen.tile_size, chosen.tile_stride)
    area = sum((tile.rows.end - tile.rows.begin) * (tile.columns.end - tile.columns.begin) for tile in found)
    height, width = (PIXELS_PER_LATENT * side for side in size)
    return room(size), area / (shape[0] * shape[1]), f"{len(found)} tiles of {width}x{height}"


def reordered(vae: WanVAE, free: int | None) -> int:
    """Bytes of main memory that the weights take in the order in which a processor convolves fastest."""
    return vae.stored_bytes() if free is None and not vae.tiny else 0


def sampling_phase(
    model: WanModel,
    latent: Sequence[int],
    settings: Settings,
    conditions: Sequence[object] = (),
    tokens: int = MAX_TOKENS,
) -> Phase:
    """Latents (b, 16, T, h, w); tokens: of the longest prompt, at most."""
    layout, vace = model.layout, model.module.vace
    rows, _, frames, height, width = latent
    front, branches = in_front(conditions), 1 if settings.cfg == 1 else 2
    steps = [spans_of(model.windows, frames, step) for step in range(settings.steps)]
    sizes = [stop - start + front for spans in steps for start, stop in spans]
    grids = [size * height * width // (PATCH[1] * PATCH[2]) for size in sizes]
    images = layout.image_positions or IMAGE_TOKENS * layout.image_tokens
    work = sum(trunk_work(layout, grid, images, vace and vace.layout) for grid in grids)
    calls = 1 if settings.cfg_merge else branches
    detail = [f"{settings.steps} steps"]
    detail += [f"{branches} prompts{' as one batch' if settings.cfg_merge else ''}"] if branches > 1 else []
    detail += [f"{len(steps[0])} windows"] if len(steps[0]) > 1 else []
    pieces = f", layer by layer in pieces of {PRODUCT_TOKENS}" if grids[0] > PRODUCT_TOKENS else ""
    detail.append(f"{grids[0]} tokens{pieces}")
    detail += ["a control video beside the latents"] if layout.is_controlled else []
    detail += [f"{model.cache.name} will skip some"] if model.cache else []
    return Phase(
        "sampling",
        model,
        working_room(model, latent, settings, conditions),
        kept=rows * 16 * frames * height * width * FLOAT,
        spare=contexts_room(model, [torch.empty(rows, tokens, 1, device="meta")] * branches),
        passes=calls * len(grids),
        work=rows * branches * work / (calls * len(grids)),
        detail=", ".join(detail),
    )


def free_for(vae: WanVAE, machine: Machine) -> int | None:
    """Bytes of the card beside the VAE, which is always there as a whole; None where there is no card."""
    return None if machine.memory is None else machine.memory[1] - vae.total_bytes()


def moved(engine: Engine, machine: Machine) -> Engine:
    """The engine as it would compute there: a card is fast in another type than a processor."""
    device = torch.device("cpu") if machine.vram is None else CARD
    if device.type == engine.device.type:
        return engine
    dtype = torch.float32 if isinstance(engine, WanVAE) and machine.vram is None else compute_dtype(device)
    parts = {"device": device, "compute_dtype": dtype, "residency": _moved(engine.residency, dtype)}
    if isinstance(engine, WanModel):
        parts["beside"] = {name: _moved(weights, dtype) for name, weights in engine.beside.items()}
    return replace(engine, **parts)


def _moved(weights: Residency, dtype: torch.dtype) -> Residency:
    return Residency(weights.module, dtype, weights.rest_on)


def saving_phase(frames: int, height: int, width: int) -> Phase:
    """A clip of this size in pixels, whose frames wait in main memory."""
    return Phase("saving", kept=3 * frames * height * width * FLOAT)
