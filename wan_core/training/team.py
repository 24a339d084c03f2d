"""The processes that train together: alone, each with the whole model (DDP), or each with a part of it (FSDP, ZeRO).

`torchrun` and `accelerate launch` start the processes and say so in the environment; accelerate's settings decide
between the kinds. Parts are torch's own (`fully_shard`) whether they ask for FSDP (Zhao et al., arXiv 2304.11277) or
DeepSpeed (Rajbhandari et al., arXiv 1910.02054): the numbers are the same, and the memory is that of its stage 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..errors import InputError
from .trainee import Trainee

Parameters = Mapping[str, nn.Parameter]


@dataclass
class Team:
    """`count` processes, this one with the number `rank`; each holds the whole model, and all take equal steps."""

    rank: int = 0
    count: int = 1
    holds_all = True  # whether each process holds the whole model

    @property
    def is_main(self) -> bool:
        """Whether this process saves and tells."""
        return self.rank == 0

    @property
    def saves_alone(self) -> bool:
        """Whether the main process can save without the others, as after a failure of its own."""
        return self.is_main and self.holds_all

    def prepare(self, objective: nn.Module, trainee: Trainee) -> Parameters:
        """Share out what is trained; the parameters as this process holds them."""
        return trainee.parameters

    def gather(self, parameters: Parameters, longest: float) -> float:
        """Let each process have all gradients, cut to the length `longest`; returns the length before."""
        if self.count > 1:
            self._average(parameters)
        length = nn.utils.clip_grad_norm_(parameters.values(), longest or float("inf"))
        return float(self.whole(length))

    def _average(self, parameters: Parameters) -> None:
        """What no process had a use for stays without a gradient, as it does alone."""
        uses = torch.tensor([float(parameter.grad is not None) for parameter in parameters.values()])
        dist.all_reduce(uses)
        used = [parameter for parameter, count in zip(parameters.values(), uses.tolist(), strict=True) if count]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for work in [dist.all_reduce(parameter.grad, async_op=True) for parameter in used]:
            work.wait()
        for parameter in used:
            parameter.grad.div_(self.count)

    def mean(self, number: float) -> float:
        """Of all processes' numbers."""
        if self.count == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.count

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which this process may hold a part. Every process has to ask."""
        return tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """The other way round: this process's part of a tensor, shared out as `like` is."""
        return tensor

    def write(self, trainee: Trainee, file: Path, facts: Mapping[str, str]) -> None:
        if self.is_main:
            trainee.write(file, facts)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What is inside the `with` is done by the main process, then by the others, who find its files."""
        if not self.is_main:
            dist.barrier()
        yield
        if self.is_main and self.count > 1:
            dist.barrier()


@dataclass
class ShardedTeam(Team):
    """Each process keeps a part of every parameter, of its gradient and optimizer state; in main memory to `offload`.

    Samples cannot be made: outside of the objective nothing brings the parts together.
    """

    offload: bool = False
    holds_all = False

    def prepare(self, objective: nn.Module, trainee: Trainee) -> Parameters:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        places = {name: names.get(id(parameter)) for name, parameter in trainee.parameters.items()}
        if None in places.values():
            raise InputError(
                "FSDP and DeepSpeed are for training whole models. Train a LoRA on several cards without them: "
                "accelerate launch --multi_gpu."
            )
        device = trainee.model.device.type
        mesh = init_device_mesh(device, (self.count,))
        policy = CPUOffloadPolicy(pin_memory=device == "cuda") if self.offload else OffloadPolicy()
        for blocks in (module for module in objective.modules() if isinstance(module, nn.ModuleList)):
            for block in blocks:
                fully_shard(block, mesh=mesh, offload_policy=policy)
        fully_shard(objective, mesh=mesh, offload_policy=policy)
        for parameter in trainee.parameters.values():
            parameter.data = parameter.data.new_empty(0)  # whoever still holds it must not keep it in memory
        return {name: objective.get_parameter(place) for name, place in places.items()}

    def _average(self, parameters: Parameters) -> None:
        """Done by the backward pass."""

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
            return tensor
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)

    def write(self, trainee: Trainee, file: Path, facts: Mapping[str, str]) -> None:
        trainee.write(file if self.is_main else None, facts, gather=self.whole)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with `change` applied to every tensor in its dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, change) for item in value)
    return value


def current_team() -> Team:
    """The processes that this one has joined; it alone if none."""
    if not dist.is_initialized():
        return Team()
    place = dist.get_rank(), dist.get_world_size()
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise InputError(
            f"accelerate names {file}, but DeepSpeed's own files are not read. Put zero_stage and the offload devices "
            "into accelerate's settings, as example_trainings/deepspeed_zero2_offload.yaml does."
        )
    if said("ACCELERATE_USE_DEEPSPEED") and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "0":
        offload = {os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") for what in ("OPTIMIZER", "PARAM")}
        return ShardedTeam(*place, offload="cpu" in offload)
    if said("ACCELERATE_USE_FSDP"):
        return ShardedTeam(*place, offload=said("FSDP_OFFLOAD_PARAMS"))
    return Team(*place)


def said(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


@contextmanager
def joined() -> Iterator[Team]:
    """Join the processes that `torchrun` or `accelerate launch` has started, for the length of the `with`."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield current_team()
        return
    on_cards = torch.cuda.is_available() and not said("ACCELERATE_USE_CPU")
    if on_cards:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cards else "gloo")
    try:
        yield current_team()
    finally:
        dist.destroy_process_group()
