"""The data that `wanflow train` and `wanflow validate` name, ready to be used."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...wan_core.errors import InputError
from ...wan_core.model import WanModel, WanVAE
from ...wan_core.sampling.loop import Settings as SamplingSettings
from ...wan_core.training.cache import Cache
from ...wan_core.training.clips import Library
from ...wan_core.training.dataset import Item, files_below, list_items
from ...wan_core.training.examples import Encoders, Examples, embedded, prepare
from ...wan_core.training.framing import Framing
from ...wan_core.training.inputs import Piece, check_inputs, columns, looked_at
from ...wan_core.training.samples import Sample
from ...wan_core.training.survey import survey
from ..host.standalone import host


def items_of(options: Namespace) -> list[Item]:
    check_inputs(options.extra_inputs)
    items, problems = list_items(
        options.dataset_base_path,
        options.dataset_metadata_path,
        options.data_file_keys,
        columns(options.extra_inputs),
        options.caption_prefix,
    )
    if not items:
        raise InputError("\n".join([f"There is nothing to train on in {options.dataset_base_path}.", *problems]))
    for problem in problems:
        host.say(problem)
    return items


def framing_of(options: Namespace) -> Framing:
    return Framing(
        num_frames=options.num_frames,
        height=options.height,
        width=options.width,
        max_pixels=options.max_pixels,
        frame_rate=options.frame_rate,
        buckets=options.buckets,
        lengths=tuple(options.length_buckets),
        sampling=options.frame_sampling,
        samples=options.frame_samples,
    )


def cache_of(options: Namespace) -> Cache:
    return Cache(options.cache_path or options.output_path / "cache")


@dataclass(frozen=True)
class Chosen:
    """Items, the pieces of them that there are, and what was said about the others."""

    items: Sequence[Item]
    pieces: Sequence[Piece]
    told: Sequence[str]


def look_through(options: Namespace, items: Sequence[Item]) -> Chosen:
    """All that is wrong with the items is said: before a model is loaded, or even downloaded."""
    library = Library(cache_of(options).folder / "files.json")
    pieces, told = survey(items, framing_of(options), options.extra_inputs, library, options.flip)
    for sentence in (*told, f"Clips: {len(items)}, pieces of them to train on: {len(pieces)}."):
        host.say(sentence)
    if not pieces:
        raise InputError("There is nothing to train on.")
    return Chosen(items, pieces, told)


def encoded(
    options: Namespace, chosen: Chosen, encoders: Encoders, model: WanModel, on_item: Callable[[int, int], None]
) -> Examples:
    """The first one is tried on the model before the others are encoded."""
    framing, cache, pieces = framing_of(options), cache_of(options), chosen.pieces
    if model.layout.image_tokens and encoders.image_encoder is None and (unseen := looked_at(options.extra_inputs)):
        host.say(
            f"No image encoder is among the models: what is trained does not look at {' and '.join(unseen)}. "
            "Name models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth too, as the model was made with it."
        )
    with host.attached(encoders.vae, room_for(pieces, encoders.vae)):
        first, _ = prepare([pieces[0].item], framing, encoders, cache, options.extra_inputs)
        first.check(model.module)
        examples, notes = prepare(
            chosen.items,
            framing,
            encoders,
            cache,
            options.extra_inputs,
            on_item,
            flip=options.flip,
            caption_dropout=options.caption_dropout,
            workers=options.dataset_num_workers,
        )
    for note in notes:
        if note not in chosen.told:
            host.say(note)
    return examples


def room_for(pieces: Sequence[Piece], vae: WanVAE) -> int:
    """Bytes that the VAE needs to encode the largest of them."""
    return max(vae.encoding_room((piece.cut.height, piece.cut.width)) for piece in pieces)


def validation_sample(options: Namespace, items: Sequence[Item], encoders: Encoders) -> Sample:
    """The video that shows how far a training has come: as large as one of the clips, and with its extra inputs."""
    if not 0 <= options.validation_item < len(items):
        raise InputError(f"validation_item is {options.validation_item}, but the clips are 0 to {len(items) - 1}.")
    item = items[options.validation_item]
    kinds, base = columns(options.validation_inputs), options.dataset_base_path
    check_inputs(list(options.validation_inputs))
    if strange := set(options.validation_inputs) - set(options.extra_inputs):
        raise InputError(f"validation_inputs has {', '.join(sorted(strange))}, which extra_inputs does not name.")
    given = {
        name: files_below(base, value) if kinds[name] else value for name, value in options.validation_inputs.items()
    }
    item = replace(item, prompt=options.validation_prompt or item.prompt, columns={**item.columns, **given})
    cache = cache_of(options)
    examples, _ = prepare([item], framing_of(options), encoders, cache, options.extra_inputs)
    negative = options.validation_negative_prompt
    names, _ = embedded([negative], encoders, cache)
    settings = SamplingSettings(
        options.validation_seed, options.num_inference_steps, options.cfg_scale, shift=options.sigma_shift
    )
    example = examples[0]
    shape = tuple(example.latents.shape)
    return Sample(example.text, cache[names[negative]]["text"], example.conditions, shape, settings)
