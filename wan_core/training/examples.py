"""From clips and captions to what the trunk is given: encoded once by the inference's own code, then read from disk.

The encoders work before the training starts, and only on what the cache does not hold; whatever is wrong with a clip
is known by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.image import ImageCondition, as_pixels, image_condition
from ..errors import InputError, WanError
from ..model import Engine, WanImageEncoder, WanTextEncoder, WanVAE
from ..models.vae import normalised
from ..size import pixel_size
from .cache import Cache, digest, file_digest, module_digest
from .dataset import Framing, Item, is_picture

# What a model can be given beside the caption, all of it taken from the clip itself.
EXTRA_INPUTS = ("input_image", "end_image")
LAYOUT = 1  # of the cached tensors; a higher number leaves older caches unread

OnItem = Callable[[int, int], None]  # items prepared, of how many


@dataclass(frozen=True, eq=False)
class Example:
    """A batch of clips of one size to train on.

    latents (b, 16, T, h, w) normalised; text (b, L, text width), zero after each caption's end; the conditions hold a
    row for each clip.
    """

    latents: Tensor
    text: Tensor
    conditions: tuple[ImageCondition, ...] = ()


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

    def clip(self, frames: Tensor, extra_inputs: Sequence[str]) -> dict[str, Tensor]:
        """A clip (F, H, W, 3) in 0..1 as latents, and the condition that the sampler would be given."""
        raw = self.vae.encode(as_pixels(frames))
        tensors = {"latents": normalised(raw)}
        if extra_inputs:
            start = frames[:1] if "input_image" in extra_inputs else None
            end = frames[-1:] if "end_image" in extra_inputs else None
            look = None if self.image_encoder is None else self.image_encoder.encode
            condition = image_condition(start, end, tuple(raw.shape[2:]), self.vae.encode, look)
            tensors |= {f"image.{name}": value for name, value in vars(condition).items() if value is not None}
        return tensors


@dataclass(frozen=True)
class Examples(Sequence):
    """Prepared clips on disk: the names of each one's clip and text in the cache, and the shape of its latents."""

    cache: Cache
    names: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        clip, text = (self.cache[name] for name in self.names[index])
        image = {name.removeprefix("image."): value for name, value in clip.items() if name.startswith("image.")}
        return Example(clip["latents"], text["text"], (ImageCondition(**image),) if image else ())


def prepare(
    items: Sequence[Item],
    framing: Framing,
    encoders: Encoders,
    cache: Cache,
    extra_inputs: Sequence[str] = (),
    on_item: OnItem | None = None,
) -> tuple[Examples, list[str]]:
    """Encode what the cache does not hold yet; the examples, and a sentence for everything left out or shortened.

    Raises InputError for an extra input that is not in `EXTRA_INPUTS`, and where nothing is left to train on.
    """
    for name in extra_inputs:
        if name not in EXTRA_INPUTS:
            raise InputError(f"There is no extra input '{name}'. Choose of {', '.join(EXTRA_INPUTS)}.")
    pixels_to_clip = (module_name(encoders.vae), extra_inputs and module_name(encoders.image_encoder))
    words_to_text = module_name(encoders.text_encoder)
    names, shapes, notes = [], [], []
    for number, item in enumerate(items, start=1):
        clip = digest(LAYOUT, file_digest(item.file), asdict(framing), sorted(extra_inputs), pixels_to_clip)
        text = digest(LAYOUT, item.prompt, words_to_text)
        try:
            if clip not in cache:
                cache[clip] = encoders.clip(framing.read(item.file), extra_inputs)
            if text not in cache:
                cache[text], report = encoders.text(item.prompt)
                notes += [f"{item.place}: {report}"] if report else []
            shape = tuple(cache[clip]["latents"].shape[1:])
            frames, _, _ = pixel_size(*shape[1:])
            if frames < framing.num_frames and not is_picture(item.file):
                notes.append(f"{item.place} has fewer than {framing.num_frames} frames; {frames} are trained on.")
            shapes.append(shape)
            names.append((clip, text))
        except WanError as error:
            notes.append(f"{item.place} is left out: {error}")
        if on_item is not None:
            on_item(number, len(items))
    if not names:
        raise InputError("\n".join(["There is nothing to train on.", *notes]))
    return Examples(cache, tuple(names), tuple(shapes)), notes


def module_name(engine: Engine | None) -> tuple[str, str] | None:
    """What an engine's results follow from."""
    return None if engine is None else (module_digest(engine.module), str(engine.compute_dtype))


def batch(examples: Sequence[Example]) -> Example:
    """Examples of one size as a single one."""
    length = max(example.text.shape[1] for example in examples)
    texts = [F.pad(example.text, (0, 0, 0, length - example.text.shape[1])) for example in examples]
    return Example(
        latents=torch.cat([example.latents for example in examples]),
        text=torch.cat(texts),
        conditions=tuple(map(joined, zip(*(example.conditions for example in examples), strict=True))),
    )


def joined(conditions: Sequence[ImageCondition]) -> ImageCondition:
    """Conditions of one kind as a single one, with a row for each."""
    rows = {field.name: [getattr(condition, field.name) for condition in conditions] for field in fields(conditions[0])}
    return ImageCondition(**{name: None if row[0] is None else torch.cat(row) for name, row in rows.items()})
