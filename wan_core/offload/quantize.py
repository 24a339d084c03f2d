"""The types that weights are kept in, and how they are rounded to eight bits.

An 8-bit float has three bits of mantissa (e4m3fn) or two (e5m2), and few exponents: cast as they are, small weights
fall below the smallest normal number and lose what precision there is. A scale in front moves the largest weight to
the largest number of the type. Integers have no exponent, and so seven bits for what a scale covers: with a scale for
every few numbers they come several times closer. What matters more than its bytes (norms, biases, modulations,
embeddings, the head) keeps its type. What each costs: benchmarks/results/rounding.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError

BLOCK = 32
SMALLEST_SAMPLE = 64  # rows of a matrix that tell how well the others were rounded


@dataclass(frozen=True)
class Storage:
    """How weights are kept.

    dtype   None: each as it is stored
    scales  "row", "tensor" or "block": what `matrices` names is divided by a scale a row, by one, or by one for every
            BLOCK numbers of a row, and rounded to `dtype`. None: cast as it is. To 8-bit floats so is every other
            tensor, as other programs do it.
    """

    dtype: torch.dtype | None = None
    scales: str | None = None

    @property
    def is_narrow(self) -> bool:
        return self.dtype is not None and self.dtype.itemsize == 1


UNSCALED = {
    "auto": Storage(),
    "fp32": Storage(torch.float32),
    "bf16": Storage(torch.bfloat16),
    "fp16": Storage(torch.float16),
}
NARROW = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
SCALES = {"": "row", "_tensor": "tensor", "_cast": None}  # the end of a name -> the scales
STORAGE = UNSCALED | {
    f"{name}{end}": Storage(dtype, scales) for end, scales in SCALES.items() for name, dtype in NARROW.items()
}
STORAGE["int8"] = Storage(torch.int8, "block")


def storage(name: str) -> Storage:
    """Raises InputError for a name that there is not."""
    if name not in STORAGE:
        raise InputError(f"There is no weight_dtype '{name}'. Choose one of {', '.join(STORAGE)}.")
    return STORAGE[name]


def matrices(module: nn.Module) -> set[str]:
    """The names of the weights that eight bits are enough for: of the linear layers inside repeated blocks."""
    blocks = tuple(f"{path}." for path, child in module.named_modules() if isinstance(child, nn.ModuleList))
    layers = (path for path, child in module.named_modules() if isinstance(child, nn.Linear))
    return {f"{path}.weight" for path in layers if path.startswith(blocks)}


def narrowed(weight: Tensor, dtype: torch.dtype, scales: str) -> dict[str, Tensor]:
    """weight (rows, columns) -> itself in `dtype`, and its scale, by which to multiply: () or (rows, 1) fp32, or
    (rows, columns / BLOCK) bf16 (where that does not come out even, one a row)."""
    columns = weight.shape[1]
    block = BLOCK if scales == "block" and columns % BLOCK == 0 else columns
    numbers = weight.float().unflatten(1, (-1, block))  # (rows, blocks, block)
    low, high = torch.aminmax(numbers, dim=2, keepdim=True)
    most = torch.maximum(-low, high)
    if scales == "tensor":
        most = most.amax()
    largest = torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
    scale = torch.where(most > 0, most / largest, 1.0)
    if scales == "block":  # rounded first, so that it is exact; what then lies above the largest number is cut
        scale = scale.to(torch.bfloat16)
        numbers = (numbers / scale).round_().clamp_(-largest, largest)
    else:
        numbers = numbers / scale
    return {"weight": numbers.to(dtype).flatten(1), "scale": scale if scales == "tensor" else scale.squeeze(2)}


def relative_error(found: Tensor, meant: Tensor) -> float:
    """|found - meant| / |meant|, over all numbers."""
    size = torch.linalg.vector_norm(meant.float())
    return float(torch.linalg.vector_norm(found.float() - meant.float()) / size) if size else 0.0


def sampled(rows: int) -> slice:
    """Rows all over a matrix, enough to judge it by."""
    return slice(None, None, max(1, rows // SMALLEST_SAMPLE))
