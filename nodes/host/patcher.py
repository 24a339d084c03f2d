"""How ComfyUI sees our engines: as models that it may load in part, shrink and unload.

ComfyUI's memory manager knows only its own ModelPatcher, which moves the weights of a module it is given. Our engines
move their own weights, so each gets a patcher around an empty module that passes the manager's wishes on to the engine.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher


class WanFlowWeights(torch.nn.Module):
    """Stands for an engine in the manager's list; the name is what ComfyUI's log shows."""

    device = None


class EnginePatcher(ModelPatcher):
    """One engine's entry in ComfyUI's memory manager.

    The manager's budgets may be tiny, huge (1e32) or negative. An engine that is gone counts nothing. Arguments that
    newer versions of ComfyUI add are taken and ignored.
    """

    def __init__(self, engine: Any, load_device: torch.device, offload_device: torch.device):
        self.engine = weakref.ref(engine)  # first, as some versions of ModelPatcher.__init__ ask for the size
        super().__init__(WanFlowWeights(), load_device, offload_device)

    def model_size(self) -> int:
        engine = self.engine()
        return engine.total_bytes() if engine else 0

    def loaded_size(self) -> int:
        engine = self.engine()
        return engine.resident_bytes() if engine else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def model_dtype(self) -> None:
        """Unknown on purpose: the manager would convert other packs' patches to it, and there are none here."""

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, *args: Any, **kwargs: Any) -> int:
        """Grow by at most `extra_memory` bytes, or shrink when it is negative; returns the bytes gained."""
        engine, before = self.engine(), self.loaded_size()
        if engine:
            engine.ensure(int(max(0, min(before + extra_memory, engine.total_bytes()))), device_to)
        return self.loaded_size() - before

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> int:
        """Returns the bytes freed."""
        engine = self.engine()
        return engine.release(min(memory_to_free, engine.total_bytes())) if engine else 0

    def patch_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return self.model

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """The manager unloads the model, or, without `unpatch_weights`, only forgets this patcher."""
        engine = self.engine()
        if engine and unpatch_weights:
            engine.release()

    def clone(self, *args: Any, **kwargs: Any) -> EnginePatcher:
        return self  # there is nothing to patch that a copy could differ in

    def is_clone(self, other: Any) -> bool:
        return getattr(other, "engine", None) == self.engine


_patchers: weakref.WeakKeyDictionary[Any, EnginePatcher] = weakref.WeakKeyDictionary()


def patcher_of(engine: Any, load_device: torch.device, offload_device: torch.device) -> EnginePatcher:
    """The engine's one patcher; it lives as long as the engine."""
    if engine not in _patchers:
        _patchers[engine] = EnginePatcher(engine, load_device, offload_device)
    return _patchers[engine]
