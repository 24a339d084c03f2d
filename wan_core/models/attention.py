"""Scaled dot-product attention by one of several kernels.

`sdpa` leaves the choice to torch and always works; `cudnn` is torch with cuDNN's kernel; the others are packages of
their own. These are for graphics cards and know neither fp32 nor a bias: such calls go to `sdpa`. Which one serves a
run is chosen in trials.py.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..offload.recovery import is_shortage

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

FAILURES = (RuntimeError, ValueError, TypeError, AssertionError)  # by which kernels refuse what they cannot do
EXACT, EIGHT_BITS = 0.01, 0.1  # by how much of its size a kernel's answer may differ from the formula's


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    # (b, n, heads, d) -> (b, heads, n, d) and back
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def _cudnn() -> Kernel:
    if not torch.backends.cudnn.is_available():
        raise ImportError
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    return call


def _flash2() -> Kernel:
    return importlib.import_module("flash_attn").flash_attn_func


def _flash3() -> Kernel:
    function = importlib.import_module("flash_attn_interface").flash_attn_func

    def call(q, k, v):
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # older releases return the log-sum-exp too

    return call


def _sage() -> Kernel:
    return functools.partial(importlib.import_module("sageattention").sageattn, tensor_layout="NHD")


class Source(NamedTuple):
    load: Callable[[], Kernel]  # raises where it is not installed
    package: str  # that it comes with
    tolerance: float = EXACT


SOURCES = {
    "cudnn": Source(_cudnn, "torch for CUDA"),
    "flash3": Source(_flash3, "flash_attn_3"),
    "flash2": Source(_flash2, "flash_attn"),
    "sage": Source(_sage, "sageattention", EIGHT_BITS),
}
BACKENDS = ("auto", "sdpa", *SOURCES)


@functools.cache
def kernel(name: str) -> Kernel | None:
    """The kernel of this name, None where it is not installed or does not load."""
    if name == "sdpa":
        return sdpa
    try:
        return SOURCES[name].load()
    except (ImportError, OSError, AttributeError):
        return None


def check_backend(name: str) -> str:
    """`name` if it can be used on this machine, else an `InputError` that says what is missing."""
    if name not in BACKENDS:
        raise InputError(f"There is no attention backend '{name}'. Choose one of {', '.join(BACKENDS)}.")
    if name in SOURCES and kernel(name) is None:
        package = SOURCES[name].package
        raise InputError(f"The attention backend '{name}' is not installed. Install {package}, or choose 'auto'.")
    return name


@functools.cache
def say_refused(name: str, reason: str) -> None:
    """Once for each case."""
    logging.getLogger("WanFlow").warning("The attention backend '%s' %s: 'sdpa' is used instead.", name, reason)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, backend: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, by a backend as `trials.chosen` names it.

    q (b, n, heads, d), k and v (b, m, heads, d) -> (b, n, heads, d); `bias` (m,) is added to every row of scores.
    """
    if bias is not None:
        return sdpa(q, k, v, bias[None, None, None])
    if backend == "sdpa":
        return sdpa(q, k, v)
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _compiled(q, k, v, backend)
    return attend(q, k, v, backend)


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Attention by this kernel, or by torch's own where it refuses the call."""
    try:
        return kernel(backend)(q, k, v)
    except FAILURES as failure:
        if is_shortage(failure):
            raise
        say_refused(backend, f"refused a call ({str(failure).strip().partition(chr(10))[0]})")
        return sdpa(q, k, v)


SCHEMA = "(Tensor q, Tensor k, Tensor v, str name) -> Tensor"


@torch.library.custom_op("wanflow::attend", mutates_args=(), schema=SCHEMA)
def _compiled(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    """`attend` as one operation: in a package's code the compiler would end its graph, or compile that wrongly."""
    return attend(q, k, v, name).contiguous()


@_compiled.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    return q.new_empty(q.shape)
