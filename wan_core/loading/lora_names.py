"""The names in LoRA files: the same layer and the same role, as every program writes them.

A tensor's name is that of a layer and what the tensor is for it. Programs part the layer's name by dots or by
underscores, and put words of their own in front; here it is looked up among the names that Wan 2.1 has, written with
underscores, so that `lora_unet_blocks_0_cross_attn_k_img` is never taken apart wrongly.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

import torch

from ..lora import parameters
from ..models.dit import DiT
from ..models.embedders import MotionController
from ..models.layout import DiTLayout, size_name
from ..models.network import Network
from ..models.vace import VACE, VACELayout
from .keymaps import LAYOUTS
from .outline import TRUNKS, VACE_LAYERS

# What a tensor is for its layer, by the end of its name; an adapter's name may stand in it, as in peft. An empty role
# is the word found.
ROLES = tuple(
    (re.compile(pattern + "$"), role)
    for pattern, role in (
        (r"[._]lora(?:_A|_down|\.down|_linear_layer\.down)(?:\.\w+)?\.weight", "down"),
        (r"[._]lora(?:_B|_up|\.up|_linear_layer\.up)(?:\.\w+)?\.weight", "up"),
        (r"[._]lora(?:_B|_up|\.up)(?:\.\w+)?\.bias", "up_bias"),
        (r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)*)", "magnitude"),
        (r"\.(?:diff|w_norm)", "difference"),
        (r"\.(?:diff_b|b_norm)", "bias_difference"),
        (r"\.diff_m", "modulation_difference"),
        (r"\.set_weight", "replacement"),
        (r"\.(\w+(?:\.weight)?)", ""),  # alpha, lokr_w1, …, and what is unknown
    )
)
IN_FRONT = re.compile(
    r"^(?:(?:lora_unet|lora_transformer|lycoris|base_model_model|diffusion_model|transformer|unet|pipe|dit|model"
    r"|module|vace(?=_vace_))_+)+"
)
NUMBERED_BLOCK = re.compile(r"blocks\.(\d+)\.")
NUMBERED = re.compile(r"^(?P<stack>(?:vace_)?blocks)_(?P<number>\d+)_(?P<rest>.+)$")
DIFFUSERS = tuple(
    (re.compile(pattern.replace(r"\.", "_")), replacement.replace(".", "_"))
    for pattern, replacement in next(layout.rules for layout in LAYOUTS if layout.name == "Diffusers")
)


def split(name: str) -> tuple[str, str]:
    """A tensor's name -> (layer, role)."""
    for pattern, role in ROLES:
        if match := pattern.search(name):
            return name[: match.start()], role or match[1]
    return name, ""


def find(layer: str, *endings: str) -> str | None:
    """The published name of the parameter that a layer's name, with one of the endings, stands for."""
    for spelling in spellings(layer):
        for ending in endings:
            if name := look_up(spelling + ending):
                return name
    return None


def spellings(layer: str) -> Iterator[str]:
    """What the layer may be called in the table: as it is, and as Diffusers' name for it."""
    bare = IN_FRONT.sub("", layer.replace(".", "_"))
    yield bare
    for text in (bare.replace("_processor", "") + "_", bare):  # a layer's name goes on, a parameter's ends here
        for pattern, replacement in DIFFUSERS:
            text = pattern.sub(replacement, text)
        yield text.removesuffix("_")


def look_up(name: str) -> str | None:
    numbered = NUMBERED.match(name)
    if not numbered:
        return published_names().get(name)
    stack, number, rest = numbered.groups()
    found = published_names().get(f"{stack}_0_{rest}")
    return found and found.replace(f"{stack}.0.", f"{stack}.{number}.", 1)


@functools.cache
def published_names() -> dict[str, str]:
    """Every parameter's name with underscores -> as published, of models with one block and everything there is."""
    layout = DiTLayout(
        dim=128, ffn_dim=128, layers=1, heads=1, in_dim=36, image_tokens=True, image_positions=1, reference=True,
        camera_channels=1,
    )  # fmt: skip
    with torch.inference_mode(False), torch.device("meta"):
        vace = VACE(VACELayout(dim=128, ffn_dim=128, layers=1, heads=1))
        network = Network(DiT(layout), vace, MotionController(256, 128))
    return {name.replace(".", "_"): name for name in parameters(network)}


# Programs that train VACE alone may call its blocks as the model's are called.
BARE_BLOCKS = re.compile(r"(?<!vace_)(?<![a-z])blocks(?=[._]\d)")
VACE_PROJECTIONS = ("before_proj", "after_proj")
VACE_BLOCKS = {TRUNKS[size]["dim"]: layers for size, layers in VACE_LAYERS.items()}


def in_vace(layer: str) -> str:
    """The same layer of VACE, if a name does not tell whose block it is in."""
    return BARE_BLOCKS.sub("vace_blocks", layer)


def seems_for_vace(stored: Iterable[str], published: Iterable[str], width: int | None) -> str:
    """Why a LoRA whose blocks are called as the model's seems to be for VACE, "" if it does not.

    `stored` are its names in the file, `published` those of the parameters that it would change in a model of `width`.
    """
    if any(projection in name and BARE_BLOCKS.search(name) for name in stored for projection in VACE_PROJECTIONS):
        return "It has projections that only VACE's blocks have"
    blocks = [NUMBERED_BLOCK.match(name) for name in published]
    numbers = {int(block[1]) for block in blocks if block}
    if not all(blocks) or len(numbers) != VACE_BLOCKS.get(width) or numbers != set(range(len(numbers))):
        return ""
    return f"Its blocks are 0 to {len(numbers) - 1}, as many as VACE has for models of {size_name(width)}"


# Published names of layers -> Diffusers' own, for writing.
TO_DIFFUSERS = (
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])$", r".to_\1"),
    (r"\.o$", ".to_out.0"),
    (r"\.([kv])_img$", r".add_\1_proj"),
    (r"\.norm_k_img$", ".norm_added_k"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"),
    (r"\.ffn\.2$", ".ffn.net.2"),
    (r"\.norm3$", ".norm2"),
    (r"\.before_proj$", ".proj_in"),
    (r"\.after_proj$", ".proj_out"),
    (r"^head\.head$", "proj_out"),
    (r"^text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1$", "condition_embedder.time_proj"),
    (r"^img_emb\.proj\.1$", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3$", "condition_embedder.image_embedder.ff.net.2"),
)


def to_diffusers(layer: str) -> str:
    for pattern, replacement in TO_DIFFUSERS:
        layer = re.sub(pattern, replacement, layer)
    return layer
