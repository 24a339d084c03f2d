"""What is in a file, read from the names and shapes of its tensors, and the sentence when it is the wrong file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import FileError, ModelError
from ..models.layout import DiTLayout, size_name
from .keymaps import bundled

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Identity:
    """`kind` is one of KINDS, or "unknown", or "relative" for models that look like Wan 2.1.

    `summary` completes "This is …" (a relative's is a whole sentence); `family` is filled for diffusion models.
    """

    kind: str
    summary: str
    family: str = ""


@dataclass(frozen=True)
class Kind:
    """How messages speak of one kind of file. `node` is empty where no node takes such a file yet."""

    noun: str
    node: str
    example: str


KINDS = {
    "dit": Kind("a Wan 2.1 diffusion model", "Load Wan Model", "diffusion_pytorch_model.safetensors"),
    "text_encoder": Kind("a UMT5 text encoder", "Load Wan Text Encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
    "vae": Kind("a Wan 2.1 VAE", "Load Wan VAE", "Wan2.1_VAE.pth"),
    "image_encoder": Kind(
        "a CLIP image encoder", "Load Wan Image Encoder", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    ),
    "motion_controller": Kind("a motion speed controller", "Add Wan Module", "model.safetensors"),
    "vace_module": Kind("a VACE module", "Add Wan Module", "Wan2_1-VACE_module_14B_bf16.safetensors"),
    "lora": Kind("a LoRA", "Apply Wan LoRA", "my_lora.safetensors"),
}  # fmt: skip

# Other diffusion models: a part of a tensor's name, and what it is.
STRANGERS = (
    ("double_blocks.", "FLUX or HunyuanVideo"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("input_blocks.", "Stable Diffusion 1, 2 or XL"),
)
LORA_PARTS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", "lora.down.", "lora.up.", ".lokr_w", ".hada_w",
              ".dora_scale", ".oft_", "_loras.")  # fmt: skip
LORA_DOWN = re.compile(r"lora(?:_A|_down|\.down)[\w.]*\.weight$")
LORA_ENDS = (".diff", ".diff_b", ".diff_m", ".set_weight", ".w_norm", ".b_norm")


def identify(shapes: Shapes) -> Identity:
    """What these tensors (published names) are."""
    for test in TESTS:
        if found := test(shapes):
            return found
    some = ", ".join(f"'{name}'" for name in list(shapes)[:3])
    return Identity("unknown", f"an unknown kind of file ({len(shapes)} tensors, among them {some})")


def expect(identity: Identity, kind: str, description: str) -> None:
    """Raise FileError with a sentence that says what to do, unless the file is of this kind."""
    if identity.kind == kind:
        return
    if identity.kind == "relative":
        raise FileError(f"{description} cannot be used. {identity.summary}")
    found, wanted = KINDS.get(identity.kind), KINDS[kind]
    if found is None:
        advice = ""
    elif found.node:
        advice = f"Load it with '{found.node}'. "
    else:
        advice = "This version of WanFlow cannot use it yet. "
    raise FileError(
        f"{description} is {identity.summary}. {advice}'{wanted.node}' needs {wanted.noun}, such as {wanted.example}."
    )


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules there are under a prefix."""
    numbers = {name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)}
    return len([number for number in numbers if number.isdigit()])


def _lora(shapes: Shapes) -> Identity | None:
    text = "\n".join([*shapes, ""])  # searching one text is many times as fast as searching each name
    if not any(part in text for part in (*LORA_PARTS, *(f"{end}\n" for end in LORA_ENDS))):
        return None
    downs = {name: shape for name, shape in shapes.items() if LORA_DOWN.search(name)}
    ranks = sorted({shape[0] for shape in downs.values()})
    widths = {shape[1] for name, shape in downs.items() if "attn" in name and len(shape) == 2}
    facts = [f"{len(shapes)} tensor{'s' if len(shapes) > 1 else ''}"]
    if ranks:
        facts.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}")
    if len(widths) == 1:
        facts.append(f"for {size_name(widths.pop())}")
    return Identity("lora", f"a LoRA ({', '.join(facts)})")


def _bundle(shapes: Shapes) -> Identity | None:
    nouns = [KINDS[kind].noun for kind in bundled(shapes)]
    return Identity("unknown", f"an all-in-one checkpoint ({', '.join(nouns)})") if nouns else None


def _stranger(shapes: Shapes) -> Identity | None:
    text = "\n".join(shapes)
    for part, model in STRANGERS:
        if part in text:
            return Identity("unknown", f"not a Wan 2.1 model but {model}")
    return None


def _dit(shapes: Shapes) -> Identity | None:
    if "patch_embedding.weight" not in shapes or "blocks.0.self_attn.q.weight" not in shapes:
        return None
    try:
        layout = DiTLayout.from_shapes(shapes)
    except ModelError as error:  # a look-alike, which the error names
        return Identity("relative", str(error))
    family = "VACE" if "vace_patch_embedding.weight" in shapes else layout.family
    return Identity("dit", f"a Wan 2.1 diffusion model ({family}, {layout.layers} layers, width {layout.dim})", family)


def _vace_module(shapes: Shapes) -> Identity | None:
    if "vace_patch_embedding.weight" not in shapes:
        return None
    dim = shapes["vace_patch_embedding.weight"][0]
    return Identity("vace_module", f"a VACE module without its base model ({_count(shapes, 'vace_blocks.')} blocks, "
                                   f"width {dim})")  # fmt: skip


def _text_encoder(shapes: Shapes) -> Identity | None:
    if "blocks.0.attn.q.weight" not in shapes or "token_embedding.weight" not in shapes:
        return None
    layers, dim = _count(shapes, "blocks."), shapes["token_embedding.weight"][1]
    tables = sum(name.endswith("pos_embedding.embedding.weight") for name in shapes)
    if tables < layers:  # UMT5 has a position table in every layer, T5 in the first only
        return Identity("unknown", f"a T5 text encoder ({layers} layers, width {dim}), not the UMT5 that Wan 2.1 needs")
    return Identity("text_encoder", f"a UMT5 text encoder ({layers} layers, width {dim})")


def _vae(shapes: Shapes) -> Identity | None:
    if "decoder.22.bias" in shapes:
        return _tiny_vae(shapes)
    if "decoder.mid_block.resnets.0.conv1.weight" in shapes or "decoder.mid.block_1.conv1.weight" in shapes:
        return Identity("unknown", "a VAE in the layout of another model or program, which WanFlow cannot read yet")
    latent = shapes.get("conv2.weight", ())
    if len(latent) != 5 or "decoder.middle.0.residual.0.gamma" not in shapes:
        return None
    if latent[0] != 16:
        return Identity("unknown", f"the VAE of Wan 2.2 ({latent[0]} latent channels instead of 16)")
    if shapes.get("decoder.head.2.weight", (3,))[0] != 3:
        return Identity("unknown", "a VAE that enlarges while it decodes, which WanFlow cannot use")
    if "encoder.conv1.weight" not in shapes:
        return Identity("unknown", "a VAE decoder without its encoder")
    return Identity("vae", f"a Wan 2.1 VAE (base width {shapes['encoder.conv1.weight'][0]})")


def _tiny_vae(shapes: Shapes) -> Identity:
    latent = shapes.get("decoder.1.weight", (0, 0))[1]
    if latent != 16 or shapes["decoder.22.bias"] != (3,):
        return Identity("unknown", f"a tiny preview VAE (TAE) of another model ({latent or 'unknown'} latent channels)")
    if "encoder.0.weight" not in shapes:
        return Identity("unknown", "a tiny preview VAE (TAE) without its encoder")
    return Identity("vae", f"a tiny Wan 2.1 VAE, for previews (base width {shapes['encoder.0.weight'][0]})")


def _image_encoder(shapes: Shapes) -> Identity | None:
    for name in ("visual.cls_embedding", "cls_embedding", "vision_model.embeddings.class_embedding"):
        if name in shapes:
            return Identity("image_encoder", f"a CLIP image encoder (width {shapes[name][-1]})")
    if any(name.startswith("text_model.") for name in shapes):
        return Identity("unknown", "a CLIP text encoder, which Wan 2.1 does not use")
    return None


def _motion_controller(shapes: Shapes) -> Identity | None:
    linears = [shapes.get(f"linear.{i}.weight", ()) for i in (0, 2, 4)]
    if len(shapes) == 6 and all(len(shape) == 2 for shape in linears) and linears[2][0] == 6 * linears[0][0]:
        return Identity("motion_controller", f"a motion speed controller (width {linears[0][0]})")
    return None


def _language_model(shapes: Shapes) -> Identity | None:
    if shapes.keys() & {"embed_tokens.weight", "lm_head.weight", "text_projection", "blk.0.attn_norm.weight"}:
        return Identity("unknown", "a language model or text encoder of another kind, not the UMT5 that Wan 2.1 needs")
    return None


# In this order: a LoRA's names contain those of its base model.
TESTS: tuple[Callable[[Shapes], Identity | None], ...] = (
    _lora, _bundle, _stranger, _dit, _vace_module, _text_encoder, _vae, _image_encoder, _motion_controller,
    _language_model,
)  # fmt: skip
