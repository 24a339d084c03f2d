"""Blocks on their way to the compute device: each travels whole, in a flat buffer, while the one before computes.

Two buffers on the device take turns. A `Lane` does the copying: on a CUDA device a thread packs each block into pinned
memory, out of which it is copied on a stream of its own; elsewhere the same steps are plain copies. The numbers that
arrive are those that a plain copy would bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from .units import Flat, Unit


@dataclass(eq=False)
class Buffer:
    """One place on the device."""

    flat: Flat
    unit: Unit | None = None  # whose copies it holds, or will when they have arrived


class Lane:
    """Copies that are over when they are asked for. With `remember`, units stay in main memory once they were read."""

    def __init__(self, device: torch.device, remember: bool):
        self.device = device
        self.remember = remember

    def buffer(self, span: int) -> Buffer:
        """A new place for so many bytes."""
        return Buffer(Flat(torch.empty(span, dtype=torch.uint8, device=self.device)))

    def send(self, unit: Unit, buffer: Buffer) -> None:
        """Begin to fill the buffer, when the last call that reads it is over."""
        self.pack(unit, buffer.flat)

    def pack(self, unit: Unit, flat: Flat) -> None:
        if self.remember:
            unit.remember()
        unit.pack(flat)

    def wait(self, buffer: Buffer) -> None:
        """What is computed from here on finds the buffer filled. Raises what went wrong on the way."""

    def used(self, buffer: Buffer) -> None:
        """All that reads the buffer has been asked for by now."""

    def close(self) -> None:
        """Wait for what is under way."""


@dataclass(eq=False)
class CudaBuffer(Buffer):
    pinned: Flat | None = None  # what it is filled from
    sent: Future | None = None
    arrived: torch.cuda.Event | None = None
    read: torch.cuda.Event | None = None  # by the last call


class CudaLane(Lane):
    """Copies beside the computing: this thread only asks for them, so that it never keeps the device waiting."""

    def __init__(self, device: torch.device, remember: bool):
        super().__init__(device, remember)
        self.stream = torch.cuda.Stream(device)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="WanFlow weights")

    def buffer(self, span: int) -> CudaBuffer:
        pinned = Flat(torch.empty(span, dtype=torch.uint8, pin_memory=True))
        buffer = CudaBuffer(super().buffer(span).flat, pinned=pinned)
        buffer.read = torch.cuda.current_stream(self.device).record_event()  # the memory may be in use there till now
        return buffer

    def send(self, unit: Unit, buffer: CudaBuffer) -> None:
        buffer.sent = self.thread.submit(self._fill, unit, buffer)

    def _fill(self, unit: Unit, buffer: CudaBuffer) -> None:
        if buffer.arrived:
            buffer.arrived.synchronize()  # until then the pinned memory is read
        self.pack(unit, buffer.pinned)
        with torch.inference_mode(False), torch.cuda.stream(self.stream):
            self.stream.wait_event(buffer.read)
            buffer.flat.bytes[: unit.span].copy_(buffer.pinned.bytes[: unit.span], non_blocking=True)
            buffer.arrived = self.stream.record_event()

    def wait(self, buffer: CudaBuffer) -> None:
        buffer.sent.result()
        torch.cuda.current_stream(self.device).wait_event(buffer.arrived)

    def used(self, buffer: CudaBuffer) -> None:
        buffer.read = torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        self.thread.shutdown(wait=True)
        self.stream.synchronize()


def lane_to(device: torch.device, remember: bool) -> Lane:
    return (CudaLane if device.type == "cuda" else Lane)(device, remember)


class Conveyor:
    """Brings `units` to `device` one by one, for the length of a run, each before it is asked for.

    The order is learned: at first each unit is expected after the one before it, then after whatever two it last
    followed, so that the way back of a training is foreseen as well as the way there. With `remember` units are read
    into main memory the first time, and travel from there ever after.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, remember: bool = False):
        self.lane = lane_to(device, remember)
        self.around = dict(zip(units, [*units[1:], units[0]], strict=True))
        self.followed: dict[tuple[Unit | None, Unit | None], Unit] = {}
        self.last: tuple[Unit | None, Unit | None] = (None, None)
        self.span = max(unit.span for unit in units)
        self.buffers: list[Buffer] = []  # as many as policy.DEPTH: one that is read, one for what comes next
        self.read: Buffer | None = None  # by the last call

    def take(self, unit: Unit, keep: bool = False) -> list[nn.Parameter]:
        """The copies of `unit`, good until `done`; to `keep` for longer, they get memory of their own."""
        self.followed[self.last] = unit
        self.last = (self.last[1], unit)
        buffer = self._send(unit)
        try:
            self.lane.wait(buffer)
        except BaseException:
            buffer.unit = None  # it holds nothing
            raise
        self.read = buffer
        if keep:
            self.buffers.remove(buffer)
        return buffer.flat.of(unit.form)

    def done(self, unit: Unit, failed: bool = False) -> None:
        """The call is over (on CUDA: under way): send what will be asked for next; after a failure nobody knows."""
        if self.read:
            self.lane.used(self.read)
        if not failed:
            self._send(self.followed.get(self.last, self.around[unit]))

    def close(self) -> None:
        """Wait for what is under way: its memory goes back now."""
        self.lane.close()
        self.buffers.clear()
        self.read = None

    def _send(self, unit: Unit) -> Buffer:
        """The buffer that holds the unit; filled, or being filled, if none did."""
        for buffer in self.buffers:
            if buffer.unit is unit:
                return buffer
        buffer = next((buffer for buffer in self.buffers if buffer is not self.read), None) or self._new()
        buffer.unit = None  # should filling it fail, it holds nothing
        self.lane.send(unit, buffer)
        buffer.unit = unit
        return buffer

    def _new(self) -> Buffer:
        with torch.inference_mode(False):
            self.buffers.append(self.lane.buffer(self.span))
        return self.buffers[-1]
