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
CACHED = 2**17  # numbers at a time
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
    rows, columns = weight.shape
    block = BLOCK if scales == "block" and columns % BLOCK == 0 else columns
    shape, kind = (rows, columns // block), torch.bfloat16 if scales == "block" else torch.float32
    bits = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    scale = torch.empty(() if scales == "tensor" else shape, dtype=kind, device=weight.device)
    if weight.is_meta:
        return {"weight": bits, "scale": scale}
    if scales == "tensor":
        scale.copy_(scale_of(torch.stack(torch.aminmax(weight)).abs().amax(), dtype))
    step = max(1, CACHED // columns)  # what arises on the way stays in the processor's cache: four times as fast
    for begin in range(0, rows, step):
        some = slice(begin, begin + step)
        numbers = weight[some].float().unflatten(1, (-1, block))  # (some, blocks, block)
        if scales != "tensor":
            scale[some] = scale_of(numbers.abs().amax(2), dtype)
        numbers = numbers / (scale if scales == "tensor" else scale[some][..., None])
        if dtype == torch.int8:  # scales were rounded before they were used: what lies above the last number is cut
            limits = torch.iinfo(dtype)
            numbers.round_().clamp_(-limits.max, limits.max)
        bits[some] = numbers.flatten(1).to(dtype)
    return {"weight": bits, "scale": scale}


def scale_of(most: Tensor, dtype: torch.dtype) -> Tensor:
    """By what to divide so that `most` becomes the largest number of the type."""
    limit = torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
    return torch.where(most > 0, most.float() / limit, 1.0)


def relative_error(found: Tensor, meant: Tensor) -> float:
    """|found - meant| / |meant|, over all numbers."""
    size = torch.linalg.vector_norm(meant.float())
    return float(torch.linalg.vector_norm(found.float() - meant.float()) / size) if size else 0.0


def sampled(rows: int) -> slice:
    """Rows all over a matrix, enough to judge it by."""
    return slice(None, None, max(1, rows // SMALLEST_SAMPLE))
