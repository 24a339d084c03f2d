"""What a user may say about where weights live. Sizes are bytes."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from .quantize import STORAGE

REST_ON = ("cpu", "disk")
REST_DTYPES = tuple(STORAGE)
HALF_A_GIB = 2**29


@dataclass(frozen=True)
class Offload:
    """Raises InputError for a choice that there is not.

    rest_on      where weights wait that are not on the compute device (see Residency)
    rest_dtype   the type they have there; "auto" leaves it to the loader. On disk another type than the file's means a
                 second file, which the loader writes once
    vram_limit   how much of the device may be in use, by all programs together; None: all of it
    vram_buffer  how much of that is left free
    persistent   how many parameters stay on the device, in place of the limit
    """

    rest_on: str = "disk"
    rest_dtype: str = "auto"
    vram_limit: int | None = None
    vram_buffer: int = HALF_A_GIB
    persistent: int | None = None

    def __post_init__(self):
        for name, value, known in (("rest_on", self.rest_on, REST_ON), ("rest_dtype", self.rest_dtype, REST_DTYPES)):
            if value not in known:
                raise InputError(f"{name} is '{value}'. Choose one of {', '.join(known)}.")

    def weight_dtype(self, wanted: str) -> str:
        """The type to load weights in, where the loader was asked for `wanted`."""
        return wanted if self.rest_dtype == "auto" else self.rest_dtype

    def budget(self, room: int, held: int, memory: tuple[int, int] | None) -> int | None:
        """Bytes that the weights may take on the device, those in passing included; None: any number.

        room: of the run's own tensors; held: of weights that are there already; memory: the device's (total, free),
        None where that is unknown, and then others count as taking nothing.
        """
        if memory is None:
            return None if self.vram_limit is None else self.vram_limit - self.vram_buffer - room
        total, free = memory
        limit = total if self.vram_limit is None else min(self.vram_limit, total)
        return limit - self.vram_buffer - (total - free - held) - room
