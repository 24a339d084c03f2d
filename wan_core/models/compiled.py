"""torch.compile for the length of a run.

What is compiled is each block's `forward`, not the block: hooks around the block stay outside, and all blocks share one
compilation. Handles share the modules, so that the plain `forward` comes back after the run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import InputError
from . import fp8
from .network import Network

# Those with CUDA graphs are left out: their outputs are overwritten by the next block's.
MODES = ("default", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Compile:
    """How to compile. Raises InputError for a mode that there is not.

    dynamic: one compilation for all sizes of video; else each size has its own.
    """

    mode: str = "default"
    dynamic: bool = True
    backend: str = "inductor"

    def __post_init__(self):
        if self.mode not in MODES:
            raise InputError(f"There is no compile mode {self.mode!r}. Choose one of {', '.join(MODES)}.")


@contextmanager
def compiled(network: Network, settings: Compile | None) -> Iterator[None]:
    """Inside the `with`, the blocks of `network` run compiled. Without settings nothing changes. May nest."""
    if settings is None:
        yield
        return
    previous = {}
    try:
        for block in blocks(network):
            previous[block] = vars(block).get("forward")  # a LoRA's, where it changes the block itself
            if not isinstance(previous[block], Compiled):
                block.forward = Compiled(block.forward, settings)
        yield
    finally:
        for block, forward in previous.items():
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def blocks(network: Network) -> list[nn.Module]:
    return [*network.trunk.blocks, *(network.vace.vace_blocks if network.vace is not None else ())]


class Compiled:
    """A `forward` that compiles itself at its first call; where that fails, an InputError says what to do."""

    def __init__(self, forward: Callable, settings: Compile):
        for function in fp8.CONSTANT:
            torch.compiler.assume_constant_result(function)
        self.forward = torch.compile(forward, mode=settings.mode, dynamic=settings.dynamic, backend=settings.backend)
        functools.update_wrapper(self, forward)

    def __call__(self, *arguments, **options):
        try:
            return self.forward(*arguments, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise InputError(
                f"torch.compile failed on this computer ({str(error).strip().splitlines()[0]}). Remove Wan Torch "
                "Compile, or install what it needs: Triton for a GPU, a C++ compiler for the processor."
            ) from error
