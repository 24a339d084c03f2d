"""What a graph will take of a machine: the phases, the machine, and the decisions that a run will make there.

Where weights stay and travel is not estimated: it is decided by `Engine.plans`, the function that decides in the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..offload.options import Offload
from ..offload.policy import Plan
from .machines import Machine
from .phases import Phase


@dataclass(frozen=True)
class Files:
    """Weights on the disk: what they are, their bytes, and whether they are on this machine."""

    name: str
    bytes: int
    missing: bool = False


@dataclass(frozen=True)
class Outlook:
    """What a phase takes of a machine. Sizes in bytes; seconds are of the whole phase."""

    phase: Phase
    machine: Machine
    plans: tuple[Plan, ...]

    @property
    def resident(self) -> int:
        """Of weights, all through the phase on the card."""
        return sum(plan.resident_bytes for plan in self.plans)

    @property
    def passing(self) -> int:
        return sum(plan.passing_bytes for plan in self.plans)

    @property
    def streamed(self) -> int:
        """In each pass."""
        return sum(plan.streamed_bytes for plan in self.plans)

    @property
    def room(self) -> int:
        """For the run's own tensors, with what they take only where it is there (see sampling/contexts.py)."""
        phase = self.phase
        if self.machine.vram is None:
            return phase.room + phase.spare
        left = self.machine.memory[1] - self.resident - phase.room
        return phase.room + (phase.spare if not self.streamed and phase.spare <= left else 0)

    @property
    def blocks(self) -> tuple[int, int]:
        """How many blocks stay on the card, and how many there are."""
        numbers = [set(weights.sizes()[1]) for weights in self.phase.engine.weights] if self.plans else []
        stay = sum(len(blocks & set(plan.resident)) for blocks, plan in zip(numbers, self.plans, strict=True))
        return stay, sum(map(len, numbers))

    @property
    def vram(self) -> int:
        """Peak of the whole card, 0 where there is none."""
        if self.machine.vram is None:
            return 0
        return self.machine.taken + self.resident + self.passing + self.room

    @property
    def fits(self) -> bool:
        return self.vram <= (self.machine.vram or 0) and self.ram <= self.machine.ram

    @property
    def ram(self) -> int:
        """Peak of main memory that cannot be given back."""
        ram = self.machine.base + self.phase.kept
        if self.machine.vram is None:
            return ram + self.room
        rests = self.phase.engine and any(weights.rest_on == "cpu" for weights in self.phase.engine.weights)
        return ram + self.passing + (self.streamed if rests else 0)

    @property
    def mapped(self) -> int:
        """Bytes of the files that are read in the phase: the system keeps them in memory while there is room."""
        if self.phase.engine is None:
            return 0
        unread = self.phase.unread if self.machine.vram is None else 0
        return self.phase.engine.stored_bytes() - self.phase.private - unread

    @property
    def reread(self) -> int:
        """Bytes that come from the disk in every pass, as main memory cannot hold what travels or is used in place."""
        used = self.mapped
        if self.machine.vram is not None and self.phase.engine is not None:
            used = self.mapped * self.streamed // max(1, self.resident + self.streamed)
        return max(0, min(used, self.ram + used - self.machine.ram))

    @property
    def compute_seconds(self) -> float:
        return self.phase.passes * self.phase.work / self.machine.rate

    @property
    def transfer_seconds(self) -> float:
        """Of weights to the card, and from the disk where they do not stay in main memory."""
        return self.phase.passes * (self.streamed / self.machine.bus + self.reread / self.machine.disk)

    @property
    def hidden(self) -> float:
        """The share of the transfer that goes on behind the computing, 1 where there is none."""
        return min(1.0, self.compute_seconds / self.transfer_seconds) if self.transfer_seconds else 1.0

    @property
    def seconds(self) -> float:
        """Reading the files for the first time is not counted."""
        return self.resident / self.machine.bus + max(self.compute_seconds, self.transfer_seconds)


@dataclass(frozen=True)
class Forecast:
    machine: Machine
    outlooks: tuple[Outlook, ...]
    files: tuple[Files, ...] = ()

    @cached_property
    def vram(self) -> int:
        return max(outlook.vram for outlook in self.outlooks)

    @cached_property
    def ram(self) -> int:
        return max(outlook.ram for outlook in self.outlooks)

    @property
    def disk(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def fits(self) -> bool:
        return all(outlook.fits for outlook in self.outlooks)

    @property
    def seconds(self) -> float:
        return sum(outlook.seconds for outlook in self.outlooks)


def forecast(phases: Sequence[Phase], machine: Machine, files: Sequence[Files] = ()) -> Forecast:
    """What these phases take of the machine, one after the other."""
    return Forecast(machine, tuple(outlook(phase, machine) for phase in phases), tuple(files))


def outlook(phase: Phase, machine: Machine) -> Outlook:
    engine = phase.engine
    if engine is None or machine.vram is None:  # the processor uses weights where they lie
        return Outlook(phase, machine, ())
    return Outlook(phase, machine, tuple(engine.plans(engine.offload or Offload(), phase.room, machine.memory)))
