"""Where rows are measured, how often, and how large their networks are."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from comfyui_wanflow.wan_core.loading.outline import TRUNKS
from comfyui_wanflow.wan_core.models.layout import DiTLayout


@dataclass(frozen=True)
class Setting:
    """toy: networks and pictures so small that a row only shows that it works."""

    device: torch.device
    rounds: int
    toy: bool = False
    folder: Path = Path(tempfile.gettempdir()) / "wanflow-benchmarks"  # for checkpoints, which are used again

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def time(self) -> str:
        """What counts: see `measure.Workload`."""
        return "seconds" if self.device.type == "cuda" else "cpu_seconds"

    @property
    def tolerance(self) -> float:
        return 3e-2 if self.dtype == torch.bfloat16 else 1e-4

    def layout(self, model: str, layers: int | None = None) -> DiTLayout:
        sizes = TRUNKS[model]
        if self.toy:
            sizes = {"dim": 256, "ffn_dim": 512, "heads": 2, "layers": 2}
        return DiTLayout(**sizes | ({"layers": min(layers, sizes["layers"])} if layers else {}))

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, rows and columns of latents."""
        return (2, 4, 6) if self.toy else ((frames - 1) // 4 + 1, height // 8, width // 8)

    def clip(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return (min(frames, 5), 32, 32) if self.toy else (frames, height, width)

    @property
    def vae_width(self) -> int:
        return 16 if self.toy else 96
