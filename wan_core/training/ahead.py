"""Work done a little ahead of where its results are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Value, Result = TypeVar("Value"), TypeVar("Result")


def ahead(function: Callable[[Value], Result], values: Iterable[Value], workers: int) -> Iterator[Result]:
    """function(value) of each value in order; so many threads work on the next ones. With 0 nobody does."""
    if workers < 1:
        yield from map(function, values)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for value in values:
                waiting.append(pool.submit(function, value))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
