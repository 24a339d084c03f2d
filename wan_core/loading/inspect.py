"""What a file is, in a page: a model or its parts, a LoRA, or a video or picture and how it was made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import nn

from ..models.image_encoder import ImageEncoderLayout
from ..models.layout import LATENT_CHANNELS, DiTLayout, size_name
from ..models.text_encoder import UMT5Layout
from ..models.vace import VACELayout
from . import catalog
from .catalog import Row
from .checkpoint import Checkpoint, open_checkpoint
from .hub import in_words
from .identify import KINDS, Identity, identify
from .inspect_clip import CLIP_SUFFIXES, clip_page
from .inspect_lora import lora_facts
from .keymaps import UMT5_DECODER, bundled, find_layout, is_marker, strip_prefixes
from .outline import published_layout, published_network
from .page import Fact, page
from .shards import group
from .tiny import is_tiny, keeps_raw

SHOWN_METADATA = 12
SHOWN_NAMES = 4
PLAIN_TYPES = ("float64", "float32", "float16", "bfloat16")
PUBLISHED_WIDTH = 96  # of the VAE
NEAR = 0.5  # the part of names that a file must share with a known model to be called close to it


def inspect(paths: Sequence[Path]) -> str:
    """A page on a file, or on several that are the parts of one checkpoint, or on the checkpoints in a folder.

    Raises FileError in words for what is missing or damaged.
    """
    if paths[0].is_dir():
        return folder_page(paths[0])
    if paths[0].suffix.lower() in CLIP_SUFFIXES:
        return clip_page(paths[0])
    checkpoint = open_checkpoint(paths)
    if kinds := bundled(checkpoint.stored_names.values()):
        parts = (inspect_checkpoint(open_checkpoint(paths, kind)) for kind in kinds)
        return "\n\n".join([f"{checkpoint.description} is an all-in-one checkpoint, with {len(kinds)} models.", *parts])
    return inspect_checkpoint(checkpoint)


def folder_page(folder: Path) -> str:
    """A line for each checkpoint in a folder and its subfolders."""
    lines = []
    for place in (folder, *sorted(path for path in folder.rglob("*") if path.is_dir())):
        for files in group(place):
            try:
                lines.append(sentence(checkpoint := open_checkpoint(files), identify(checkpoint.shapes)))
            except ValueError as error:
                lines.append(str(error))
    return "\n".join(lines) or f"{folder} holds no checkpoints."


def inspect_checkpoint(checkpoint: Checkpoint) -> str:
    identity = identify(checkpoint.shapes)
    facts = [*storage_facts(checkpoint)]
    if identity.kind in KIND_FACTS:
        facts += [("names", naming(checkpoint.stored_names.values())), *KIND_FACTS[identity.kind](checkpoint)]
    elif identity.kind == "unknown":
        facts += unknown_facts(checkpoint)
    facts += metadata_facts(checkpoint)
    if kind := KINDS.get(identity.kind):
        facts.append(("use", f"load it with '{kind.node}'" if kind.node else "no node of this version takes it"))
    return page(sentence(checkpoint, identity), facts)


def sentence(checkpoint: Checkpoint, identity: Identity) -> str:
    if identity.kind == "relative":
        return f"{checkpoint.description}: {identity.summary}"
    return f"{checkpoint.description} is {identity.summary}."


# ---------------------------------------------------------------- any checkpoint


def storage_facts(checkpoint: Checkpoint) -> Iterable[Fact]:
    size = sum(file.stat().st_size for file in checkpoint.files)
    count = f" in {len(checkpoint.files)} files" if len(checkpoint.files) > 1 else ""
    yield "size", f"{in_words(size)}{count}"
    numbers: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for name, shape in checkpoint.shapes.items():
        numbers[checkpoint.storage(name)] += math.prod(shape)
        tensors[checkpoint.storage(name)] += 1
    yield "tensors", f"{len(checkpoint.shapes):,}, {in_millions(sum(numbers.values()))} numbers"
    shares = (f"{kind} {share(count, sum(numbers.values()))}" for kind, count in numbers.most_common())
    yield "types", next(iter(numbers)) if len(numbers) == 1 else ", ".join(shares)
    if packed := {kind: count for kind, count in tensors.items() if kind not in PLAIN_TYPES and not is_odd(kind)}:
        yield "quantised", ", ".join(f"{count:,} tensors {kind}" for kind, count in packed.items())


def is_odd(kind: str) -> bool:
    """Types of tokenizers and marks, which are not weights."""
    return kind in ("uint8", "bool", "int16", "int32", "int64")


def in_millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:,.1f} million"


def share(count: int, total: int) -> str:
    percent = 100 * count / max(total, 1)
    return f"{percent:.1f} %" if percent >= 0.1 else "under 0.1 %"


def naming(names: Iterable[str]) -> str:
    """Whose names the tensors have, and what every one of them begins with."""
    stripped = strip_prefixes(names)
    layout = find_layout(stripped)
    inner, stored = next(((inner, stored) for inner, stored in stripped.items() if not is_marker(inner)), ("", ""))
    prefix = stored.removesuffix(inner)
    whose = f"those of {layout.name}" if layout else "as published"
    return f"{whose}, each behind '{prefix}'" if prefix and stored != inner else whose


def metadata_facts(checkpoint: Checkpoint) -> Iterable[Fact]:
    """What the file says of itself, cut to a page."""
    for mark in sorted(name for name in checkpoint.shapes if name.startswith("model_type.")):
        yield "mark", f"the file calls itself {mark.removeprefix('model_type.')}"
    texts = {key: text for key, text in checkpoint.metadata.items() if key != "format" and text}
    for key, text in list(texts.items())[:SHOWN_METADATA]:
        line = " ".join(str(text).split())
        yield "says", f"{key}: {line[:100]}{' …' if len(line) > 100 else ''}"
    if len(texts) > SHOWN_METADATA:
        yield "says", f"and {len(texts) - SHOWN_METADATA} more notes"


# ---------------------------------------------------------------- each kind


def dit_facts(checkpoint: Checkpoint) -> Iterable[Fact]:
    layout, vace = DiTLayout.from_shapes(checkpoint.shapes), VACELayout.from_shapes(checkpoint.shapes)
    yield "network", (
        f"{layout.layers} blocks, {size_name(layout.dim)}, {layout.heads} heads, feed-forward {layout.ffn_dim}"
    )
    beside = "".join(f" + {count} {name}" for name, count in layout.concat.items())
    yield "input", f"{layout.in_dim} channels: {LATENT_CHANNELS} latent{beside}"
    yield "takes", ", ".join(["text", *taken(layout, vace)])
    yield "published", fits(row for row in catalog.PUBLISHED if is_layout_of(row, layout, vace))


def taken(layout: DiTLayout, vace: VACELayout | None) -> Iterable[str]:
    if layout.image_positions:
        yield "a first and a last image, both looked at by CLIP"
    elif layout.image_tokens:
        yield "an image that CLIP looks at"
    if "control" in layout.concat:
        yield "a control video"
    if layout.reference:
        yield "a reference image"
    if layout.camera_channels:
        yield "camera movement"
    if vace:
        yield f"VACE's video, mask and reference images ({vace.layers} blocks)"


def is_layout_of(row: Row, layout: DiTLayout, vace: VACELayout | None) -> bool:
    if "motion_controller" in row.files:
        return False  # it runs on another model's weights
    return ("vace" in row.adapters) == bool(vace) and published_layout(row) == layout


def fits(rows: Iterable[Row]) -> str:
    """The catalogue's models of one layout, in words."""
    names = [
        f"{row.name} ({row.preset.width}x{row.preset.height}, {row.preset.steps} steps, shift {row.preset.shift:g})"
        for row in rows
    ]
    if not names:
        return "no published model has this layout"
    if len(names) == 1:
        return f"the layout of {names[0]}, and of what was tuned from it"
    return f"one layout of {', '.join(names)}: which of them this is, or is tuned from, only you can know"


def vace_facts(checkpoint: Checkpoint) -> Iterable[Fact]:
    layout = VACELayout.from_shapes(checkpoint.shapes)
    yield "network", f"{layout.layers} blocks, {size_name(layout.dim)}"
    yield "goes with", f"Text to Video models of {size_name(layout.dim)}, and models tuned from them"


def text_encoder_facts(checkpoint: Checkpoint) -> Iterable[Fact]:
    layout = UMT5Layout.from_shapes(checkpoint.shapes)
    yield "network", f"{layout.layers} layers, width {layout.dim}, {layout.heads} heads, {layout.vocabulary:,} words"
    inside = "spiece_model" in checkpoint.shapes
    if unread := sum(name.startswith(UMT5_DECODER) for name in checkpoint.shapes):
        yield "unused", f"{unread} tensors of its decoder, which stay unread"
    yield "tokenizer", "in the file" if inside else "not in the file: looked for beside it, then google/umt5-xxl"


def vae_facts(checkpoint: Checkpoint) -> Iterable[Fact]:
    if is_tiny(checkpoint.shapes):
        width = checkpoint.shapes["encoder.0.weight"][0]
        yield "network", f"base width {width}, 16 latent channels, 8 x 8 pixels and 4 frames to a latent"
        yield "latents", "the full VAE's, as lighttaew2_1" if keeps_raw(checkpoint) else "normalised, as taew2_1"
        return
    width = checkpoint.shapes["encoder.conv1.weight"][0]
    pruned = f", {1 - width / PUBLISHED_WIDTH:.0%} narrower than the published one" if width < PUBLISHED_WIDTH else ""
    yield "network", f"base width {width}{pruned}, 16 latent channels, 8 x 8 pixels and 4 frames to a latent"


def image_encoder_facts(checkpoint: Checkpoint) -> Iterable[Fact]:
    layout = ImageEncoderLayout.from_shapes(checkpoint.shapes)
    yield "network", f"width {layout.dim}; Wan uses the first {layout.layers} layers"
    if unread := sum(not layout.reads(name) for name in checkpoint.shapes):
        yield "unused", f"{unread} tensors, which stay unread (the last layer, and the text tower where there is one)"


def motion_facts(checkpoint: Checkpoint) -> Iterable[Fact]:
    yield "goes with", f"models of {size_name(checkpoint.shapes['linear.0.weight'][0])}"


KIND_FACTS: dict[str, Callable[[Checkpoint], Iterable[Fact]]] = {
    "dit": dit_facts,
    "vace_module": vace_facts,
    "text_encoder": text_encoder_facts,
    "vae": vae_facts,
    "image_encoder": image_encoder_facts,
    "motion_controller": motion_facts,
    "lora": lora_facts,
}


# ---------------------------------------------------------------- what is none of them


def unknown_facts(checkpoint: Checkpoint) -> Iterable[Fact]:
    """The outline of its names, and what it comes close to."""
    groups = Counter(name.split(".")[0] for name in checkpoint.shapes)
    yield "groups", ", ".join(f"{name} ({count})" for name, count in groups.most_common(8))
    largest = sorted(checkpoint.shapes, key=lambda name: -math.prod(checkpoint.shapes[name]))[:SHOWN_NAMES]
    yield "largest", ", ".join(f"{name} {list(checkpoint.shapes[name])}" for name in largest)
    names = {name for name in checkpoint.shapes if not is_marker(name)}
    what, known = max(known_names().items(), key=lambda entry: overlap(names, entry[1]))
    if overlap(names, known) > NEAR:
        yield "close to", f"{what}; {difference('lacks', known - names)}; {difference('has besides', names - known)}"


def known_names() -> dict[str, set[str]]:
    """The names of every model that WanFlow knows."""
    rows = {"T2V": "Wan2.1-T2V-1.3B", "I2V": "Wan2.1-I2V-14B-480P", "VACE": "Wan2.1-VACE-1.3B"}
    models = {f"a diffusion model ({what})": names_of(row, "dit") for what, row in rows.items()}
    encoders = ("text_encoder", "vae", "image_encoder")
    return models | {KINDS[kind].noun: names_of(rows["I2V"], kind) for kind in encoders}


def names_of(row: str, kind: str) -> set[str]:
    network: nn.Module = published_network(catalog.BY_NAME[row], kind)[0]
    return set(network.state_dict())


def overlap(names: set[str], known: set[str]) -> float:
    return len(names & known) / max(len(names | known), 1)


def difference(verb: str, names: set[str]) -> str:
    if not names:
        return f"{verb} nothing"
    return f"{verb} {', '.join(sorted(names)[:SHOWN_NAMES])}{' …' if len(names) > SHOWN_NAMES else ''}"
