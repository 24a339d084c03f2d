"""Copies of a module's weights on the device that computes, as many as there is room for.

The stored parameters never move and never change: for the length of a run their entries in `module._parameters` are
replaced by the copies, and put back afterwards. Layers without a resident copy get one around each of their calls.
On the device where the weights are stored nothing is copied at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether this is the weight of a linear layer, a convolution or an embedding: nearly all of a model's bytes.

    Biases, norms and modulations are small, matter more, and keep the type that they are stored in.
    """
    return name.endswith("weight") and parameter.dim() >= 2 and parameter.is_floating_point()


@dataclass(eq=False)
class Unit:
    """One layer's own parameters: what is copied, used and dropped together."""

    module: nn.Module
    stored: dict[str, nn.Parameter]
    dtypes: dict[str, torch.dtype]  # of the copies
    copies: dict[str, nn.Parameter] | None = None

    @property
    def bytes(self) -> int:
        return sum(p.numel() * self.dtypes[name].itemsize for name, p in self.stored.items())

    def copied(self, device: torch.device) -> dict[str, nn.Parameter]:
        with torch.inference_mode(False), torch.no_grad():
            return {
                name: nn.Parameter(p.to(device, self.dtypes[name]), requires_grad=False)
                for name, p in self.stored.items()
            }


class Residency:
    """Where one module's weights are while it runs.

    compute_dtype: copies of matrices inside the repeated blocks are made in this type where they are stored in a wider
    one, as the layers would narrow them in every call anyway; None keeps every type.
    """

    def __init__(self, module: nn.Module, compute_dtype: torch.dtype | None = None):
        self.module = module
        self.device: torch.device | None = None  # of the copies
        self._running_on: torch.device | None = None
        self._units = [
            Unit(layer, dict(own), {name: _copy_dtype(f"{path}.{name}", p, compute_dtype) for name, p in own.items()})
            for path, layer in module.named_modules()
            if (own := {name: p for name, p in layer._parameters.items() if p is not None})
        ]
        self._rest = next((p.device for unit in self._units for p in unit.stored.values()), torch.device("cpu"))

    def total_bytes(self) -> int:
        """Bytes of all weights, as they would be on the compute device."""
        return sum(unit.bytes for unit in self._units)

    def resident_bytes(self) -> int:
        """Bytes of the copies held now: what `release()` would give back. 0 where weights are used in place."""
        return sum(unit.bytes for unit in self._units if unit.copies is not None)

    def ensure(self, budget: int | None = None, device: torch.device | str | None = None) -> int:
        """Hold copies of up to `budget` bytes (None: of all) on `device`, first layers first; returns the bytes held.

        A smaller budget than before shrinks, a negative one empties. During a run nothing changes.
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
        room = self.total_bytes() if budget is None else budget
        if self.resident_bytes() > room:
            self.release(self.resident_bytes() - room)
        room -= self.resident_bytes()
        for unit in self._units:
            if unit.copies is None and unit.bytes <= room:
                unit.copies = unit.copied(target)
                room -= unit.bytes
        return self.resident_bytes()

    def release(self, amount: int | None = None) -> int:
        """Drop at least `amount` bytes of copies (None: all), last layers first; returns the bytes freed.

        Nothing is freed during a run.
        """
        if self._running_on is not None:
            return 0
        freed = 0
        for unit in reversed(self._units):
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
        units = self._units if device != self._rest else ()
        hooks = []
        self._running_on = device
        try:
            for unit in units:
                if unit.copies is not None:
                    unit.module._parameters.update(unit.copies)
                else:
                    hooks += self._fetch_around_calls(unit, device)
            yield self.module
        finally:
            self._running_on = None
            for hook in hooks:
                hook.remove()
            for unit in units:
                unit.module._parameters.update(unit.stored)

    @staticmethod
    def _fetch_around_calls(unit: Unit, device: torch.device) -> list:
        def fetch(module, arguments):
            module._parameters.update(unit.copied(device))

        def drop(module, arguments, output):
            module._parameters.update(unit.stored)

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


def _copy_dtype(path: str, parameter: nn.Parameter, compute_dtype: torch.dtype | None) -> torch.dtype:
    if compute_dtype is None or not path.startswith(("blocks.", "vace_blocks.")) or not is_matrix(path, parameter):
        return parameter.dtype
    return min(parameter.dtype, compute_dtype, key=lambda dtype: dtype.itemsize)
