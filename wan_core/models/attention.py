"""Scaled dot-product attention by whichever kernel fits the call.

`sdpa` is torch's and always works. The others are separate packages for NVIDIA cards, used when the user names them
(`auto` takes FlashAttention 3 where it is installed for a Hopper card). They know neither fp32 nor a bias: such calls
go to `sdpa`.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    # (b, n, heads, d) -> (b, heads, n, d) and back
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _flash2() -> Callable:
    return importlib.import_module("flash_attn").flash_attn_func


def _flash3() -> Callable:
    function = importlib.import_module("flash_attn_interface").flash_attn_func

    def call(q, k, v):
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # older releases return the log-sum-exp too

    return call


def _sage() -> Callable:
    return functools.partial(importlib.import_module("sageattention").sageattn, tensor_layout="NHD")


PACKAGES = {"flash3": _flash3, "flash2": _flash2, "sage": _sage}
BACKENDS = ("auto", "sdpa", *PACKAGES)


@functools.cache
def _kernel(name: str) -> Callable | None:
    """The function of an optional package, None where the package is absent or does not load."""
    try:
        return PACKAGES[name]()
    except (ImportError, OSError, AttributeError):
        return None


def check_backend(name: str) -> str:
    """`name` if it can be used on this machine, else an `InputError` that says what is missing."""
    if name not in BACKENDS:
        raise InputError(f"There is no attention backend '{name}'. Choose one of {', '.join(BACKENDS)}.")
    if name in PACKAGES and _kernel(name) is None:
        raise InputError(f"The attention backend '{name}' is not installed. Install its package, or choose 'auto'.")
    return name


def fits_packages(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)


@functools.cache
def _say_refused(name: str, dtype: str, device: str) -> None:
    """Once for each case."""
    logging.getLogger("WanFlow").warning(
        "The attention backend '%s' does not know %s on %s: 'sdpa' is used instead.", name, dtype, device
    )


def _auto(q: Tensor) -> str:
    hopper = fits_packages(q) and torch.cuda.get_device_capability(q.device)[0] == 9
    return "flash3" if hopper and _kernel("flash3") else "sdpa"


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v.

    q (b, n, heads, d), k and v (b, m, heads, d) -> (b, n, heads, d); `bias` (m,) is added to every row of scores.
    """
    if bias is not None:
        return _sdpa(q, k, v, bias[None, None, None])
    name = _auto(q) if backend == "auto" else backend
    if name in PACKAGES and fits_packages(q):
        return _kernel(name)(q, k, v)
    if name in PACKAGES:
        _say_refused(name, str(q.dtype).removeprefix("torch."), q.device.type)
    return _sdpa(q, k, v)
