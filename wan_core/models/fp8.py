"""Products in 8-bit floats, on cards that have them: twice the speed of 16 bits, at the cost of a rounded input.

The input is rounded when it comes, with a scale for each of its rows (or one, where the card's library takes no other),
and multiplied with a weight that lies in 8 bits already.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
STEP = 16  # the kernels need sides that are multiples of it
FIRST_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def has_products(device: torch.device) -> bool:
    """Whether this device multiplies 8-bit floats. A CPU does not: torch would only widen them."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY


_by_rows: dict[tuple[torch.device, torch.dtype], bool] = {}


def takes_row_scales(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device's library multiplies with a scale for each row, tried once: it depends on card and version."""
    if (device, dtype) not in _by_rows:
        a, b = torch.ones(STEP, STEP, device=device).to(E4M3), torch.ones(STEP, STEP, device=device).to(dtype)
        scales = torch.ones(STEP, 1, device=device), torch.ones(1, STEP, device=device)
        try:
            product = torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16)
            _by_rows[device, dtype] = bool((product == STEP).all())
        except (RuntimeError, ValueError):
            _by_rows[device, dtype] = False
    return _by_rows[device, dtype]


# What the compiler takes for constant. Said there (compiled.py): to mark them here would load it with every start.
CONSTANT = (has_products, takes_row_scales)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these can be made here."""
    sides = weight.shape[0] % STEP == 0 and weight.shape[1] % STEP == 0
    return sides and x.dtype == torch.bfloat16 and has_products(x.device)


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, in), weight (out, in) in 8 bits, scale () or (out, 1) fp32, bias (out) in the type of x -> (…, out)."""
    rows, scale = x.flatten(0, -2), scale.float()
    row_scales = scale.ndim > 0
    if row_scales and takes_row_scales(x.device, weight.dtype):
        narrow, factor = narrowed(rows, dim=1)
        y = torch._scaled_mm(narrow, weight.t(), factor, scale.t().contiguous(), bias=bias, out_dtype=x.dtype)
    else:
        narrow, factor = narrowed(rows, dim=None)
        largest = scale.amax()
        plain = None if row_scales else bias
        y = torch._scaled_mm(narrow, weight.t(), factor, largest, bias=plain, out_dtype=x.dtype)
        if row_scales:
            y = y * (scale / largest).t().to(x.dtype)
            y = y if bias is None else y + bias
    return y.unflatten(0, x.shape[:-1])


def narrowed(x: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """x (n, k) -> the same in 8 bits, and the scale by which to multiply it, (n, 1) or () fp32."""
    low, high = torch.aminmax(x) if dim is None else torch.aminmax(x, dim=dim, keepdim=True)
    most = torch.maximum(-low, high).float().clamp_min(LARGEST / torch.finfo(x.dtype).max * 2)
    factor = (LARGEST / most).to(x.dtype)  # rounded first, so that the scale is its exact inverse
    return (x * factor).to(E4M3), factor.float().reciprocal()
