"""The engines that travel on a graph's wires: a diffusion model, text and image encoders, a VAE, each with its weights.

An engine is immutable; `with_…` returns a new handle on the same weights. What a run needs (copies on the compute
device) is attached for the length of the run: `with engine.attached(device) as module: …`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compute import free_memory
from .errors import InputError, ModelError
from .loading.catalog import Preset
from .lora import Lora, Loras, fit, widened, worked_in
from .models.attention import check_backend
from .models.compiled import Compile, compiled
from .models.dit import DiT
from .models.embedders import MotionController
from .models.image_encoder import ImageEncoder
from .models.layout import DiTLayout, size_name
from .models.network import Network
from .models.rope import parts
from .models.text_encoder import UMT5Encoder
from .models.tiling import Ladder, Size, ladder
from .models.tiny_vae import TinyVAE
from .models.tokenizer import MAX_TOKENS, Tokenizer, Tokens
from .models.vace import VACE
from .models.vae import SPATIAL_STRIDE, VideoCoder
from .offload.options import Offload
from .offload.policy import Plan, plan_all
from .offload.recovery import Result, others_give, persist
from .offload.residency import Residency
from .room import decoding_room, encoding_room, image_room, text_room, widened_room
from .sampling.easycache import EasyCache
from .sampling.magcache import Curve, MagCache
from .sampling.teacache import TeaCache
from .sampling.windows import Windows

FREE_THE_DEVICE = "Close other programs that use it, or choose a narrower weight_dtype."
Cache = EasyCache | MagCache | TeaCache
PARTS = {"vace": "VACE module", "motion_controller": "motion speed controller"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Engine:
    """A network, where it computes by default and in which type, and the memory promises that hosts rely on."""

    module: nn.Module
    name: str
    device: torch.device
    compute_dtype: torch.dtype
    residency: Residency
    offload: Offload | None = None

    @property
    def weights(self) -> tuple[Residency, ...]:
        """All sets of weights that a run needs. Handles share them: each is in memory once."""
        return (self.residency,)

    def total_bytes(self) -> int:
        """Bytes of all weights on the compute device."""
        return sum(weights.total_bytes() for weights in self.weights)

    def stored_bytes(self) -> int:
        """Bytes of all weights where they rest, in files or in main memory."""
        return sum(weights.stored_bytes() for weights in self.weights)

    def resident_bytes(self) -> int:
        """Bytes that `release` would give back; 0 where the weights are used in place."""
        return sum(weights.resident_bytes() for weights in self.weights)

    def ensure(self, budget: int | None = None, device: torch.device | str | None = None) -> int:
        """Keep up to `budget` bytes of weights on the compute device (None: all); returns the bytes kept."""
        kept = 0
        for weights in self.weights:
            kept += weights.ensure(None if budget is None else budget - kept, device or self.device)
        return kept

    def limit(self, offload: Offload, room: int, memory: tuple[int, int] | None) -> None:
        """Let no more weights stay on the compute device than the options allow, beside `room` bytes of other tensors.

        memory: (total, free) bytes of the device, None where that is unknown.
        """
        plans = self.plans(offload, room, memory, self.resident_bytes())
        for weights, planned in zip(self.weights, plans, strict=True):
            weights.limit_to(planned)

    def plans(self, offload: Offload, room: int, memory: tuple[int, int] | None, held: int = 0) -> list[Plan]:
        """What of each set of weights stays on the compute device and what travels, decided by numbers alone.

        held: bytes of these weights that are there already, and do not count as taken; other arguments as for `limit`.
        """
        if offload.persistent is None:
            return plan_all([weights.sizes() for weights in self.weights], offload.budget(room, held, memory))
        return [weights.plan_parameters(self.persistent(weights, offload.persistent)) for weights in self.weights]

    def persistent(self, weights: Residency, count: int) -> int | None:
        """How many parameters of these weights stay where `count` do of the network itself; None: all."""
        return count

    def passing_bytes(self) -> int:
        """Bytes on the compute device of weights in passing, where not all can stay."""
        return sum(weights.passing_bytes() for weights in self.weights)

    def release(self, amount: int | None = None) -> int:
        """Drop at least `amount` bytes from the compute device (None: all); returns the bytes freed."""
        freed = 0
        for weights in reversed(self.weights):
            freed += weights.release(None if amount is None else max(0, amount - freed))
        return freed

    def relieve(self) -> bool:
        """Memory ran out, maybe in a run: let others drop their weights, or drop half of those held here.

        False where there was nothing to drop.
        """
        return others_give(self.weights) or sum(weights.give_back() for weights in self.weights) > 0

    def residence(self) -> str:
        """Where the weights are, in a sentence."""
        held, total = (count / 2**30 for count in (self.resident_bytes(), self.total_bytes()))
        return f"{held:.1f} of {total:.1f} GiB of the weights stay on the device now."

    @contextmanager
    def attached(self, device: torch.device | str | None = None) -> Iterator[nn.Module]:
        """The module, ready to compute on `device` (the engine's own by default) inside the `with`. May nest."""
        with ExitStack() as stack:
            for weights in self.weights:
                stack.enter_context(weights.attached(device or self.device))
            yield self.module


@dataclass(frozen=True, eq=False, kw_only=True)
class WanModel(Engine):
    """A diffusion model: the trunk and what stands beside it, what is known of them, and how to run them.

    `residency` holds the trunk's weights, `beside` those of the network's other parts by their names. `curves` is what
    runs have shown for MagCache, by the `changes` of the trunk: all handles of one model share it.
    """

    module: Network
    layout: DiTLayout
    attention: str = "auto"
    preset: Preset = field(default_factory=Preset)
    beside: Mapping[str, Residency] = field(default_factory=dict)
    loras: Loras = ()
    cache: Cache | None = None
    windows: Windows | None = None
    riflex: int = 0
    compile: Compile | None = None
    curves: dict[Hashable, Curve] = field(default_factory=dict)

    @property
    def trunk(self) -> DiT:
        return self.module.trunk

    @property
    def changes(self) -> Hashable:
        """What makes the trunk answer otherwise than it does alone."""
        return self.module.vace, self.loras, self.riflex

    @property
    def weights(self) -> tuple[Residency, ...]:
        loras = dict.fromkeys(lora.residency for lora, _ in self.loras)  # one may be there twice
        return (*loras, self.residency, *self.beside.values())

    def persistent(self, weights: Residency, count: int) -> int | None:
        """As in DiffSynth-Studio, where LoRAs are part of the trunk and do not count, and what is beside it travels."""
        if weights is self.residency:
            return count
        return 0 if weights in self.beside.values() else None

    def with_module(self, part: VACE | MotionController) -> WanModel:
        """The same trunk with `part` beside it, in the place of one of its kind.

        Raises ModelError where the part was made for a trunk of another size.
        """
        name = "vace" if isinstance(part, VACE) else "motion_controller"
        if not part.fits(self.layout.dim, self.layout.layers):
            raise ModelError(
                f"This {PARTS[name]} was made for models of {size_name(part.dim)}, but {self.name} is one of "
                f"{size_name(self.layout.dim)} and {self.layout.layers} layers. Take the one for this size of model."
            )
        parts = {"vace": self.module.vace, "motion_controller": self.module.motion_controller, name: part}
        residency = Residency(part, self.compute_dtype, self.residency.rest_on)
        return replace(self, module=Network(self.trunk, **parts), beside={**self.beside, name: residency})

    def with_lora(self, lora: Lora, strength: float = 1.0) -> WanModel:
        """The same weights, changed by `lora` while they run, after the changes of the LoRAs before.

        Raises ModelError where nothing of it fits; `lora.report` tells what does. A control LoRA adds to what the
        model reads, in this handle alone.
        """
        network = widened(self.module, lora, self.name)
        fitted = fit(lora, network)
        if not fitted.changes:
            raise ModelError(
                f"Nothing of the LoRA {lora.name} fits {self.name}. {fitted.reasons()} "
                "Take a LoRA that was trained for this kind and size of model."
            )
        return replace(self, module=network, layout=network.trunk.layout, loras=(*self.loras, (lora, strength)))

    @contextmanager
    def attached(self, device: torch.device | str | None = None) -> Iterator[Network]:
        """As for every engine, with the LoRAs worked in, and compiled where that is wanted."""
        with super().attached(device) as network, worked_in(network, self.loras), compiled(network, self.compile):
            yield network

    def with_attention(self, backend: str) -> WanModel:
        """The same weights, attending by another backend. Raises InputError where it cannot be used."""
        return replace(self, attention=check_backend(backend))

    def with_cache(self, cache: Cache | None) -> WanModel:
        """The same weights, left out in some steps. None: in none. Raises InputError for a second kind of cache."""
        if cache is not None and self.cache is not None and cache.name != self.cache.name:
            raise InputError(
                f"This model already has Wan {self.cache.name}, and one cache cannot guess what another leaves out. "
                f"Remove Wan {self.cache.name} or Wan {cache.name}."
            )
        chosen = cache.chosen_for(self.layout, self.preset.width) if isinstance(cache, TeaCache | MagCache) else cache
        return replace(self, cache=chosen)

    def with_windows(self, windows: Windows | None) -> WanModel:
        """The same weights, looking at one window of a video at a time. None: at all of it."""
        return replace(self, windows=windows)

    def with_riflex(self, frequency: int) -> WanModel:
        """The same weights, whose frequency of this number, from 1, does not turn round within a long video. 0: as they
        are. Raises InputError where there is no such frequency."""
        most = parts(self.layout.head_dim)[0] // 2
        if not 0 <= frequency <= most:
            raise InputError(
                f"RIFLEx was asked for frequency {frequency}, but {most} of this model's turn with the frame. "
                f"Enter a number from 1 to {most}; 6 is usual."
            )
        return replace(self, riflex=frequency)

    def with_compile(self, settings: Compile | None) -> WanModel:
        """The same weights, compiled while they run. None: as they are."""
        return replace(self, compile=settings)


def most_tokens(text: str) -> int:
    """A text has at most so many tokens: one a letter, one in front, and one at the end."""
    return min(MAX_TOKENS, len(text) + 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class WanTextEncoder(Engine):
    """Reads prompts."""

    module: UMT5Encoder
    tokenizer: Tokenizer

    def working_room(self, text: str) -> int:
        """Bytes that a prompt needs beside the weights."""
        room = text_room(self.module.layout, most_tokens(text), self.compute_dtype)
        return room + widened_room(self.module, self.compute_dtype)

    def encode(self, texts: list[str]) -> tuple[Tensor, tuple[int, ...], str]:
        """n texts -> embeddings (n, 512, dim) fp32 on the CPU, zero after each text's real length; the lengths in
        tokens; and a report, "" unless something was cut."""
        tokens = self.tokenizer(texts)

        def read() -> Tensor:
            with self.attached() as module, torch.no_grad():
                rows = module(tokens.ids.to(self.device), tokens.mask.to(self.device), self.compute_dtype)
            return rows.float().cpu()  # (n, longest, dim)

        rows = persist(read, self.relieve, "reading the prompt", FREE_THE_DEVICE)
        return F.pad(rows, (0, 0, 0, MAX_TOKENS - rows.shape[1])), tokens.lengths, _report(tokens)


@dataclass(frozen=True, eq=False, kw_only=True)
class WanImageEncoder(Engine):
    """Looks at pictures."""

    module: ImageEncoder

    def working_room(self) -> int:
        """Bytes that a picture needs beside the weights."""
        return image_room(self.module.layout, self.compute_dtype) + widened_room(self.module, self.compute_dtype)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (n, H, W, 3) in 0..1, of any size -> features (n, 257, 1280) fp32 on the CPU."""

        def look() -> Tensor:
            with self.attached() as module, torch.no_grad():
                return module(images.to(self.device), self.compute_dtype).float().cpu()

        return persist(look, self.relieve, "looking at a picture", FREE_THE_DEVICE)


@dataclass(frozen=True, eq=False, kw_only=True)
class WanVAE(Engine):
    """Between pixels and raw latents (not normalised). Results are fp32 on the input's device.

    Encoding is computed in fp32 on cards too: what it rounds off, every step of the sampling would be given.
    """

    module: VideoCoder

    @property
    def tiny(self) -> bool:
        """Whether this is a tiny VAE, for previews and drafts."""
        return isinstance(self.module, TinyVAE)

    def decoding_room(self, picture: Size, single: bool = False) -> int:
        """Bytes that decoding needs beside the weights; arguments as for `room.decoding_room`."""
        return decoding_room(self.module.width, picture, self.compute_dtype, single, self.tiny)

    def encoding_room(self, picture: Size, single: bool = False) -> int:
        """Bytes that encoding needs beside the weights."""
        return encoding_room(self.module.width, picture, torch.float32, single, self.tiny)

    def attached(self, device: torch.device | str | None = None) -> AbstractContextManager[VideoCoder]:
        """As for every engine, but always with all weights on the device: they are few, and convolutions reuse them."""
        self.ensure(None, device)
        return super().attached(device)

    def plans(self, offload: Offload, room: int, memory: tuple[int, int] | None, held: int = 0) -> list[Plan]:
        """All stays: see `attached`."""
        return plan_all([weights.sizes() for weights in self.weights], None)

    def encode(self, pixels: Tensor, **tiling) -> Tensor:
        """(b, 3, 4n+1, 8h, 8w) in -1..1 -> (b, 16, n+1, h, w). Tiling: tiled, tile_size, tile_stride, as the VAE's.

        What is not tiled is all the same where it would not fit, and tiles become smaller where memory runs out.
        """
        pixels = pixels.float()
        sizes = ladder((pixels.shape[3] // SPATIAL_STRIDE, pixels.shape[4] // SPATIAL_STRIDE), **tiling)

        def encode() -> Tensor:
            with self.attached() as module:
                return module.encode(pixels, **asdict(sizes.first(self._fits(self.encoding_room, pixels))))

        return self._persist(encode, sizes, "encoding a video")

    def decode(self, latents: Tensor, **tiling) -> Tensor:
        """(b, 16, n+1, h, w) -> (b, 3, 4n+1, 8h, 8w) in -1..1. Tiling: as for `encode`."""
        latents = latents.to(self.compute_dtype)
        sizes = ladder(tuple(latents.shape[3:]), **tiling)

        def decode() -> Tensor:
            with self.attached() as module:
                return module.decode(latents, **asdict(sizes.first(self._fits(self.decoding_room, latents))))

        return self._persist(decode, sizes, "decoding a video")

    def frames(self, latents: Tensor, **tiling) -> Iterator[Tensor]:
        """As `decode`, clip after clip, some frames (1, 3, t, 8h, 8w) at a time as they are done.

        Where memory runs out the clip begins again in tiles, and goes on behind the frames that were given.
        """
        latents = latents.to(self.compute_dtype)
        sizes = ladder(tuple(latents.shape[3:]), **tiling)
        with self.attached() as module:
            for clip in latents.split(1):
                yield from self._clip_frames(module, clip, sizes)

    def _clip_frames(self, module: VideoCoder, clip: Tensor, sizes: Ladder) -> Iterator[Tensor]:
        given, groups = 0, None

        def advance() -> Tensor | None:
            nonlocal groups
            if groups is None:
                tiling = asdict(sizes.first(self._fits(self.decoding_room, clip)))
                groups = behind(given, module.frames(clip, **tiling))
            try:
                return next(groups, None)
            except RuntimeError:
                groups = None  # what failed cannot go on
                raise

        while (group := self._persist(advance, sizes, "decoding a video")) is not None:
            given += group.shape[2]
            yield group

    def _fits(self, room: Callable[..., int], clip: Tensor) -> Callable[[Size], bool]:
        """Whether there is memory now, by the estimate `room`, to work on (height, width) latents of `clip` at once."""
        free = free_memory(self.device)

        def fits(size: Size) -> bool:
            picture = tuple(SPATIAL_STRIDE * side for side in size)
            return free is None or room(picture, clip.shape[2] == 1) <= free

        return fits

    def _persist(self, work: Callable[[], Result], sizes: Ladder, doing: str) -> Result:
        """`work()`, with ever smaller tiles where memory runs out."""
        advice = "Take a smaller size of video, or close other programs that use the device."
        return persist(work, lambda: others_give(self.weights) or sizes.step_down(), doing, advice)


def behind(count: int, groups: Iterator[Tensor]) -> Iterator[Tensor]:
    """Groups of frames (b, c, t, h, w) without the first `count` frames of them all."""
    for group in groups:
        if count < group.shape[2]:
            yield group[:, :, count:]
        count = max(0, count - group.shape[2])


def _report(tokens: Tokens) -> str:
    """What did not fit, one line a text."""
    return "\n".join(
        f"The prompt has {length + count} tokens, the model reads {MAX_TOKENS}: the last {count} were cut ('{text}'). "
        "Shorten it, or put what matters first."
        for text, count, length in zip(tokens.cut, tokens.cut_counts, tokens.lengths, strict=True)
        if count
    )
