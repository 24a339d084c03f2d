"""In which order the clips are shown, and which process shows which: all of it follows from the seed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import islice

import torch

from .cache import digest
from .settings import Settings

Batch = list[int]  # the numbers of examples


def epoch_steps(groups: Sequence[Hashable], settings: Settings, epoch: int, processes: int = 1) -> list[list[Batch]]:
    """The steps of an epoch: each some batches, each batch the numbers of some examples of one group."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    order = torch.randperm(len(groups) * settings.repeat, generator=generator) % len(groups)
    batches, open_batches = [], {}
    for index in order.tolist():
        filling = open_batches.setdefault(groups[index], [])
        filling.append(index)
        if len(filling) == settings.batch_size:
            batches.append(open_batches.pop(groups[index]))
    batches += open_batches.values()
    size = settings.gradient_accumulation_steps * processes
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def steps_from(
    done: int, total: int, groups: Sequence[Hashable], settings: Settings, processes: int = 1
) -> Iterator[tuple[int, list[Batch]]]:
    """(number, batches) of the steps after the first `done` of `total`."""

    def steps() -> Iterator[list[Batch]]:
        for epoch in range(settings.num_epochs):
            yield from epoch_steps(groups, settings, epoch, processes)

    return islice(enumerate(steps()), done, total)


def share(batches: Sequence[Batch], seeds: Sequence[object], rank: int, processes: int) -> Iterator[tuple]:
    """(batch, a random generator for each of its rows, weight) of all that one process has to do in a step.

    The weights make the processes' mean of weighted batch means the mean over all rows of the step. Where batches are
    too few a process repeats one with weight 0: sharded models need all processes to make the same calls.
    """
    rows = sum(map(len, batches))
    starts = [sum(map(len, batches[:number])) for number in range(len(batches))]
    for number in range(rank, -(-len(batches) // processes) * processes, processes):
        spare = number >= len(batches)
        number = 0 if spare else number
        batch = batches[number]
        generators = [generator_for(*seeds, starts[number] + row) for row in range(len(batch))]
        yield batch, generators, 0.0 if spare else processes * len(batch) / rows


def generator_for(*facts: object) -> torch.Generator:
    """Random numbers that follow from these facts alone."""
    return torch.Generator().manual_seed(int(digest(*facts)[:8], 16))  # torch's generator looks at 32 bits
