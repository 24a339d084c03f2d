"""What a LoRA is: its kind and rank, what it changes, which models it was made for, and which program wrote it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from ..lora import IMAGE_PARTS, NUMBERED, Lora
from ..models.changes import Decomposed, Difference, Hadamard, Kronecker, LowRank, Replacement
from ..models.layout import size_name
from .checkpoint import Checkpoint
from .lora_files import factors, load_lora
from .page import Fact, ranges

WORDS = {
    LowRank: "low rank",
    Difference: "whole differences",
    Hadamard: "LoHa",
    Kronecker: "LoKr",
    Decomposed: "DoRA",
    Replacement: "replacements",
}
ORDER = ("self_attn", "cross_attn", "ffn", "q", "k", "v", "o")
# What only one program's names have; the first that fits.
WRITERS = (
    (r"^lycoris_", "LyCORIS or SimpleTuner"),
    (r"^lora_unet__", "VideoX-Fun"),
    (r"^lora_unet_", "kohya, musubi-tuner"),
    (r"^transformer\.", "Diffusers"),
    (r"^base_model\.model\.", "peft"),
    (r"\.default\.weight$", "DiffSynth-Studio"),
    (r"^diffusion_model\.", "ComfyUI, ai-toolkit, diffusion-pipe"),
)


def lora_facts(checkpoint: Checkpoint) -> Iterable[Fact]:
    lora = load_lora(checkpoint.files[0])
    kinds = Counter(WORDS[type(change)] for change in lora.changes.values())
    yield "kind", ", ".join(f"{kind} in {count} parts" for kind, count in kinds.most_common()) or "nothing is readable"
    if ranked := rank_fact(lora):
        yield "rank", ranked
    if lora.width:
        yield "made for", f"models of {size_name(lora.width)}{special_parts(lora)}"
    if lora.controls:
        yield "adds", f"a control video to what Text to Video models read ({lora.channels} input channels)"
    yield "changes", "; ".join(f"{stack}: {layers}" for stack, layers in targets(lora).items())
    if lora.remark:
        yield "remark", lora.remark
    for reason, names in lora.unread.items():
        yield "left out", f"{len(names)} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''}): {reason}"
    yield "written by", written_by(checkpoint.stored_names)


def rank_fact(lora: Lora) -> str:
    """Ranks, and the factor that alpha makes of them."""
    low = [change for change in lora.changes.values() if not isinstance(change, Difference)]
    sizes = [(rank, scale) for _, scale, rank in map(factors, low) if rank]
    if not sizes:
        return ""
    ranks, scales = sorted({rank for rank, _ in sizes}), sorted({scale for _, scale in sizes})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    factor = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    alpha = f", alpha {scales[0] * ranks[0]:g}" if len(ranks) == len(scales) == 1 else ""
    return f"{span}{alpha}, worked in with factor {factor}"


def special_parts(lora: Lora) -> str:
    """What of a model only some have, if the LoRA changes it."""
    found = {
        "that look at an image": any(part in name for name in lora.changes for part in IMAGE_PARTS),
        "with VACE": any(name.startswith("vace_") for name in lora.changes),
        "with a motion speed controller": any(name.startswith("motion_controller.") for name in lora.changes),
    }
    words = [word for word, there in found.items() if there]
    return f", {' and '.join(words)}" if words else ""


def targets(lora: Lora) -> dict[str, str]:
    """Blocks -> the layers changed in all of these; what lies outside of the blocks under "others"."""
    blocks: dict[tuple[str, str], set[int]] = {}  # (stack, layer) -> numbers
    others = []
    for name in lora.changes:
        if match := NUMBERED.match(name):
            stack = "VACE blocks" if match["vace"] else "blocks"
            blocks.setdefault((stack, short(name[match.end() :])), set()).add(int(match["number"]))
        else:
            others.append(short(name))
    lines: dict[str, list[str]] = {}
    for (stack, layer), numbers in sorted(blocks.items(), key=lambda entry: in_order(entry[0][1])):
        lines.setdefault(f"{stack} {ranges(numbers)}", []).append(layer)
    return {stack: joined(layers) for stack, layers in lines.items()} | ({"others": joined(others)} if others else {})


def in_order(layer: str) -> list[int]:
    """Layers as a block calls them, others behind."""
    return [ORDER.index(part) if part in ORDER else len(ORDER) for part in layer.split(".")]


def short(name: str) -> str:
    return name.removesuffix(".weight")


def joined(layers: list[str]) -> str:
    """self_attn.q, self_attn.k -> self_attn.q/k"""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        group, _, leaf = layer.rpartition(".")
        groups.setdefault(group, []).append(leaf)
    return ", ".join(f"{group}.{'/'.join(leaves)}".lstrip(".") for group, leaves in groups.items())


def written_by(stored_names: Mapping[str, str]) -> str:
    for pattern, program in WRITERS:
        if any(re.search(pattern, stored) for stored in stored_names.values()):
            return f"{program}, or for it, by the names"
    return "unknown, by the names"
