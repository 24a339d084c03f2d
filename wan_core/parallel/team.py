"""The processes of one run: how they find each other, and who does what."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import InputError, Lost
from ..models.slots import Alone
from .sequence import Sequence
from .talk import collected, talking

PATIENCE = timedelta(days=1)  # one process may wait for another that downloads a model
WAYS = ("auto", "prompts", "tokens")


@dataclass(frozen=True, eq=False)
class Share:
    """What one process does in a run: all of it, unless said otherwise.

    prompt    the one that it works at; None: at all of them
    tokens    its part of the video, for `Run.parallel`
    """

    prompt: int | None = None
    tokens: Alone = field(default_factory=Alone)
    across: dist.ProcessGroup | None = None  # the processes with the same part of the video, one a prompt

    def answers(self, mine: Tensor, prompts: int) -> list[Tensor]:
        """The model's answers to all prompts, from its answer to the one of this process."""
        return collected(mine, prompts, self.across)


@dataclass(frozen=True, eq=False)
class Team:
    """This process (`rank`) and the others.

    way: "prompts" gives one half of the processes the positive prompt and the other one the negative, which needs
    little talk; "tokens" parts the video among all of them, which takes the least memory; "auto" does the former where
    it can. Within a half the video is parted too.
    """

    rank: int
    size: int
    store: dist.Store
    way: str = "auto"

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and saves."""
        return self.rank == 0

    def share(self, prompts: int, heads: int) -> Share:
        """Who does what where the model is asked `prompts` times a step. All processes have to call this alike.

        Raises InputError where the work cannot be parted evenly.
        """
        crews = prompts if self.way != "tokens" and self.size % prompts == 0 else 1
        if self.way == "prompts" and crews < prompts:
            raise InputError(
                f"{prompts} prompts cannot be shared evenly among {self.size} processes. "
                f"Start a multiple of {prompts}, or share the tokens."
            )
        size = self.size // crews
        if heads % size:
            fitting = [crews * n for n in range(1, heads + 1) if heads % n == 0]
            raise InputError(
                f"The video's tokens cannot be shared among {size} processes, because this model's {heads} attention "
                f"heads cannot. Start one of these numbers of processes: {', '.join(map(str, fitting))}."
            )
        crew, place = divmod(self.rank, size)
        within, across = groups(self.size, crews)
        return Share(
            prompt=crew if crews > 1 else None,
            tokens=Sequence(place, size, within[crew]) if size > 1 else Alone(),
            across=across[place],
        )

    def same(self, x: Tensor) -> Tensor:
        """The leader's `x`, for all."""
        x = x.contiguous()
        with talking():
            dist.broadcast(x, 0)
        return x

    @contextmanager
    def in_turn(self, what: str) -> Iterator[None]:
        """The leader does `what` first, the others when it has: something has to be downloaded once only."""
        if not self.leads:
            self.store.wait([what], PATIENCE)
        yield
        if self.leads:
            self.store.set(what, "done")

    @functools.cached_property
    def speaks(self) -> bool:
        """Whether this process is the first to complain: what goes wrong usually goes wrong in all of them."""
        try:
            return self.store.add("complaints", 1) == 1
        except RuntimeError:  # the leader, who keeps the store, has ended, and has said why
            return False

    def leave(self) -> None:
        """At the end of a run in which nothing went wrong."""
        dist.destroy_process_group()


@functools.cache
def groups(size: int, crews: int) -> tuple[list, list]:
    """(a group a crew, a group for each place in a crew) of `size` processes in so many crews; None: all of them."""
    if crews == 1:
        return [None], [None] * size
    ranks = torch.arange(size).view(crews, -1)
    return tuple([dist.new_group(row) for row in rows.tolist()] for rows in (ranks, ranks.t()))


def join(way: str = "auto") -> Team | None:
    """The team that this process was started for, as torchrun tells it in the environment; None if it works alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return None
    if torch.cuda.is_available():
        here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", size)), torch.cuda.device_count()
        if here > cards:
            raise (InputError if os.environ.get("RANK") == "0" else Lost)(
                f"Each process needs a graphics card of its own, and this computer has {cards} for {here}. "
                "Start as many processes as there are cards."
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with talking():
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group(store=dist.PrefixStore("torch", store), rank=rank, world_size=size, timeout=PATIENCE)
    return Team(rank, size, dist.PrefixStore("wanflow", store), way)

