"""Blocks on their way to the compute device: each travels whole, in a flat buffer, while the one before computes.

Two buffers on the device take turns. On a CUDA device the copies run on a stream of their own out of pinned memory;
elsewhere the same steps are plain copies. The numbers that arrive are those that a plain copy would bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .policy import DEPTH
from .units import Unit, frozen


@dataclass(eq=False)
class Buffer:
    """One place on the device, and on CUDA the pinned memory that it is filled from."""

    flat: Tensor  # uint8
    pinned: Tensor | None
    unit: Unit | None = None  # whose copies it holds, or will when they have arrived
    arrived: torch.cuda.Event | None = None
    used: torch.cuda.Event | None = None  # when the last call that read it is over


class Conveyor:
    """Brings `units` to `device` one by one, for the length of a run, each before it is asked for.

    The order is learned: at first each unit is expected after the one before it, then after whatever it last followed.
    With `remember` units are read into main memory the first time, and travel from there ever after.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, remember: bool = False):
        self.device = device
        self.remember = remember
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.following = dict(zip(units, [*units[1:], units[0]], strict=True))
        self.last: Unit | None = None
        span = max(unit.span for unit in units)
        with torch.inference_mode(False):
            self.buffers = [Buffer(self._flat(span), self._pinned(span)) for _ in range(DEPTH)]
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the memory may still be in use there

    def _flat(self, span: int) -> Tensor:
        return torch.empty(span, dtype=torch.uint8, device=self.device)

    def _pinned(self, span: int) -> Tensor | None:
        return torch.empty(span, dtype=torch.uint8, pin_memory=True) if self.stream else None

    def take(self, unit: Unit) -> list[nn.Parameter]:
        """The copies of `unit`, good until `done`."""
        if self.last is not None:
            self.following[self.last] = unit
        self.last = unit
        buffer = self._send(unit)
        self.buffers.append(self.buffers.pop(self.buffers.index(buffer)))  # the next one to come takes another
        if self.stream:
            torch.cuda.current_stream(self.device).wait_event(buffer.arrived)
        with torch.inference_mode(False):
            return [frozen(view) for view in unit.views(buffer.flat)]

    def done(self, unit: Unit) -> None:
        """The call is over (on CUDA: under way): send what will be asked for next."""
        if self.stream:
            self.buffers[-1].used = torch.cuda.current_stream(self.device).record_event()
        self._send(self.following[unit])

    def close(self) -> None:
        """Wait for what is under way: its memory goes back now."""
        if self.stream:
            self.stream.synchronize()
        self.buffers.clear()

    def _send(self, unit: Unit) -> Buffer:
        """The buffer that holds the unit; filled, or being filled, if none did."""
        for buffer in self.buffers:
            if buffer.unit is unit:
                return buffer
        buffer = self.buffers[0]
        buffer.unit = None  # should filling it fail, it holds nothing
        if self.remember:
            unit.remember()
        if self.stream:
            self._fill_beside(buffer, unit)
        else:
            unit.pack(buffer.flat)
        buffer.unit = unit
        return buffer

    def _fill_beside(self, buffer: Buffer, unit: Unit) -> None:
        if buffer.arrived:
            buffer.arrived.synchronize()  # the pinned memory is written to by this thread
        unit.pack(buffer.pinned)
        with torch.cuda.stream(self.stream):
            if buffer.used:
                self.stream.wait_event(buffer.used)
            buffer.flat[: unit.span].copy_(buffer.pinned[: unit.span], non_blocking=True)
            buffer.arrived = self.stream.record_event()
