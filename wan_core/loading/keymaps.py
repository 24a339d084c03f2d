"""Tables of tensor names: every layout seen in the wild, mapped to the names of the published checkpoint.

The models use the published names, so the original files need no entry here. A new layout is one more `Layout`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Wrappers put these in front of every name when a model inside them is saved.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "pipe.dit.", "_forward_module.", "module.", "model.",
            "vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "umt5xxl.transformer.")  # fmt: skip
# All-in-one checkpoints (ComfyUI's "Save Checkpoint") hold models of several kinds, each under a prefix.
BUNDLED = {
    "dit": ("model.diffusion_model.",),
    "text_encoder": ("text_encoders.", "cond_stage_model."),
    "vae": ("vae.", "first_stage_model."),
}
# Wrappers that sit anywhere in a name.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Training programs put the weights under one of these, best first.
NESTINGS = ("generator_ema", "ema", "state_dict", "model_state", "model", "generator", "module")
# Tensors that say something about a file and are weights of no module.
MARKERS = ("scaled_fp8", "spiece_model", "model_type.", "log_scale", "umt5xxl.logit_scale")
# The other half of a whole UMT5, which Wan leaves unread (Hugging Face's names, and llama.cpp's).
UMT5_DECODER = ("decoder.", "lm_head.", "dec.", "output.")


@dataclass(frozen=True)
class Layout:
    """Another program's names for the same tensors: `rules` are applied to each name in turn."""

    name: str
    markers: tuple[str, ...]  # names that only this layout has, any of which tells it
    rules: tuple[tuple[str, str], ...]  # pairs of a regular expression and its replacement


LAYOUTS = (
    Layout(
        "Diffusers",
        ("condition_embedder.time_proj.weight",),
        (
            (r"\.attn1\.", ".self_attn."),
            (r"\.attn2\.", ".cross_attn."),
            (r"\.to_([qkv])\.", r".\1."),
            (r"\.to_out\.0\.", ".o."),
            (r"\.add_([kv])_proj\.", r".\1_img."),
            (r"\.norm_added_k\.", ".norm_k_img."),
            (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
            (r"\.ffn\.net\.2\.", ".ffn.2."),
            # norm1 and norm3 of Diffusers carry no weights, its norm2 is the affine one before the cross-attention
            (r"^((?:vace_)?blocks\.\d+)\.norm2\.", r"\1.norm3."),
            (r"^((?:vace_)?blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
            (r"^scale_shift_table$", "head.modulation"),
            (r"^proj_out\.", "head.head."),
            (r"^(vace_blocks\.\d+)\.proj_in\.", r"\1.before_proj."),
            (r"^(vace_blocks\.\d+)\.proj_out\.", r"\1.after_proj."),
            (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
            (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
            (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
            (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
            (r"^condition_embedder\.time_proj\.", "time_projection.1."),
            (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
            (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
            (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
            (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
            (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
        ),
    ),
    Layout(
        "Hugging Face UMT5",
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "block.0.layer.0.SelfAttention.q.weight"),
        (
            (r"^shared\.", "token_embedding."),
            (r"^(?:encoder\.)?embed_tokens\.", "token_embedding."),  # a tied copy, where it is stored
            (r"^(?:encoder\.)?final_layer_norm\.", "norm."),
            (r"^(?:encoder\.)?block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.",
             r"blocks.\1.pos_embedding.embedding."),
            (r"^(?:encoder\.)?block\.(\d+)\.layer\.0\.SelfAttention\.", r"blocks.\1.attn."),
            (r"^(?:encoder\.)?block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
            (r"^(?:encoder\.)?block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
            (r"^(?:encoder\.)?block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
            (r"^(?:encoder\.)?block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
            (r"^(?:encoder\.)?block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
        ),
    ),
    Layout(
        "llama.cpp UMT5",
        ("enc.blk.0.attn_q.weight",),
        (
            (r"^token_embd\.", "token_embedding."),
            (r"^enc\.output_norm\.", "norm."),
            (r"^enc\.blk\.(\d+)\.attn_([qkvo])\.", r"blocks.\1.attn.\2."),
            (r"^enc\.blk\.(\d+)\.attn_norm\.", r"blocks.\1.norm1."),
            (r"^enc\.blk\.(\d+)\.attn_rel_b\.", r"blocks.\1.pos_embedding.embedding."),
            (r"^enc\.blk\.(\d+)\.ffn_norm\.", r"blocks.\1.norm2."),
            (r"^enc\.blk\.(\d+)\.ffn_gate\.", r"blocks.\1.ffn.gate.0."),
            (r"^enc\.blk\.(\d+)\.ffn_up\.", r"blocks.\1.ffn.fc1."),
            (r"^enc\.blk\.(\d+)\.ffn_down\.", r"blocks.\1.ffn.fc2."),
        ),
    ),
    Layout(
        "Diffusers VAE",
        ("encoder.mid_block.attentions.0.to_qkv.weight", "decoder.mid_block.attentions.0.to_qkv.weight"),
        (
            (r"^quant_conv\.", "conv1."),
            (r"^post_quant_conv\.", "conv2."),
            (r"\.norm1\.", ".residual.0."),
            (r"(?<=\d)\.conv1\.", ".residual.2."),
            (r"\.norm2\.", ".residual.3."),
            (r"(?<=\d)\.conv2\.", ".residual.6."),
            (r"\.conv_shortcut\.", ".shortcut."),
            (r"\.conv_in\.", ".conv1."),
            (r"\.norm_out\.", ".head.0."),
            (r"\.conv_out\.", ".head.2."),
            (r"\.mid_block\.attentions\.0\.", ".middle.1."),
            (r"\.mid_block\.resnets\.0\.", ".middle.0."),
            (r"\.mid_block\.resnets\.1\.", ".middle.2."),
            (r"\.down_blocks\.", ".downsamples."),
            # the published decoder counts its blocks through: three residual blocks and an upsampling a level
            *((rf"\.up_blocks\.{level}\.resnets\.{i}\.", f".upsamples.{level * 4 + i}.")
              for level in range(4) for i in range(3)),
            *((rf"\.up_blocks\.{level}\.upsamplers\.0\.", f".upsamples.{level * 4 + 3}.") for level in range(3)),
        ),
    ),
    Layout(
        "Hugging Face CLIP",
        ("vision_model.embeddings.class_embedding",),
        (
            (r"^vision_model\.embeddings\.class_embedding$", "visual.cls_embedding[None][None]"),
            (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.pos_embedding[None]"),
            (r"^vision_model\.embeddings\.patch_embedding\.", "visual.patch_embedding."),
            (r"^vision_model\.pre_layrnorm\.", "visual.pre_norm."),
            (r"^vision_model\.post_layernorm\.", "visual.post_norm."),
            (r"^vision_model\.encoder\.layers\.", "visual.transformer."),
            *((rf"\.self_attn\.{name}_proj\.(\w+)$", rf".attn.to_qkv.\1[{i}]") for i, name in enumerate("qkv")),
            (r"\.self_attn\.out_proj\.", ".attn.proj."),
            (r"\.layer_norm([12])\.", r".norm\1."),
            (r"\.mlp\.fc1\.", ".mlp.0."),
            (r"\.mlp\.fc2\.", ".mlp.2."),
        ),
    ),
    Layout("CLIP's visual tower alone", ("cls_embedding",), ((r"^", "visual."),)),
)  # fmt: skip

# Published names -> those that ComfyUI's own loader knows, where it does not know the published ones.
TO_COMFYUI = {
    "text_encoder": (
        (r"^token_embedding\.", "shared."),
        (r"^norm\.", "encoder.final_layer_norm."),
        (r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
         r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
        (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
        (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
        (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
        (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
        (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
        (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    ),
}  # fmt: skip

# Marks that a rule may leave at the end of a name: "[0]", "[1]", … are the rows of one published tensor, in this order;
# each "[None]" is one more side in front.
STACKED = re.compile(r"^(?P<name>.+)\[(?P<place>\d)\]$")


def is_marker(name: str) -> bool:
    return name.startswith(MARKERS)


def bundled(names: Iterable[str]) -> dict[str, str]:
    """Kind of model -> its prefix, where a file holds models of several kinds; nothing where it holds one."""
    text = "\n".join(["", *names])
    found = {kind: prefix for kind, prefixes in BUNDLED.items() for prefix in prefixes if f"\n{prefix}" in text}
    return found if len(found) > 1 else {}


def strip_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Name without its wrappers -> name in the file. A prefix counts only where every weight carries it."""
    stripped = {name: name for name in names}
    for wrapper in WRAPPERS:
        stripped = {name.replace(wrapper, ""): stored for name, stored in stripped.items()}
    while prefix := _common_prefix(stripped):
        stripped = {name.removeprefix(prefix): stored for name, stored in stripped.items()}
    return stripped


def _common_prefix(names: Mapping[str, str]) -> str | None:
    weights = [name for name in names if not is_marker(name)]
    return next((p for p in PREFIXES if weights and all(name.startswith(p) for name in weights)), None)


def find_layout(names: Mapping[str, str]) -> Layout | None:
    """The foreign layout these names are in; None means the published one, or something unknown."""
    return next((layout for layout in LAYOUTS if any(marker in names for marker in layout.markers)), None)


def published_names(stored_names: Iterable[str]) -> dict[str, str]:
    """Published name -> name in the file, for any known layout and prefix."""
    stripped = strip_prefixes(stored_names)
    layout = find_layout(stripped)
    return {renamed(name, layout.rules): stored for name, stored in stripped.items()} if layout else stripped


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
