"""The packings of weights with scales: fp8 or int8 with one scale or several, rotated int8, nvfp4, mxfp8.

Sources: the layouts of ComfyUI (`comfy_quant`) and of kohya's musubi-tuner; "ConvRot", arXiv 2512.03673 (rotation);
Rouhani et al., "Microscaling Data Formats for Deep Learning", arXiv 2310.10537 (mxfp8); NVIDIA, "Block Scaling Factors
Layout", cuBLAS documentation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

# The values of a 4-bit float with two bits of exponent and one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# The regular Hadamard matrix of size 4; larger ones are its Kronecker powers.
HADAMARD = ((1.0, 1.0, 1.0, -1.0), (1.0, 1.0, -1.0, 1.0), (1.0, -1.0, 1.0, 1.0), (-1.0, 1.0, 1.0, 1.0))
NVFP4_BLOCK = 16  # neighbours in a row that share a scale
MXFP8_BLOCK = 32


def unpack_scaled(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """weight (…, in) times scale, which is one number or (…, blocks) for as many equal blocks of each row."""
    weight, scale = parts["weight"], parts["scale"]
    if scale.ndim == 0:
        return weight.to(dtype) * scale.to(torch.float32)  # a single number keeps the type of the weight
    return blockwise(weight.float(), scale.float()).to(dtype)


def unpack_rotated(group: int, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """As `unpack_scaled`, of a weight whose rows were turned before, `group` neighbours at a time."""
    weight = blockwise(parts["weight"].float(), parts["scale"].float().reshape(-1, 1))
    # The regular Hadamard matrix of this size: symmetric, and with this factor its own inverse
    matrix = reduce(torch.kron, [torch.tensor(HADAMARD, device=weight.device)] * round(math.log(group, 4)))
    return (weight.unflatten(-1, (-1, group)) @ (matrix / math.sqrt(group))).flatten(-2).to(dtype)


def unpack_nvfp4(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """weight (…, in / 2) bytes of two numbers each, block_scale (…, in / 16) fp8, scale one number."""
    weight, values = parts["weight"], torch.tensor(E2M1, device=parts["weight"].device)
    pairs = torch.stack([weight >> 4, weight & 15], dim=-1).flatten(-2)  # the high half comes first
    return blockwise(values[pairs.int()], parts["block_scale"].float() * parts["scale"]).to(dtype)


def unpack_mxfp8(parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """weight (…, in) fp8, scale (…, in / 32) bytes that are exponents of two, 127 for one."""
    return blockwise(parts["weight"].float(), torch.exp2(parts["scale"].float() - 127)).to(dtype)


def blockwise(weight: Tensor, scale: Tensor) -> Tensor:
    """Each row of weight (…, n) in as many equal blocks as scale (…, blocks) has columns, times their scales."""
    return (weight.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def rows_of_tiles(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in cuBLAS's order -> (rows, columns).

    There a tile of 128 rows and 4 columns lies in one piece, row 32 a + b of it as part a of line b; the last tiles
    are padded.
    """
    down, across = -(-rows // 128), -(-columns // 4)
    tiles = tiled.reshape(down, across, 32, 4, 4)  # tile's row, its column, b, a, column in the tile
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)[:rows, :columns].contiguous()
