"""Running out of memory on the compute device: what can be given back is, and the work is done again.

Who holds memory there is asked in turn: first the others (hosts add themselves to `OTHERS`), then the work itself, by
the `relieve` that it comes with. Work that may be repeated must leave what it began from as it was.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..errors import MemoryShortage

Result = TypeVar("Result")

# Each takes the weights (`Residency`) of the work that ran out of memory, drops what it holds of all others on that
# device, and says whether there was anything.
OTHERS: list[Callable[[Sequence[object]], bool]] = []

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # in other RuntimeErrors


def is_shortage(error: BaseException) -> bool:
    """Whether this says that memory ran out, whichever library says it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | MemoryError) and any(sign in str(error) for sign in SIGNS)


def others_give(weights: Sequence[object]) -> bool:
    """Let everybody but the owner of these weights drop what they hold. False where nobody held anything."""
    return sum(give(weights) for give in OTHERS) > 0  # all of them are asked


def persist(work: Callable[[], Result], relieve: Callable[[], bool], doing: str, advice: str) -> Result:
    """work(), again after each time that memory ran out and `relieve()` found some to give back.

    Raises MemoryShortage, a sentence with what was being done and the advice, where there is none left to give; other
    errors pass.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not is_shortage(error):
                raise
            message = str(error).strip().partition("\n")[0]
        # Here the failed work's traceback, which held its tensors, is gone.
        clean_up()
        if not relieve():
            raise MemoryShortage(f"Memory ran out while {doing}, and nothing is left to drop. {advice} ({message})")


def clean_up() -> None:
    """Give the allocator's unused memory back to the device."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
