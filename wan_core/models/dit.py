"""The diffusion transformer of Wan 2.1.

Latent patches become tokens; every block attends over all of them, looks at the text, and passes a feed-forward
network; the time step shifts, scales and gates each of the three. What the model variants add (images, control
videos, cameras, references, VACE, motion speed) arrives through the six `Slots`, so that this file is the same for all.

Module names are those of the published checkpoints (`diffusion_pytorch_model*.safetensors`).
Source: Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models", arXiv 2503.20314, section 4.2.

Types: positions, time and modulation are fp32, the tokens have the type named in `Run`, weights may have any.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import compute
from ..errors import ModelError
from .blocks import Block, Head, PatchEmbedding, Step, once
from .embedders import CameraAdapter, ImageEmbedding, sinusoid
from .layers import GELU, Conv2d, Linear
from .layout import LATENT_CHANNELS, PATCH, DiTLayout
from .rope import rope_table
from .slots import Run, Slots
from .trials import chosen

TEXT_ROWS = 512  # what the published models attend to: shorter texts are followed by zero rows


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
    if text.device.type != "cpu" or compute.PLAIN:
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
        backend = chosen(run.attention, x.device, dtype)
        step = Step(
            text=once(run.kept, self.text_embedding, lambda: self.text_embedding(rows.to(dtype))),
            text_bias=text_bias,
            image=None if slots.context_prefix is None else slots.context_prefix.to(dtype),
            modulation=modulation,
            rope=parallel.split(rope_table(*grid, self.layout.head_dim, x.device, run.riflex), dim=0),
            backend=backend,
            tokens=tokens,
            attend=functools.partial(parallel.attend, tokens=tokens, backend=backend),
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
