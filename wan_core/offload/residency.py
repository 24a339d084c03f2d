"""Copies of a module's weights on the device that computes, as many as there is room for.

The stored parameters never move and never change: for the length of a run their entries in `module._parameters` are
replaced by the copies, and put back afterwards. Blocks without resident copies travel to the device ahead of their
calls (see streaming.py), other layers get copies around each of theirs. On the device where the weights are stored
nothing is copied at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .policy import Plan, passing, residents, staying
from .recovery import is_shortage
from .streaming import Conveyor
from .units import Unit, find_units


class Residency:
    """Where one module's weights are while it runs.

    compute_dtype: copies of matrices inside the repeated blocks are made in this type where they are stored in a wider
    one, as the layers would narrow them in every call anyway; None keeps every type.
    rest_on: "cpu" reads travelling blocks into main memory, where they stay; "disk" leaves them in their file, which
    the system keeps in memory as far as there is any to spare.
    """

    def __init__(self, module: nn.Module, compute_dtype: torch.dtype | None = None, rest_on: str = "disk"):
        self.module = module
        self.rest_on = rest_on
        self.device: torch.device | None = None  # of the copies
        self.most: int | None = None  # bytes of copies that may stay, whatever a host offers; None: any number
        self._running_on: torch.device | None = None
        self._hooks: list = []  # of the run, as is the conveyor
        self._conveyor: Conveyor | None = None
        self._units = find_units(module, compute_dtype)
        self._rest = next((place.stored.device for unit in self._units for place in unit.places), torch.device("cpu"))

    def total_bytes(self) -> int:
        """Bytes of all weights, as they would be on the compute device."""
        return sum(unit.bytes for unit in self._units)

    def stored_bytes(self) -> int:
        """Bytes of all weights where they rest."""
        return sum(place.stored.nbytes for unit in self._units for place in unit.places)

    def resident_bytes(self) -> int:
        """Bytes of the copies held now: what `release()` would give back. 0 where weights are used in place."""
        return sum(unit.bytes for unit in self._units if unit.copies is not None)

    def passing_bytes(self) -> int:
        """Bytes that a run takes on the device beside the resident copies, where not all are resident."""
        return passing(*self.sizes())

    def plan_parameters(self, count: int | None) -> Plan:
        """What stays and what travels where units of at most `count` parameters in all may stay; None: all may."""
        sizes, blocks = self.sizes()
        if count is None:
            return staying(sizes, blocks, range(len(sizes)))
        counts = [unit.parameter_count for unit in self._units]
        return staying(sizes, blocks, residents(counts, count, blocks))

    def limit_to(self, planned: Plan) -> None:
        """From now on let no more stay than is planned."""
        self.most = planned.resident_bytes if planned.streamed else None
        if self.most is not None and self.resident_bytes() > self.most:
            self.release(self.resident_bytes() - self.most)

    def ensure(self, budget: int | None = None, device: torch.device | str | None = None) -> int:
        """Hold copies of up to `budget` bytes (None: of all) on `device`, by priority; returns the bytes held.

        A smaller budget than before shrinks, a negative one empties; where memory runs out, what there is has to do.
        During a run nothing changes.
        """
        if self._running_on is not None:
            return self.resident_bytes()
        target = exact_device(device) if device is not None else self.device
        if target is None or target == self._rest:
            self.release()
            return 0
        if target != self.device:
            self.release()
            self.device = target
        room = min(bytes for bytes in (budget, self.most, self.total_bytes()) if bytes is not None)
        stay = {self._units[number] for number in self._staying(room)}
        for unit in self._units:
            if unit not in stay:
                unit.copies = None
        for unit in self._units:  # when the others' memory is free
            if unit in stay and unit.copies is None and not self._hold(unit):
                break
        return self.resident_bytes()

    def _hold(self, unit: Unit) -> bool:
        """Let a unit stay on the device. False where there is no room for it."""
        try:
            unit.copies = unit.copied(self.device)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
        return unit.copies is not None

    def _staying(self, room: int) -> list[int]:
        sizes, blocks = self.sizes()
        return residents(sizes, room, blocks)

    def sizes(self) -> tuple[list[int], list[int]]:
        """The bytes of every unit, and the numbers of those that are blocks."""
        return [unit.bytes for unit in self._units], [n for n, unit in enumerate(self._units) if unit.is_block]

    def release(self, amount: int | None = None) -> int:
        """Drop at least `amount` bytes of copies (None: all), least important first; returns the bytes freed.

        Nothing is freed during a run.
        """
        if self._running_on is not None:
            return 0
        freed = 0
        for number in reversed(self._staying(self.total_bytes())):
            unit = self._units[number]
            if amount is not None and freed >= amount:
                break
            if unit.copies is not None:
                unit.copies = None
                freed += unit.bytes
        return freed

    @contextmanager
    def attached(self, device: torch.device | str) -> Iterator[nn.Module]:
        """The module, ready to run on `device`: resident layers hold their copies, others fetch them call by call.

        Without an earlier `ensure` for this device every layer becomes resident. Runs may nest on one device.
        """
        device = exact_device(device)
        if self._running_on not in (None, device):
            raise RuntimeError(f"These weights are in use on {self._running_on}; they cannot run on {device} as well.")
        if self._running_on is not None:
            yield self.module
            return
        if device not in (self._rest, self.device):
            self.ensure(None, device)
        self._running_on = device
        try:
            self._put_in_place()
            yield self.module
        finally:
            self._put_back()
            self._running_on = None

    def _put_in_place(self) -> None:
        if self._running_on == self._rest:
            return
        travelling = [unit for unit in self._units if unit.copies is None and unit.is_block]
        if travelling:
            self._conveyor = Conveyor(travelling, self._running_on, self.rest_on == "cpu")
        for unit in self._units:
            if unit.copies is not None:
                unit.put(unit.copies)
            else:
                self._hooks += _fetch_around_calls(unit, self._running_on, self._conveyor)

    def _put_back(self) -> None:
        if self._running_on == self._rest:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for unit in self._units:
            unit.restore()
        if self._conveyor:
            self._conveyor.close()
            self._conveyor = None

    def give_back(self) -> int:
        """Drop the less important half of the copies held, in a run too, between two calls; returns the bytes freed.

        What is dropped travels from then on.
        """
        device, half = self._running_on, -(-self.resident_bytes() // 2)
        if device is None or not half:
            return self.release(half)
        self._put_back()
        self._running_on = None
        try:
            return self.release(half)
        finally:
            self._running_on = device
            self._put_in_place()


def _fetch_around_calls(unit: Unit, device: torch.device, conveyor: Conveyor | None) -> list:
    """Hooks that put copies in place around each call of the unit's module.

    What autograd keeps for its way back must not be written over: with gradients each call gets copies of its own. When
    a call is made again for the way back, it is broken off as soon as all is known: that is no failure.
    """

    def fetch(module, arguments):
        unit.put(conveyor.take(unit, torch.is_grad_enabled()) if unit.is_block else unit.copied(device))

    def drop(module, arguments, output):
        unit.restore()
        if unit.is_block:
            conveyor.done(unit, failed=output is None and not torch.is_grad_enabled())

    return [
        unit.module.register_forward_pre_hook(fetch),
        unit.module.register_forward_hook(drop, always_call=True),
    ]


def exact_device(device: torch.device | str) -> torch.device:
    """With its number: "cuda" and "cuda:0" are the same place and have to compare equal."""
    device = torch.device(device)
    if device.index is None and device.type not in ("cpu", "meta"):
        return torch.empty(0, device=device).device
    return device
