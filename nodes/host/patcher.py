"""How ComfyUI sees our engines: as models that it may load in part, shrink and unload.

ComfyUI's memory manager knows only its own ModelPatcher, which moves the weights of a module it is given. Our weights
are moved by their own `Residency`, so each gets a patcher around an empty module that passes the manager's wishes on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import comfy.model_management
import torch
from comfy.model_management import LoadedModel
from comfy.model_patcher import ModelPatcher

from ...wan_core.model import Engine
from ...wan_core.offload.residency import Residency


class WanFlowWeights(torch.nn.Module):
    """Stands for the weights in the manager's list; the name is what ComfyUI's log shows."""

    device = None


class EnginePatcher(ModelPatcher):
    """The entry of one set of weights in ComfyUI's memory manager.

    The manager's budgets may be tiny, huge (1e32) or negative. Weights that are gone count nothing. Arguments that
    newer versions of ComfyUI add are taken and ignored.
    """

    def __init__(self, weights: Residency, load_device: torch.device):
        self.weights = weakref.ref(weights)  # first, as some versions of ModelPatcher.__init__ ask for the size
        super().__init__(WanFlowWeights(), load_device, offload_device=torch.device("cpu"))

    def model_size(self) -> int:
        weights = self.weights()
        return weights.total_bytes() if weights else 0

    def loaded_size(self) -> int:
        weights = self.weights()
        return weights.resident_bytes() if weights else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def model_dtype(self) -> None:
        """Unknown on purpose: the manager would convert other packs' patches to it, and there are none here."""

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, *args: Any, **kwargs: Any) -> int:
        """Grow by at most `extra_memory` bytes, or shrink when it is negative; returns the bytes gained."""
        weights, before = self.weights(), self.loaded_size()
        if weights:
            weights.ensure(int(min(before + extra_memory, weights.total_bytes())), device_to)
        return self.loaded_size() - before

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> int:
        """Returns the bytes freed."""
        weights = self.weights()
        return weights.release(int(min(memory_to_free, weights.total_bytes()))) if weights else 0

    def patch_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return self.model

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        """The manager unloads the model; without `unpatch_weights` it only forgets this patcher."""
        weights = self.weights()
        if weights and unpatch_weights:
            weights.release()

    def clone(self, *args: Any, **kwargs: Any) -> EnginePatcher:
        return self  # there is nothing to patch that a copy could differ in

    def is_clone(self, other: Any) -> bool:
        return other is self


_patchers: weakref.WeakKeyDictionary[Residency, EnginePatcher] = weakref.WeakKeyDictionary()


def entries_of(weights: Iterable[Residency]) -> list[LoadedModel]:
    """The manager's entries of these weights."""
    patchers = [_patchers[one] for one in weights if one in _patchers]
    return [entry for entry in comfy.model_management.current_loaded_models if entry.model in patchers]


def patchers_of(engine: Engine) -> list[EnginePatcher]:
    """One patcher for each set of weights, which several handles may share; it lives as long as they do."""
    for weights in engine.weights:
        if weights not in _patchers:
            _patchers[weights] = EnginePatcher(weights, engine.device)
    return [_patchers[weights] for weights in engine.weights]
