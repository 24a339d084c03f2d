"""What processes say to each other, and what happens when one does not answer any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import Lost


@contextmanager
def talking() -> Iterator[None]:
    """Around every exchange. Raises Lost where it breaks off."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch has no narrower class for a broken connection
        raise Lost(f"Another process of this run has ended ({str(error).splitlines()[0]}).") from error


def collected(mine: Tensor, size: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """What each of the `size` processes in the group has here, all of one shape."""
    mine = mine.contiguous()
    everyone = [torch.empty_like(mine) for _ in range(size)]
    with talking():
        dist.all_gather(everyone, mine, group)
    return everyone
