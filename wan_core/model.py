"""The engines that travel on a graph's wires: a diffusion model, a text encoder, a VAE, each with its weights.

An engine is immutable; `with_…` returns a new handle on the same weights. What a run needs (copies on the compute
device) is attached for the length of the run: `with engine.attached(device) as module: …`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .loading.catalog import Preset
from .models.attention import check_backend
from .models.dit import DiT, DiTLayout
from .models.text_encoder import UMT5Encoder
from .models.tokenizer import MAX_TOKENS, Tokenizer, Tokens
from .models.vae import VideoVAE
from .offload.residency import Residency


@dataclass(frozen=True, eq=False, kw_only=True)
class Engine:
    """A network, where it computes by default and in which type, and the memory promises that hosts rely on."""

    module: nn.Module
    name: str
    device: torch.device
    compute_dtype: torch.dtype
    residency: Residency

    def total_bytes(self) -> int:
        """Bytes of all weights on the compute device."""
        return self.residency.total_bytes()

    def resident_bytes(self) -> int:
        """Bytes that `release` would give back; 0 where the weights are used in place."""
        return self.residency.resident_bytes()

    def ensure(self, budget: int | None = None, device: torch.device | str | None = None) -> int:
        """Keep up to `budget` bytes of weights on the compute device (None: all); returns the bytes kept."""
        return self.residency.ensure(budget, device or self.device)

    def release(self, amount: int | None = None) -> int:
        """Drop at least `amount` bytes from the compute device (None: all); returns the bytes freed."""
        return self.residency.release(amount)

    def attached(self, device: torch.device | str | None = None) -> AbstractContextManager[nn.Module]:
        """The module, ready to compute on `device` (the engine's own by default) inside the `with`. May nest."""
        return self.residency.attached(device or self.device)


@dataclass(frozen=True, eq=False, kw_only=True)
class WanModel(Engine):
    """A diffusion model: the trunk, what is known of it from its tensors, and how to run it."""

    module: DiT
    layout: DiTLayout
    attention: str = "auto"
    preset: Preset = field(default_factory=Preset)

    @property
    def trunk(self) -> DiT:
        return self.module

    def with_attention(self, backend: str) -> WanModel:
        """The same weights, attending by another backend. Raises InputError where it cannot be used."""
        return replace(self, attention=check_backend(backend))


@dataclass(frozen=True, eq=False, kw_only=True)
class WanTextEncoder(Engine):
    """Reads prompts."""

    module: UMT5Encoder
    tokenizer: Tokenizer

    def encode(self, texts: list[str]) -> tuple[Tensor, tuple[int, ...], str]:
        """n texts -> embeddings (n, 512, dim) fp32 on the CPU, zero after each text's real length; the lengths in
        tokens; and a report, "" unless something was cut."""
        tokens = self.tokenizer(texts)
        with self.attached() as module, torch.no_grad():
            rows = module(tokens.ids.to(self.device), tokens.mask.to(self.device), self.compute_dtype)
        rows = rows.float().cpu()  # (n, longest, dim)
        return F.pad(rows, (0, 0, 0, MAX_TOKENS - rows.shape[1])), tokens.lengths, _report(tokens)


@dataclass(frozen=True, eq=False, kw_only=True)
class WanVAE(Engine):
    """Between pixels and raw latents (not normalised). Results are fp32 on the input's device."""

    module: VideoVAE

    def encode(self, pixels: Tensor, **tiling) -> Tensor:
        """(b, 3, 4n+1, 8h, 8w) in -1..1 -> (b, 16, n+1, h, w). Tiling: tiled, tile_size, tile_stride, as the VAE's."""
        with self.attached() as module, torch.no_grad():
            return module.encode(pixels.to(self.device, self.compute_dtype), **tiling).to(pixels.device, torch.float32)

    def decode(self, latents: Tensor, **tiling) -> Tensor:
        """(b, 16, n+1, h, w) -> (b, 3, 4n+1, 8h, 8w) in -1..1. Tiling: tiled, tile_size, tile_stride, as the VAE's."""
        with self.attached() as module, torch.no_grad():
            pixels = module.decode(latents.to(self.device, self.compute_dtype), **tiling)
            return pixels.to(latents.device, torch.float32)


def _report(tokens: Tokens) -> str:
    """What did not fit, one line a text."""
    return "\n".join(
        f"The prompt has {length + count} tokens, the model reads {MAX_TOKENS}: the last {count} were cut ('{text}'). "
        "Shorten it, or put what matters first."
        for text, count, length in zip(tokens.cut, tokens.cut_counts, tokens.lengths, strict=True)
        if count
    )
