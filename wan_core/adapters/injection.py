"""What conditions inject into the trunk, and how several of them add up.

The sampler asks every `Condition` for an `Injection`, sums them, and fills what is left open with the model's neutral
values: `sum(injections, Injection()).fill(neutral(trunk, canvas))`. Two conditions that want the same slot are refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, ModelError
from ..models.blocks import Step
from ..models.dit import DiT
from ..models.network import Network
from ..models.slots import Slots
from ..size import pixel_size

IMAGE_TOKENS = 257  # of one CLIP image: one for the whole, 16 x 16 for its parts


@dataclass(frozen=True)
class Canvas:
    """The latent that is being made: (rows, 16, frames, height, width), in latent units."""

    rows: int
    frames: int
    height: int
    width: int
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def zeros(self, channels: int) -> Tensor:
        """(1, channels, frames, height, width); one row serves every row of the batch."""
        return torch.zeros(1, channels, self.frames, self.height, self.width, dtype=self.dtype, device=self.device)

    def take(self, what: str, latents: Tensor, frames: int | None = None) -> Tensor:
        """`latents` (b, c, frames, height, width), `frames` is the canvas's by default, in its type and place.

        Raises InputError where they were made for a canvas of another size.
        """
        wanted = (self.frames if frames is None else frames, self.height, self.width)
        if latents.shape[2:] != wanted:
            raise InputError(
                f"{what} was prepared for {in_pixels(*latents.shape[2:])}, but the video that is made needs "
                f"{in_pixels(*wanted)}. Connect the same latent to this condition and to the sampler."
            )
        return latents.to(self.device, self.dtype)


def in_pixels(*size: int) -> str:
    """The size of a latent (frames, height, width) as users know it."""
    frames, height, width = pixel_size(*size)
    return f"{width}x{height} with {frames} frame{'' if frames == 1 else 's'}"


class Rank(IntEnum):
    """Which of two image features the model looks at: the higher one."""

    NEUTRAL = 0
    IMAGE = 1
    REFERENCE = 2


class BlockResiduals(Protocol):
    """Something that runs beside the trunk and adds to its tokens after some blocks (VACE)."""

    def start(self, x: Tensor, step: Step, around: Callable) -> Callable[[int, Tensor], Tensor]:
        """Called with the embedded tokens; the answer takes (block number, tokens) and gives the tokens."""

    def rows(self, count: int) -> BlockResiduals:
        """The same for a batch of `count` rows."""

    def frames(self, start: int, stop: int) -> BlockResiduals:
        """The same for the canvas's latent frames start..stop."""

    def beside(self, others: Sequence[BlockResiduals]) -> BlockResiduals:
        """For a batch: this for its first rows, then the others."""


@dataclass(frozen=True, eq=False)
class Injection(Slots):
    """The trunk's slots, with the arithmetic of conditions. Before `fill`, per-frame slots have T frames."""

    context_rank: Rank = Rank.NEUTRAL

    def __add__(self, other: Injection) -> Injection:
        """Both together; an `InputError` where they want the same slot."""
        for name in self.concat.keys() & other.concat.keys():
            raise clash(f"the {name} frames")
        context = self.context_prefix, self.context_rank
        if other.context_prefix is not None:
            if context[0] is not None and self.context_rank == other.context_rank:
                raise clash("the image features")
            if context[0] is None or other.context_rank > self.context_rank:
                context = other.context_prefix, other.context_rank
        return Injection(
            concat={**self.concat, **other.concat},
            embed_add=either("the camera", self.embed_add, other.embed_add),
            prefix_tokens=either("the reference image", self.prefix_tokens, other.prefix_tokens),
            context_prefix=context[0],
            context_rank=context[1],
            time_add=either("the motion speed", self.time_add, other.time_add),
            block_residuals=self.block_residuals + other.block_residuals,
            prefix_frames=either("the frames in front", self.prefix_frames, other.prefix_frames),
        )

    @property
    def prefix(self) -> int:
        """P, how many frames stand in front of the canvas."""
        return 0 if self.prefix_frames is None else self.prefix_frames.shape[2]

    def fill(self, neutral: Injection) -> Injection:
        """Complete: what no condition gave is neutral, and per-frame slots reach over the prefix (zeros there)."""

        def reach(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, 0, self.prefix, 0))

        filled = self if self.context_prefix is not None else replace(self, context_prefix=neutral.context_prefix)
        return filled.map_frames(reach, {**neutral.concat, **self.concat})

    def frames(self, seen: Tensor) -> Injection:
        """A filled injection for these of the canvas's frames alone, (n,) their numbers; the prefix stays whole."""
        prefix = self.prefix

        def cut(x: Tensor) -> Tensor:
            return torch.cat([x[:, :, :prefix], x.index_select(2, prefix + seen)], dim=2)

        residuals = tuple(residual.frames(seen) for residual in self.block_residuals)
        return replace(self.map_frames(cut, self.concat), block_residuals=residuals)

    def map_frames(self, function: Callable[[Tensor], Tensor], concat: Mapping[str, Tensor]) -> Injection:
        """With `function` applied to the slots that have a value for each frame, `concat` in place of its own."""
        embed_add = None if self.embed_add is None else function(self.embed_add)
        return replace(self, concat={name: function(x) for name, x in concat.items()}, embed_add=embed_add)


def either(what: str, first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is not None and second is not None:
        raise clash(what)
    return second if first is None else first


def clash(what: str) -> InputError:
    return InputError(f"Two conditions both set {what}. The model takes one: remove one of the two nodes.")


def misfit(network: Network, what: str, models: str, node: str) -> ModelError:
    """The model cannot take `what`; `models` can, and it comes from `node`."""
    layout = network.trunk.layout
    family, advice = layout.family, f"Load {models}, or remove {node}."
    if network.vace is not None:
        family, advice = "VACE", f"Give it to Wan VACE in place of {node}."
    article = "an" if family[0] in "AEIOU" else "a"
    return ModelError(f"This model takes no {what} (it is {article} {family} model, in_dim {layout.in_dim}). {advice}")


def side_by_side(injections: Sequence[Injection]) -> Injection:
    """Injections of one kind, before `fill`, as one whose rows are theirs: what each row of a batch is given."""
    first = injections[0]

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else torch.cat(values)

    tensors = {
        name: joined([getattr(injection, name) for injection in injections])
        for name in ("embed_add", "prefix_tokens", "context_prefix", "time_add", "prefix_frames")
    }
    residuals = zip(*(injection.block_residuals for injection in injections), strict=True)
    return Injection(
        concat={name: torch.cat([injection.concat[name] for injection in injections]) for name in first.concat},
        block_residuals=tuple(residual.beside(others) for residual, *others in residuals),
        context_rank=first.context_rank,
        **tensors,
    )


def total(injections: Iterable[Injection], neutral: Injection) -> Injection:
    """All injections together, complete."""
    return sum(injections, Injection()).fill(neutral)


def neutral(trunk: DiT, canvas: Canvas) -> Injection:
    """What the model was trained to see where nothing is given: zero frames beside the latents, a zero image."""
    concat = {name: canvas.zeros(channels) for name, channels in trunk.layout.concat.items()}
    if not trunk.layout.image_tokens:
        return Injection(concat=concat)
    features = torch.zeros(1, IMAGE_TOKENS, trunk.layout.image_features, dtype=canvas.dtype, device=canvas.device)
    return Injection(concat=concat, context_prefix=trunk.img_emb(features))


class Condition(ABC):
    """Something a user gives beside the text. Frozen, and free of modules: latents, features, rays, numbers."""

    in_front = 0  # latent frames that it puts in front of the canvas
    embedded = 0  # tensors as large as the tokens that it holds while the model runs

    @abstractmethod
    def inject(self, network: Network, canvas: Canvas) -> Injection:
        """Run the adapter of `network` (in its trunk or beside it) on this; a `WanError` where they do not fit."""


def inject(conditions: Iterable[Condition], network: Network, canvas: Canvas) -> Injection:
    """What all conditions inject together, complete.

    Raises ModelError where the model looks at a picture beside the latents and nothing of what it reads is given.
    """
    injections = [condition.inject(network, canvas) for condition in conditions]
    fallback = neutral(network.trunk, canvas)
    if "image" in fallback.concat and not any(injection.concat for injection in injections):
        control = "Wan Control Video or " if "control" in fallback.concat else ""
        raise ModelError(
            f"This {network.trunk.layout.family} model needs more than the text, but no condition gives it anything. "
            f"Connect {control}Wan First / Last Image; without any picture that makes a video from the text alone."
        )
    return total(injections, fallback)
