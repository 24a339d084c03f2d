"""The diffusion transformer of Wan 2.1.

Latent patches become tokens; every block attends over all of them, looks at the text, and passes a feed-forward
network; the time step shifts, scales and gates each of the three. What the model variants add (images, control
videos, cameras, references, VACE, motion speed) arrives through the six `Slots`, so that this file is the same for all.

Module names are those of the published checkpoints (`diffusion_pytorch_model*.safetensors`).
Source: Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models", arXiv 2503.20314, section 4.2; the
adaptive modulation is DiT's (Peebles and Xie, arXiv 2212.09748), the rotary positions RoFormer's (arXiv 2104.09864).

Types: positions, time and modulation are fp32, the tokens have the type named in `Run`, weights may have any.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from .attention import attention
from .embedders import IMAGE_FEATURES, CameraAdapter, ImageEmbedding, sinusoid
from .layers import GELU, Conv2d, Conv3d, LayerNorm, Linear, RMSNorm, linear, widened

LATENT_CHANNELS = 16
PATCH = (1, 2, 2)  # frames, rows and columns of latents in one token
HEAD_DIM = 128
TEXT_ROWS = 512  # what the published models attend to: shorter texts are followed by zero rows
EPS = 1e-6
PRODUCT_TOKENS = 8192  # that go through a linear layer at a time, where results are written over inputs
ROPE_TOKENS = 2048  # that are held in fp32 at a time

# What a model reads beside the latents, by its number of input channels, in the order of the channels.
CONCAT = {
    16: {},
    32: {"image": 16},
    36: {"mask": 4, "image": 16},
    48: {"control": 16, "image": 16},
}
# With 32 channels but no eyes for an image or a camera: Text to Video models that a control LoRA has widened.
CONTROLLED = {"control": 16}

# What models with these input channels are for; some need a closer look, see `DiTLayout.family`.
FAMILIES = {16: "Text to Video", 32: "Fun Control-Camera", 36: "Image to Video or Fun InP", 48: "Fun Control"}

# What users call a model of this width.
SIZES = {1536: " (1.3B)", 3072: " (Wan 2.2 5B)", 5120: " (14B)"}

# Keys and shapes that only other families have, with the family's name.
OTHER_FAMILIES = {
    "casual_audio_encoder": "Wan 2.2 S2V",
    "audio_injector": "Wan 2.2 S2V",
    "face_adapter": "Wan 2.2 Animate",
    "motion_encoder": "Wan 2.2 Animate",
    "audio_proj": "an audio-driven Wan (MultiTalk, HuMo)",
}


@dataclass(frozen=True)
class DiTLayout:
    """Everything that distinguishes one DiT from another, read from its tensors."""

    dim: int
    ffn_dim: int
    layers: int
    heads: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    frequency_dim: int = 256
    image_tokens: bool = False
    image_features: int = IMAGE_FEATURES  # width of the CLIP features that are looked at
    image_positions: int = 0  # rows of img_emb.emb_pos, 0 where there is none
    reference: bool = False  # ref_conv
    camera_channels: int = 0  # of the rays that control_adapter takes, 0 where there is none

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple]) -> DiTLayout:
        """The layout of a checkpoint in the published names; a `ModelError` names a model of another family."""
        for prefix, family in OTHER_FAMILIES.items():
            if any(key.startswith(prefix) for key in shapes):
                raise ModelError(f"This is {family}, not a Wan 2.1 model: it has '{prefix}' weights. {LOAD_WAN21}")
        missing = [key for key in ESSENTIAL if key not in shapes]
        if missing:
            raise ModelError(f"This is not a Wan 2.1 diffusion model: it has no '{missing[0]}'. {LOAD_WAN21}")
        dim, in_dim = shapes["patch_embedding.weight"][:2]
        layout = cls(
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            layers=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
            heads=dim // HEAD_DIM,
            in_dim=in_dim,
            out_dim=shapes["head.head.weight"][0] // math.prod(PATCH),
            text_dim=shapes["text_embedding.0.weight"][1],
            frequency_dim=shapes["time_embedding.0.weight"][1],
            image_tokens="blocks.0.cross_attn.k_img.weight" in shapes,
            image_features=shapes.get("img_emb.proj.0.weight", (IMAGE_FEATURES,))[0],
            image_positions=shapes.get("img_emb.emb_pos", (1, 0))[1],
            reference="ref_conv.weight" in shapes,
            camera_channels=shapes.get("control_adapter.conv.weight", (0, 0))[1] // 64,
        )
        layout.check()
        return layout

    @property
    def family(self) -> str:
        """What such models are for. VACE lies beside a Text to Video trunk."""
        if self.image_positions:
            return "First-Last-Frame to Video"
        if self.is_controlled:
            return "Text to Video with control"
        return "Fun V1.1 Control" if self.reference else FAMILIES[self.in_dim]

    @property
    def is_controlled(self) -> bool:
        """Whether this is a Text to Video model whose input was widened for a control video, by a LoRA or for good."""
        return self.in_dim == 32 and not (self.image_tokens or self.camera_channels)

    @property
    def concat(self) -> Mapping[str, int]:
        """What is read beside the latents, in the order of the channels: name -> number of channels."""
        return CONTROLLED if self.is_controlled else CONCAT[self.in_dim]

    def check(self) -> None:
        """Refuse, by name, the layouts that look alike but belong to Wan 2.2."""
        if self.out_dim == 48:
            raise ModelError(f"This is Wan 2.2 TI2V-5B (48 latent channels), not a Wan 2.1 model. {LOAD_WAN21}")
        if self.in_dim == 52:
            raise ModelError(f"This is Wan 2.2 Fun Control (in_dim 52), not a Wan 2.1 model. {LOAD_WAN21}")
        if self.in_dim == 36 and not self.image_tokens:
            raise ModelError(
                f"This is a Wan 2.2 A14B image model (in_dim 36, no image tokens), not a Wan 2.1 model. {LOAD_WAN21}"
            )
        if self.in_dim not in CONCAT or self.out_dim != LATENT_CHANNELS or self.dim % HEAD_DIM:
            raise ModelError(
                f"No Wan 2.1 model has {self.in_dim} input channels, {self.out_dim} output channels and "
                f"width {self.dim} (a multiple of {HEAD_DIM} is needed). {LOAD_WAN21}"
            )


def size_name(dim: int) -> str:
    return f"width {dim}{SIZES.get(dim, '')}"


LOAD_WAN21 = "Load a Wan 2.1 diffusion model (T2V, I2V, FLF2V, Fun or VACE)."
ESSENTIAL = (
    "patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight", "blocks.0.ffn.0.weight",
    "head.head.weight",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Slots:
    """All that a condition can add to the trunk. T counts the canvas's latent frames, P the prefix's, R references.

    concat          name -> (b, c, P+T, h, w), beside the latents; which names, see `DiTLayout.concat`
    embed_add       (b, dim, P+T, h/2, w/2), added to the embedded patches
    prefix_tokens   (b, dim, R, h/2, w/2), whole embedded frames in front
    context_prefix  (b, n, dim) image tokens, any n
    time_add        (b, 6, dim), added to the blocks' modulation, not to the head's
    block_residuals objects with `start(x, step, around) -> add(i, x)`
    prefix_frames   (b, 16, P, h, w) clean latents of the frames in front; the sampler puts the noisy ones into x
    """

    concat: Mapping[str, Tensor] = field(default_factory=dict)
    embed_add: Tensor | None = None
    prefix_tokens: Tensor | None = None
    context_prefix: Tensor | None = None
    time_add: Tensor | None = None
    block_residuals: tuple = ()
    prefix_frames: Tensor | None = None

    def map_tensors(self, function: Callable[[Tensor], Tensor]):
        """The same slots with `function` applied to each tensor."""
        changed = {name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, concat={name: function(value) for name, value in self.concat.items()}, **changed)

    def rows(self, count: int):
        """For a batch of `count`: one row serves all, b rows are repeated as a whole (as in merged guidance)."""

        def fit(x: Tensor) -> Tensor:
            if x.shape[0] == 1:
                return x.expand(count, *x.shape[1:])
            return x.repeat(count // x.shape[0], *[1] * (x.ndim - 1))

        residuals = tuple(residual.rows(count) for residual in self.block_residuals)
        return replace(self.map_tensors(fit), block_residuals=residuals)


class Step(NamedTuple):
    """What every block is given beside the tokens."""

    text: Tensor  # (b, n, dim)
    text_bias: Tensor | None  # (n,), log of how many equal rows each text row stands for
    image: Tensor | None  # (b, m, dim)
    modulation: Tensor  # (b, 6, dim) fp32
    rope: Tensor  # (tokens, 1, head_dim / 2) complex64
    backend: str  # of attention, see attention.py
    tokens: int  # of the whole video, of which a process may have a part
    attend: Callable[..., Tensor]  # from the video to the video
    split: Callable[[Tensor], Tensor]  # (b, tokens, dim) -> those of this process
    kept: dict | None = None  # see `Run`


def call(module: Callable, *args: Any) -> Any:
    return module(*args)


class Alone:
    """One process has all tokens. In its place, `parallel.Sequence` gives each of several processes a part."""

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """The part of this process of all tokens, which lie along `dim`."""
        return x

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """This process's part (b, n, c) -> all tokens (b, tokens, c)."""
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: int, backend: str) -> Tensor:
        """Attention of this process's part of q to all of k and v, each (b, n, heads, head_dim)."""
        return attention(q, k, v, backend=backend)


@dataclass(frozen=True)
class Run:
    """What differs from call to call, so that handles which share a trunk never write to it.

    `around(module, *args)` calls a module: checkpointing and offload take its place. `body(advance, x)` takes the
    tokens through all blocks by `advance(x)`, which writes over them: a cache may leave that out. `parallel` shares the
    tokens among processes. `kept`: what follows from the text and the image alone is worked out once and kept there,
    for further calls with the same ones; None: it is worked out in each call.
    """

    compute_dtype: torch.dtype = torch.float32
    attention: str = "auto"
    around: Callable = call
    body: Callable = call
    parallel: Alone = field(default_factory=Alone)
    kept: dict | None = None


@functools.lru_cache(maxsize=4)
def rope_table(frames: int, height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Rotations of a grid's tokens, (frames * height * width, 1, head_dim / 2) complex64.

    The first pairs of a head turn with the frame, the others with the row and the column (44 + 42 + 42 of 128).
    """
    space = head_dim // 6 * 2
    widths = (head_dim - 2 * space, space, space)
    with torch.inference_mode(False):  # the table outlives this call, and training must be able to use it
        angles = [
            torch.outer(torch.arange(n, dtype=torch.float64), 10000.0 ** -(torch.arange(0, d, 2).double() / d))
            for n, d in zip((frames, height, width), widths, strict=True)
        ]
        grid = torch.cat(
            [
                angles[0][:, None, None].expand(-1, height, width, -1),
                angles[1][None, :, None].expand(frames, -1, width, -1),
                angles[2][None, None, :].expand(frames, height, -1, -1),
            ],
            dim=-1,
        ).reshape(frames * height * width, 1, head_dim // 2)
        return torch.polar(torch.ones_like(grid), grid).to(torch.complex64).to(device)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn the adjacent pairs of (b, n, heads, head_dim) by the table, in fp32. Writes over an fp32 `x`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(table)).flatten(-2).to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm (b, n, dim) without weights, then times 1 + scale, plus shift, each (b or 1, 1, dim)."""
    scale, shift = (1 + scale).to(x.dtype), shift.to(x.dtype)
    if scale.shape[0] == 1:  # one pass: the norm's own weights do it
        return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale)


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), where each of the tokens (b, n, dim) is worked on alone and keeps its shape.

    Where it may, it works on some of many tokens at a time, and writes the results over `x`.
    """
    if x.shape[1] <= PRODUCT_TOKENS or keeps_inputs():
        return function(x)
    for piece in x.split(PRODUCT_TOKENS, dim=1):
        piece.copy_(function(piece))
    return x


def once(kept: dict | None, key: object, make: Callable):
    """make(), or what it gave before where that was kept."""
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]


def plus(x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    """x + factor * y, which takes the place of `x` where it may."""
    return torch.add(x, y, alpha=factor, out=None if keeps_inputs() else x)


def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, which takes the place of `x` where it may."""
    return torch.addcmul(x, y, gate.to(x.dtype), out=None if keeps_inputs() else x)


def keeps_inputs() -> bool:
    """Whether nothing may be written over: autograd needs it, and the compiler saves memory by itself."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, EPS), RMSNorm(dim, EPS)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Tokens (b, n, dim) -> (b, n, dim)."""
        return self.o(self.look(x, step).flatten(-2))

    def look(self, x: Tensor, step: Step) -> Tensor:
        q = self.turned(self.q(x), self.norm_q, step.rope)
        k = self.turned(self.k(x), self.norm_k, step.rope)
        return step.attend(q, k, self.split(in_pieces(self.v, x)))

    def turned(self, x: Tensor, norm: nn.Module, table: Tensor) -> Tensor:
        """Queries or keys (b, n, dim), normed and turned -> (b, n, heads, head_dim); in pieces as in `in_pieces`."""
        if x.shape[1] <= ROPE_TOKENS or keeps_inputs():
            return rope(self.split(norm(x)), table)
        for piece, turns in zip(x.split(ROPE_TOKENS, dim=1), table.split(ROPE_TOKENS), strict=True):
            piece.copy_(rope(self.split(norm(piece)), turns).flatten(-2))
        return self.split(x)

    def split(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, heads, head_dim), after the norms, which run over all heads at once."""
        return x.unflatten(-1, (self.heads, -1))


class CrossAttention(SelfAttention):
    """Queries from the video, keys and values from the text."""

    def look(self, x: Tensor, step: Step) -> Tensor:
        return self.read(self.split(in_pieces(lambda x: self.norm_q(self.q(x)), x)), step)

    def read(self, q: Tensor, step: Step) -> Tensor:
        k, v = once(step.kept, self, lambda: self.pair(step.text))
        return attention(q, k, v, step.text_bias, step.backend)

    def pair(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Text (b, m, dim) -> keys and values (b, m, heads, head_dim)."""
        return self.split(self.norm_k(self.k(text))), self.split(self.v(text))


class ImageCrossAttention(CrossAttention):
    """Reads the image tokens too, with keys and values of their own."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.k_img, self.v_img = Linear(dim, dim), Linear(dim, dim)
        self.norm_k_img = RMSNorm(dim, EPS)

    def read(self, q: Tensor, step: Step) -> Tensor:
        image = attention(q, *once(step.kept, self.k_img, lambda: self.image_pair(step.image)), backend=step.backend)
        return plus(super().read(q, step), image)

    def image_pair(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (b, m, dim) -> keys and values (b, m, heads, head_dim)."""
        return self.split(self.norm_k_img(self.k_img(image))), self.split(self.v_img(image))


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, hidden: int):
        super().__init__(Linear(dim, hidden), GELU(), Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b, n, dim) -> (b, n, dim). The hidden layer is up to six times as wide: it is held in pieces."""
        return in_pieces(super().forward, x)


class Block(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, heads: int, image_tokens: bool = False):
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.cross_attn = (ImageCrossAttention if image_tokens else CrossAttention)(dim, heads)
        self.norm3 = LayerNorm(dim, EPS)
        self.ffn = FeedForward(dim, ffn_dim)
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Tokens (b, n, dim) -> (b, n, dim), in the place of `x` unless autograd keeps that."""
        # six of (b, 1, dim): shift, scale and gate of the self-attention, then of the feed-forward network
        rows = (self.modulation.float() + step.modulation).split(1, dim=1)
        x = gated_add(x, self.self_attn(modulated_norm(x, *rows[:2]), step), rows[2])
        x = plus(x, self.cross_attn(self.norm3(x), step))
        return gated_add(x, self.ffn(modulated_norm(x, *rows[3:5])), rows[5])


class PatchEmbedding(Conv3d):
    """(b, c, t, h, w) -> (b, t, h/2, w/2, dim). Patches do not overlap, so the convolution is one matrix product."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__(in_dim, dim, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        patches = x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
        return linear(patches, widened(self.weight, x).flatten(1), widened(self.bias, x))


class Head(nn.Module):
    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.head = Linear(dim, out_dim * math.prod(PATCH))
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time[:, None]).split(1, dim=1)
        return self.head(modulated_norm(x, shift, scale))


def split_padding(text: Tensor) -> tuple[Tensor, int]:
    """(b, L, c) -> its rows up to the last that is not zero anywhere in the batch, and how many zero rows follow.

    The published models look at 512 rows, so a shorter text counts as followed by zeros up to there.
    """
    used = torch.linalg.vector_norm(text, dim=-1).amax(dim=0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 0
    return text[:, :length], max(TEXT_ROWS, text.shape[1]) - length


def pad_text(text: Tensor) -> tuple[Tensor, Tensor | None]:
    """The text rows to embed, and the bias (rows,) for their attention scores.

    Zero rows become equal tokens, and n equal tokens draw exactly the attention of one whose score is higher by
    log n. On a CPU that one takes their place; graphics cards' fastest kernels know no bias, so there all are kept.
    """
    if text.device.type != "cpu":
        return F.pad(text, (0, 0, 0, max(0, TEXT_ROWS - text.shape[1]))), None
    text, zeros = split_padding(text)
    if not zeros:
        return text, None
    bias = torch.zeros(text.shape[1] + 1)
    bias[-1] = math.log(zeros)
    return F.pad(text, (0, 0, 0, 1)), bias


class DiT(nn.Module):
    def __init__(self, layout: DiTLayout):
        super().__init__()
        self.layout = layout
        dim = layout.dim
        self.patch_embedding = PatchEmbedding(layout.in_dim, dim)
        self.text_embedding = nn.Sequential(Linear(layout.text_dim, dim), GELU(), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(layout.frequency_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(
            Block(dim, layout.ffn_dim, layout.heads, layout.image_tokens) for _ in range(layout.layers)
        )
        self.head = Head(dim, layout.out_dim)
        if layout.image_tokens:
            self.img_emb = ImageEmbedding(layout.image_features, dim, layout.image_positions)
        if layout.reference:
            self.ref_conv = Conv2d(LATENT_CHANNELS, dim, PATCH[1:], PATCH[1:])
        if layout.camera_channels:
            self.control_adapter = CameraAdapter(layout.camera_channels, dim)
        if not self.head.modulation.is_meta:
            self.initialise()

    def initialise(self) -> None:
        """Random weights to train from, drawn from torch's global generator as the paper's code draws them."""
        for module in self.modules():
            if isinstance(module, (Linear, PatchEmbedding)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
            elif isinstance(module, (Block, Head)):
                nn.init.normal_(module.modulation, std=self.layout.dim**-0.5)
        for layer in (*self.text_embedding, *self.time_embedding):
            if isinstance(layer, Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def widened(self, in_dim: int) -> DiT:
        """The same modules under a layout with further input channels. What makes the weights of these is worked in
        while the model runs (see lora.py)."""
        trunk = copy(self)
        trunk.layout = replace(self.layout, in_dim=in_dim)
        return trunk

    def forward(
        self, x: Tensor, timestep: Tensor, text: Tensor, injection: Slots | None = None, run: Run | None = None
    ) -> Tensor:
        """Predict the velocity (noise - clean) of noisy latents.

        x (b, 16, P+T, h, w) fp32, h and w even; timestep (b,) or (1,), 0..1000, fp32; text (b, L, text_dim), zero after
        its real length; injection: filled (see adapters/injection.py), may be left out for text to video.
        -> (b, 16, P+T, h, w) fp32
        """
        run = run or Run()
        slots = (injection or Slots()).rows(x.shape[0])
        self.check(slots)
        dtype = run.compute_dtype

        time, modulation = self.embed_time(timestep)
        modulation = add(modulation, slots.time_add)

        rows, text_bias = pad_text(text)
        x = torch.cat([x, *(slots.concat[name] for name in self.layout.concat)], dim=1).to(dtype)
        x = add(self.patch_embedding(x), channels_last(slots.embed_add))  # (b, f, h/2, w/2, dim)
        x = prepend(channels_last(slots.prefix_tokens), x)
        grid = x.shape[1:4]
        tokens, parallel = math.prod(grid), run.parallel
        step = Step(
            text=once(run.kept, self.text_embedding, lambda: self.text_embedding(rows.to(dtype))),
            text_bias=text_bias,
            image=None if slots.context_prefix is None else slots.context_prefix.to(dtype),
            modulation=modulation,
            rope=parallel.split(rope_table(*grid, self.layout.dim // self.layout.heads, x.device), dim=0),
            backend=run.attention,
            tokens=tokens,
            attend=functools.partial(parallel.attend, tokens=tokens, backend=run.attention),
            split=parallel.split,
            kept=run.kept,
        )
        x = parallel.split(x.flatten(1, 3))
        x = run.body(functools.partial(self.advance, step=step, slots=slots, around=run.around), x)
        x = parallel.gather(self.head(x, time), tokens).unflatten(1, grid)
        references = 0 if slots.prefix_tokens is None else slots.prefix_tokens.shape[2]
        return unpatchify(x[:, references:]).float()

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (b,) -> embeddings (b, dim) for the head, and the blocks' modulation (b, 6, dim)."""
        time = self.time_embedding(sinusoid(timestep, self.layout.frequency_dim))
        return time, self.time_projection(time).unflatten(1, (6, -1))

    def check(self, slots: Slots) -> None:
        """A `ModelError` where this model needs an input that is not there, or does not know one that is."""
        wanted, given = self.layout.concat, slots.concat
        if set(wanted) != set(given):
            raise ModelError(
                f"This model (in_dim {self.layout.in_dim}) reads {' + '.join(wanted) or 'nothing'} beside the latents, "
                f"but was given {' + '.join(given) or 'nothing'}. Add the conditions it needs, or load another model."
            )
        if self.layout.image_tokens != (slots.context_prefix is not None):
            looks, was = ("looks at an image", "none") if self.layout.image_tokens else ("looks at no image", "one")
            raise ModelError(
                f"This model (in_dim {self.layout.in_dim}) {looks}, but was given {was}. "
                "Change the image condition, or load another model."
            )

    def advance(self, x: Tensor, step: Step, slots: Slots, around: Callable) -> Tensor:
        """Tokens (b, n, dim) through all blocks, which write over them."""
        residuals = [residual.start(x, step, around) for residual in slots.block_residuals]
        for i, block in enumerate(self.blocks):
            x = around(block, x, step)
            for residual in residuals:
                x = residual(i, x)
        return x


def channels_last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.movedim(1, -1)


def add(x: Tensor, extra: Tensor | None) -> Tensor:
    return x if extra is None else x + extra.to(x.dtype)


def prepend(front: Tensor | None, x: Tensor) -> Tensor:
    return x if front is None else torch.cat([front.to(x.dtype), x], dim=1)


def unpatchify(x: Tensor) -> Tensor:
    """(b, t, h/2, w/2, 4c) -> (b, c, t, h, w); a token holds its two rows of two columns of c channels."""
    b, t, h, w, _ = x.shape
    return x.reshape(b, t, h, w, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, t, h * 2, w * 2)
