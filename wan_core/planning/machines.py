"""What machines can hold and how fast they are. Only data: another card is another row.

Rates are the makers' figures for dense bf16 products with fp32 sums, memory is what is printed on the box. Of the rate
video models reach about 60 %: of the published times of Wan 2.1 (its own README, LightX2V's benchmarks), counted by
work.py, the RTX 4090 reaches 0.65, the A100 0.62 and the H200 0.63 at best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

from ..errors import InputError

GIB = 2**30
REACHED = 0.6  # of a card's rate
GEN3, GEN4_X8, GEN4, GEN5 = 12e9, 12.5e9, 25e9, 50e9  # bytes a second that really come over the bus
DISK = 2e9  # bytes a second, of a usual NVMe drive
CONTEXT = GIB // 2  # of a card is taken by its driver and by the kernels' code
BASE = 2 * GIB  # of main memory is taken by Python, torch and the libraries of a card


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes, rates a second.

    vram   of the graphics card; None: there is none, all is computed on the processor
    ram    main memory
    rate   products and sums in the matrix products of a run, as reached
    bus    bytes from main memory to the card
    taken  bytes of the card that are not ours
    base   bytes of main memory that the program itself takes
    """

    name: str
    vram: int | None
    ram: int
    rate: float
    bus: float = GEN4
    disk: float = DISK
    taken: int = CONTEXT
    base: int = BASE

    @property
    def memory(self) -> tuple[int, int] | None:
        """(total, free) of the card, as `Offload.budget` takes it."""
        return None if self.vram is None else (self.vram, self.vram - self.taken)

    def with_sizes(self, vram: int | None = None, ram: int | None = None) -> Machine:
        """The same with other sizes; None: as they are."""
        return replace(self, vram=self.vram if vram is None else vram, ram=self.ram if ram is None else ram)


def _card(name: str, vram: int, tera: float, bus: float, ram: int = 32) -> Machine:
    return Machine(name, vram * GIB, ram * GIB, tera * 1e12 * REACHED, bus)


CARDS = (
    _card("RTX 3060", 12, 25.6, GEN4),
    _card("RTX 3080", 10, 59.5, GEN4),
    _card("RTX 3090", 24, 71, GEN4),
    _card("RTX 4060", 8, 30.2, GEN4_X8),
    _card("RTX 4060 Ti 16GB", 16, 44.1, GEN4_X8),
    _card("RTX 4070", 12, 58.3, GEN4),
    _card("RTX 4080", 16, 97.5, GEN4),
    _card("RTX 4090", 24, 165.2, GEN4),
    _card("RTX 5060 Ti 16GB", 16, 47.4, GEN4),
    _card("RTX 5070", 12, 61.7, GEN5),
    _card("RTX 5080", 16, 112.6, GEN5),
    _card("RTX 5090", 32, 209.5, GEN5),
    _card("L4", 24, 121, GEN4),
    _card("RTX A6000", 48, 154.8, GEN4, 64),
    _card("L40S", 48, 362, GEN4, 64),
    _card("A100 40GB", 40, 312, GEN4, 128),
    _card("A100 80GB", 80, 312, GEN4, 128),
    _card("H100", 80, 989, GEN5, 128),
    _card("H20", 96, 148, GEN5, 128),
    _card("H200", 141, 989, GEN5, 128),
)
BY_NAME = {card.name.lower(): card for card in CARDS}


def card_like(name: str) -> Machine:
    """The card that is meant: capitals, spaces and the maker's name do not matter. Raises InputError."""
    wanted = "".join(name.lower().replace("nvidia", "").replace("geforce", "").split())
    found = {"".join(known.split()): machine for known, machine in BY_NAME.items()}
    found |= {known.removeprefix("rtx"): machine for known, machine in found.items()}
    if wanted in found:
        return found[wanted]
    near = get_close_matches(wanted, found, n=1)
    hint = f" The nearest is {found[near[0]].name}." if near else ""
    names = ", ".join(machine.name for machine in CARDS)
    raise InputError(f"The card '{name}' is not known.{hint} Choose one of {names}, or say its size with --vram.")


def any_card(vram: int) -> Machine:
    """A card of this size of which nothing else is known: as fast as the slowest known one that is not smaller."""
    rates = [machine for machine in CARDS if machine.vram >= vram] or CARDS[-1:]
    like = min(rates, key=lambda machine: machine.rate)
    return replace(like, name=f"a card of {vram / GIB:g} GB", vram=vram)
