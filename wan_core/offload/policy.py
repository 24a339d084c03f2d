"""Which blocks stay on the compute device and which travel to it: numbers in, a plan out, nothing touched.

Blocks are repeated parts of a network, brought whole and ahead of time; the layers beside them are fetched when called.
All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DEPTH = 2  # blocks on the device in passing: the one in use, and the next


@dataclass(frozen=True)
class Plan:
    """What `plan` decided. `resident` and `streamed` hold the numbers of the units, in the network's order."""

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    resident_bytes: int
    streamed_bytes: int  # that travel in every pass
    passing_bytes: int  # on the device beside the resident ones at the worst moment

    def peak(self, room: int) -> int:
        """Predicted bytes on the device in a phase that needs `room` for its own tensors."""
        return self.resident_bytes + self.passing_bytes + room

    def exposed_seconds(self, compute_seconds: float, bytes_per_second: float) -> float:
        """By how much a pass of `compute_seconds` grows: the transfer that no computing hides.

        The streamed blocks are spread evenly, so that all of the computing is there to hide behind.
        """
        return max(0.0, self.transfer_seconds(bytes_per_second) - compute_seconds)

    def transfer_seconds(self, bytes_per_second: float) -> float:
        return self.streamed_bytes / bytes_per_second


def plan(sizes: Sequence[int], budget: int | None, blocks: Sequence[int]) -> Plan:
    """What stays where a network may take `budget` bytes for its weights, those in passing included (None: any).

    sizes: of all units, in the network's order; blocks: the numbers of those that are blocks.
    Where not even what passes fits into the budget, nothing stays, and the peak tells by how much it is exceeded.
    """
    total = sum(sizes)
    if budget is None or total <= budget:
        return Plan(tuple(range(len(sizes))), (), total, 0, 0)
    return staying(sizes, blocks, residents(sizes, budget - passing(sizes, blocks), blocks))


def plan_all(sets: Sequence[tuple[Sequence[int], Sequence[int]]], budget: int | None) -> list[Plan]:
    """For several networks that run together and share a budget, each given as (sizes, blocks), the first served first.

    What the later ones need in passing is kept for them.
    """
    least = [min(sum(sizes), passing(sizes, blocks)) for sizes, blocks in sets]
    plans: list[Plan] = []
    for number, (sizes, blocks) in enumerate(sets):
        share = None if budget is None else budget - sum(least[number + 1 :])
        plans.append(plan(sizes, share, blocks))
        budget = None if budget is None else budget - plans[-1].peak(room=0)
    return plans


def staying(sizes: Sequence[int], blocks: Sequence[int], resident: Sequence[int]) -> Plan:
    """The plan in which these units stay."""
    streamed = tuple(sorted(set(range(len(sizes))) - set(resident)))
    kept = sum(sizes[number] for number in resident)
    return Plan(tuple(sorted(resident)), streamed, kept, sum(sizes) - kept, passing(sizes, blocks, streamed))


def residents(sizes: Sequence[int], room: int, blocks: Sequence[int]) -> list[int]:
    """The units whose copies stay, of `room` bytes in all, the most important first."""
    stay = []
    for number in priority(len(sizes), blocks):
        if sizes[number] <= room:
            stay.append(number)
            room -= sizes[number]
    return stay


def priority(count: int, blocks: Sequence[int]) -> list[int]:
    """All units, those that gain most by staying first.

    First what cannot be fetched ahead of time; then the blocks in an order of which every beginning is spread evenly
    (van der Corput's), so that a travelling block always has resident ones to travel behind.
    """
    beside = sorted(set(range(count)) - set(blocks))
    bits = max(1, (len(blocks) - 1).bit_length())
    spread = sorted(range(len(blocks)), key=lambda place: int(f"{place:0{bits}b}"[::-1], 2))
    return beside + [blocks[place] for place in spread]


def passing(sizes: Sequence[int], blocks: Sequence[int], streamed: Sequence[int] | None = None) -> int:
    """Bytes that travelling units take on the device: buffers for the largest block, and the largest other layer."""
    streamed = range(len(sizes)) if streamed is None else streamed
    buffers = DEPTH * max((sizes[number] for number in set(streamed) & set(blocks)), default=0)
    return buffers + max((sizes[number] for number in set(streamed) - set(blocks)), default=0)
