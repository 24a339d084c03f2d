"""From clips and captions to what the trunk is given: encoded once by the inference's own code, then read from disk.

The encoders work before the training starts, and only on what the cache does not hold; whatever is wrong with a clip
is known by then.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.image import as_pixels
from ..adapters.injection import Canvas, Condition, Injection, inject, side_by_side
from ..errors import InputError, ModelError, WanError
from ..model import Engine, WanImageEncoder, WanTextEncoder, WanVAE
from ..models.network import Network
from ..models.vae import normalised
from .ahead import ahead
from .cache import Cache, digest, module_digest
from .clips import Library
from .dataset import Item
from .framing import Framing
from .inputs import ENCODED, INPUTS, Footage, Piece, read_footage, value_conditions
from .survey import survey

LATENTS = "latents"  # the name of a clip's own, among those of its conditions
LAYOUT = 2  # of the cached tensors; a higher number leaves older caches unread

OnItem = Callable[[int, int], None]  # clips prepared, of how many


@dataclass(frozen=True, eq=False)
class Example:
    """A batch of clips of one size to train on.

    latents (b, 16, T, h, w) normalised; text (b, L, text width), zero after each caption's end; the conditions are for
    all rows. noise, as latents, and sigmas (b,): the other ends of the lines to learn, and where on them; None: drawn.
    """

    latents: Tensor
    text: Tensor
    conditions: tuple[Condition, ...] = ()
    noise: Tensor | None = None
    sigmas: Tensor | None = None


@dataclass(frozen=True)
class Encoders:
    """What is needed to prepare clips. The image encoder may be missing: models then do not look at their images."""

    vae: WanVAE
    text_encoder: WanTextEncoder
    image_encoder: WanImageEncoder | None = None

    def text(self, prompt: str) -> tuple[dict[str, Tensor], str]:
        """The embedded caption without the zeros after it, and what did not fit."""
        rows, lengths, report = self.text_encoder.encode([prompt])
        return {"text": rows[:, : lengths[0]]}, report

    def latents(self, footage: Footage) -> dict[str, Tensor]:
        return {LATENTS: normalised(self.vae.encode(as_pixels(footage.clip)))}

    def condition(self, kind: str, footage: Footage) -> dict[str, Tensor]:
        """The tensors of the condition that the sampler would be given."""
        look = None if self.image_encoder is None else self.image_encoder.encode
        condition = ENCODED[kind].make(footage, self.vae.encode, look)
        return {name: value for name, value in vars(condition).items() if isinstance(value, Tensor)}

    def release(self) -> None:
        """Nothing of them stays on the compute device."""
        for engine in filter(None, (self.vae, self.text_encoder, self.image_encoder)):
            engine.release()


@dataclass(frozen=True)
class Prepared:
    """Where in the cache a clip is: its latents, its text and its conditions by their kinds; and its other inputs."""

    latents: str
    text: str
    conditions: Mapping[str, str]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Examples(Sequence):
    """Prepared clips on disk. A caption is replaced by `no_caption`, the empty one, in a share of the cases."""

    cache: Cache
    clips: tuple[Prepared, ...]
    no_caption: str
    caption_dropout: float = 0.0

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Example:
        clip = self.clips[index]
        latents = self.cache[clip.latents][LATENTS]
        values = value_conditions(clip.values, latents.shape[2])
        return Example(latents, self.cache[clip.text]["text"], (*self._encoded(clip), *values))

    def _encoded(self, clip: Prepared) -> list[Condition]:
        return [ENCODED[kind].kind(**self.cache[name]) for kind, name in clip.conditions.items()]

    @torch.no_grad()
    def check(self, network: Network) -> None:
        """Raises a WanError where the network cannot take the first clip's conditions, or lacks some."""
        clip = self.clips[0]
        inject(self._encoded(clip), network, Canvas(1, *self.cache.shapes(clip.latents)[LATENTS][2:]))
        for condition in value_conditions(clip.values, 1):
            condition.inject(network, Canvas(1, 1, 2, 2))  # a camera's way is long to work out

    def batch(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> Example:
        """Examples of one group side by side. What is random about a row comes from its own generator."""
        return batch([self.drawn(index, generator) for index, generator in zip(indices, generators, strict=True)])

    def drawn(self, index: int, generator: torch.Generator) -> Example:
        example = self[index]
        if self.caption_dropout and torch.rand((), generator=generator) < self.caption_dropout:
            return replace(example, text=self.cache[self.no_caption]["text"])
        return example

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the latents of each clip, (16, T, h, w)."""
        return [self.cache.shapes(clip.latents)[LATENTS][1:] for clip in self.clips]

    @property
    def groups(self) -> list[Hashable]:
        """Clips with equal ones can be in one batch: all their tensors have the same sizes."""
        return [tuple(self._facts(clip)) for clip in self.clips]

    def _facts(self, clip: Prepared) -> Iterator[Hashable]:
        for kind, name in ((LATENTS, clip.latents), *clip.conditions.items()):
            yield kind, tuple(sorted(self.cache.shapes(name).items()))
        yield tuple(sorted({INPUTS[name].condition for name in clip.values}))

    @property
    def facts(self) -> list:
        """All that a training's steps follow from here, as JSON can hold it."""
        return [[asdict(clip) for clip in self.clips], self.caption_dropout and [self.no_caption, self.caption_dropout]]


def prepare(
    items: Sequence[Item],
    framing: Framing,
    encoders: Encoders,
    cache: Cache,
    extra_inputs: Sequence[str] = (),
    on_item: OnItem | None = None,
    *,
    flip: bool = False,
    caption_dropout: float = 0.0,
    workers: int = 0,
) -> tuple[Examples, list[str]]:
    """Encode what the cache does not hold yet; the examples, and a sentence for everything left out or shortened.

    flip: see `survey`; workers: how many clips are read while another one is encoded.
    Raises InputError for an extra input that does not exist, and where nothing is left to train on; ModelError for a
    tiny VAE.
    """
    if encoders.vae.tiny:
        raise ModelError(
            f"{encoders.vae.name} is a tiny VAE, for previews: what is trained on its latents learns its blur. "
            "Train with the full one, Wan2.1_VAE.pth or wan_2.1_vae.safetensors."
        )
    if not 0 <= caption_dropout <= 1:
        raise InputError(f"caption_dropout is {caption_dropout}, but it is a share, from 0 to 1.")
    library = Library(cache.folder / "files.json")
    pieces, notes = survey(items, framing, extra_inputs, library, flip)
    naming = Naming.of(encoders)
    texts, cut = embedded(["", *(piece.item.prompt for piece in pieces)], encoders, cache)
    notes += cut
    encoders.text_encoder.release()

    plans = [(piece, naming.clip(piece, extra_inputs, library)) for piece in pieces]
    library.save()
    clips = []

    def read(plan: tuple[Piece, Mapping[str, str]]) -> Footage | WanError | None:
        piece, names = plan
        try:
            return None if all(name in cache for name in names.values()) else read_footage(piece, extra_inputs)
        except WanError as error:
            return error

    for number, ((piece, names), footage) in enumerate(zip(plans, ahead(read, plans, workers), strict=True), start=1):
        try:
            encode(names, footage, encoders, cache)
        except WanError as error:
            notes.append(f"{piece.item.place} is left out: {error}")
        else:
            clips.append(prepared(piece, names, texts[piece.item.prompt], extra_inputs))
        if on_item is not None:
            on_item(number, len(plans))
    encoders.release()
    if not clips:
        raise InputError("\n".join(["There is nothing to train on.", *notes]))
    return Examples(cache, tuple(clips), texts[""], caption_dropout), notes


def embedded(prompts: Sequence[str], encoders: Encoders, cache: Cache) -> tuple[dict[str, str], list[str]]:
    """Where in the cache each prompt's embedding is (as "text"), and a sentence for each one that had to be cut."""
    naming, notes = Naming.of(encoders), []
    names = {prompt: naming.text(prompt) for prompt in prompts}
    for prompt, name in names.items():
        if name not in cache:
            cache[name], report = encoders.text(prompt)
            notes += [report] if report else []
    return names, notes


def encode(names: Mapping[str, str], footage: Footage | WanError | None, encoders: Encoders, cache: Cache) -> None:
    if isinstance(footage, WanError):
        raise footage
    for kind, name in names.items():
        if name not in cache:
            cache[name] = encoders.latents(footage) if kind == LATENTS else encoders.condition(kind, footage)


def prepared(piece: Piece, names: Mapping[str, str], text: str, extra_inputs: Sequence[str]) -> Prepared:
    columns = piece.item.columns
    return Prepared(
        latents=names[LATENTS],
        text=text,
        conditions={kind: name for kind, name in names.items() if kind != LATENTS},
        values={name: columns[name] for name in extra_inputs if INPUTS[name].form == "value" and name in columns},
    )


@dataclass(frozen=True)
class Naming:
    """Names in the cache for what follows from files, captions and encoders."""

    vae: tuple[str, str]
    text_encoder: tuple[str, str]
    image_encoder: tuple[str, str] | None

    @classmethod
    def of(cls, encoders: Encoders) -> Naming:
        return cls(*(engine and name_of(engine) for engine in vars(encoders).values()))

    def text(self, prompt: str) -> str:
        return digest(LAYOUT, prompt, self.text_encoder)

    def clip(self, piece: Piece, inputs: Sequence[str], library: Library) -> dict[str, str]:
        """The latents' and those of each condition that is encoded, by its kind."""

        cut = asdict(piece.cut), piece.frame_rate, piece.mirrored
        clip = library.content(piece.item.file)
        names = {LATENTS: digest(LAYOUT, clip, cut, self.vae)}
        for kind, encoded in ENCODED.items():
            if own := sorted(name for name in inputs if INPUTS[name].condition == kind):
                files = {name: [*map(library.content, paths)] for name, paths in piece.files(own).items()}
                eyes = self.image_encoder if encoded.looks else None
                names[kind] = digest(LAYOUT, kind, own, clip, files, cut, self.vae, eyes)
        return names


def name_of(engine: Engine) -> tuple[str, str]:
    """What an engine's results follow from."""
    return module_digest(engine.module), str(engine.compute_dtype)


def batch(examples: Sequence[Example]) -> Example:
    """Examples of one group as a single one."""
    if len(examples) == 1:
        return examples[0]
    length = max(example.text.shape[1] for example in examples)
    texts = [F.pad(example.text, (0, 0, 0, length - example.text.shape[1])) for example in examples]
    rows = tuple(example.conditions for example in examples)
    return Example(
        latents=torch.cat([example.latents for example in examples]),
        text=torch.cat(texts),
        conditions=(SideBySide(rows),) if rows[0] else (),
    )


@dataclass(frozen=True, eq=False)
class SideBySide(Condition):
    """For each row of a batch its own conditions, the same kinds in all of them."""

    rows: tuple[tuple[Condition, ...], ...]

    def inject(self, network: Network, canvas: Canvas) -> Injection:
        one = replace(canvas, rows=1)
        return side_by_side(
            [sum((condition.inject(network, one) for condition in row), Injection()) for row in self.rows]
        )
