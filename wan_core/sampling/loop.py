"""The sampler: noise, or an encoded video with noise on top, becomes the latents of a new video."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.injection import Canvas, Condition, Injection, inject
from ..errors import InputError, ModelError
from ..model import WanModel
from ..models.layout import LATENT_CHANNELS
from ..models.slots import Run
from ..models.vae import normalised, unnormalised
from ..offload.recovery import persist
from ..parallel.team import Share, Team
from ..room import changed_room, latents_room, sampling_room, tokens_room, widened_room
from .caching import learn, residuals_for
from .contexts import Contexts
from .easycache import KEPT_LATENTS, EasyCache, Skipping
from .magcache import Measuring
from .schedules import SOLVERS, check_part, noise_levels
from .windows import Sliding, Windows, spans_of

HIGHEST_SEED = 2**64 - 1
SMALLER = "Take a smaller or shorter video, put Wan Sliding Window in front of the sampler, or switch cfg_merge off."
DENOISE_AS = ("DiffSynth", "ComfyUI")
STATES = {"none": torch.float32, "DiffSynth": torch.bfloat16}

# step (0 is the first), number of steps, the clean video as the model sees it now: (b, 16, T, h, w), normalised
OnStep = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Settings:
    """How to sample. Raises InputError for values that cannot work.

    seed: 0..2^64-1, and `rand_device` is where the noise is drawn: on "cpu" a seed gives the same noise everywhere.
    cfg: how strongly to prefer the positive over the negative prompt; exactly 1 leaves the negative out.
    cfg_merge: run both prompts as one batch: faster on a large GPU, for twice the memory.
    cfg_start, cfg_end: the part of the run, 0 to 1, that is guided by cfg; outside it the positive prompt works alone.
    denoise: below 1 the given video is kept in part; all steps are run, from a lower noise level. denoise_as: which
    one, see `levels`.
    timesteps: the noise levels themselves, 1000 to 0, one a step; empty: as `shift` spaces them.
    rounding: "none" keeps all in fp32; "DiffSynth" rounds latents and timesteps to bf16 in every step, as
    DiffSynth-Studio does: only to make what it makes.
    """

    seed: int
    steps: int = 50
    cfg: float = 5.0
    cfg_merge: bool = False
    shift: float = 5.0
    scheduler: str = "euler"
    denoise: float = 1.0
    rand_device: str = "cpu"
    denoise_as: str = "DiffSynth"
    rounding: str = "none"
    cfg_start: float = 0.0
    cfg_end: float = 1.0
    timesteps: tuple[float, ...] = ()

    def __post_init__(self):
        if not 0 <= self.seed <= HIGHEST_SEED:
            raise InputError(f"seed is {self.seed}, but it has to be between 0 and {HIGHEST_SEED}.")
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}, but sampling needs at least 1. Enter 1 or more (50 is usual).")
        if not math.isfinite(self.cfg):
            raise InputError(f"cfg is {self.cfg}. Enter a number; 5 is usual, and 1 ignores the negative prompt.")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise InputError(f"shift is {self.shift}, but it has to be above 0. Enter a number such as 5.")
        if self.scheduler not in SOLVERS:
            raise InputError(f"There is no scheduler {self.scheduler!r}. Choose one of {', '.join(SOLVERS)}.")
        if not 0 < self.denoise <= 1:
            raise InputError(f"denoise is {self.denoise}, but it has to be above 0 and at most 1.")
        check_part("cfg_start", self.cfg_start, "cfg_end", self.cfg_end)
        self.check_timesteps()
        for name, known in (("denoise_as", DENOISE_AS), ("rounding", STATES)):
            if getattr(self, name) not in known:
                raise InputError(f"There is no {name} {getattr(self, name)!r}. Choose one of {', '.join(known)}.")

    def check_timesteps(self) -> None:
        named = ", ".join(f"{timestep:g}" for timestep in self.timesteps)
        bounds = (1000.0, *self.timesteps, 0.0)
        falling = all(later < level for level, later in pairwise(bounds[1:])) and bounds[0] >= bounds[1]
        if self.timesteps and not falling:
            raise InputError(f"timesteps is {named}, but the numbers have to fall, from 1000 at most to above 0.")
        if self.timesteps and len(self.timesteps) != self.steps:
            raise InputError(
                f"timesteps names {len(self.timesteps)} steps ({named}), but steps is {self.steps}. "
                f"Set steps to {len(self.timesteps)}, or leave timesteps empty."
            )
        if self.timesteps and self.denoise < 1:
            raise InputError(
                f"denoise is {self.denoise}, but timesteps says where to begin. Set denoise to 1, or leave timesteps "
                "empty."
            )

    def levels(self) -> list[float]:
        """The steps + 1 noise levels, falling to 0.

        Below a denoise of 1, DiffSynth-Studio falls evenly from that level; ComfyUI takes the last steps of a longer
        run that begins with pure noise, whose number of steps is a whole one.
        """
        highest = SOLVERS[self.scheduler].highest
        if self.timesteps:
            return [min(timestep / 1000, highest) for timestep in self.timesteps] + [0.0]
        if self.denoise_as == "ComfyUI":
            return noise_levels(int(self.steps / self.denoise), self.shift, highest)[-self.steps - 1 :]
        return noise_levels(self.steps, self.shift, self.denoise * highest)

    def guided(self, step: int) -> bool:
        """Whether this step compares with the negative prompt."""
        return self.cfg != 1 and self.cfg_start <= step / self.steps < self.cfg_end

    def alike(self) -> list[bool]:
        """For each step whether it asks the model for the same prompts as the step before."""
        return [step > 0 and self.guided(step) == self.guided(step - 1) for step in range(self.steps)]

    @property
    def state(self) -> torch.dtype:
        """The type of the latents from step to step."""
        return STATES[self.rounding]


@torch.no_grad()
def sample(
    model: WanModel,
    positive: Tensor,
    negative: Tensor | None,
    latent: Tensor,
    settings: Settings,
    conditions: Sequence[Condition] = (),
    on_step: OnStep | None = None,
    say: Callable[[str], None] | None = None,
    team: Team | None = None,
) -> Tensor:
    """Make videos: raw latents (b, 16, T, h, w) in, raw latents of the same shape out, fp32, on the same device.

    positive, negative: embedded prompts (b or 1, L, text width), zero after their real length; the negative may be
    None where cfg is 1. latent: its shape is the canvas; all zero means empty, else it is the video to change.
    An exception of `on_step` ends the run and passes through. `say` hears in a sentence what a cache leaves out, and
    when memory ran out; then the step is done again from the same latents with fewer weights on the device.
    team: processes that all make the same call, and share the work; they do not go on when memory runs out.
    """
    device = model.device
    check_latent(latent, settings)
    texts = [text.to(device) for text in prompts(positive, negative, latent, settings, model.layout.text_dim)]
    calls = 1 if settings.cfg_merge else len(texts)
    share = Share() if team is None else team.share(calls, model.layout.heads)
    run = Run(model.compute_dtype, model.attention, parallel=share.tokens, riflex=model.riflex)
    with model.attached(device) as network:
        always = all(settings.guided(step) for step in range(settings.steps))
        asked = texts if always or len(texts) == 1 or not settings.cfg_merge else [*texts, texts[0]]
        contexts = Contexts(model, asked, lambda: working_room(model, latent.shape, settings, conditions))

        def relieve() -> bool:
            relieved = team is None and (contexts.drop() or model.relieve())
            if relieved and say is not None:
                say(f"Memory ran out. {model.residence()} What failed is done again.")
            return relieved

        canvas = Canvas(latent.shape[0], *latent.shape[2:], dtype=model.compute_dtype, device=device)
        injection = persist(lambda: inject(conditions, network, canvas), relieve, "preparing the conditions", SMALLER)

        sliding = Sliding(model.windows, injection, canvas.frames)
        timesteps = torch.cat([timestep(sigma, settings.state) for sigma in settings.levels()[:-1]]).to(device)
        residuals = residuals_for(model, timesteps, settings.alike(), injection.time_add)

        def predict(x: Tensor, timestep: Tensor, text: Tensor, step: int, branch: int) -> Tensor:
            def look(x: Tensor, injection: Injection, window: int) -> Tensor:
                here = replace(run, kept=contexts.kept[branch])
                if residuals is not None:
                    here = replace(here, body=residuals.body(step, (min(branch, calls - 1), window)))
                return network.trunk(x.float(), timestep, text, injection, here).to(x.dtype)

            return sliding(look, x, step if residuals is None else residuals.source(step))

        def same(x: Tensor) -> Tensor:
            return x if team is None else team.same(x)

        def report(i: int, clean: Tensor) -> None:
            if on_step is not None:
                on_step(i, settings.steps, clean[:, :, injection.prefix :])

        x = beginning(latent.to(device, torch.float32), injection.prefix_frames, settings, model.windows)
        x = same(x)

        def noise(i: int) -> Tensor:
            return same(draw_noise(latent.shape, injection.prefix, settings, i + 1, model.windows).to(x))

        velocity = guided(predict, texts, settings, share)

        def repeated(x: Tensor, timestep: Tensor, step: int) -> Tensor:
            doing = f"computing step {step + 1} of {settings.steps}"
            return persist(lambda: velocity(x, timestep, step), relieve, doing, SMALLER)

        skipping = residuals
        if isinstance(model.cache, EasyCache):
            repeated = skipping = Skipping(model.cache, repeated, settings.alike(), same)
        x = denoise(x, repeated, settings, report, noise)
        told = ""
        if isinstance(residuals, Measuring):
            told = learn(model, residuals, timesteps, same)
        elif skipping is not None:
            told = model.cache.report(skipping.skipped)
        if told and say is not None:
            say(told)
    return unnormalised(x[:, :, injection.prefix :].float()).to(latent.device)


def working_room(
    model: WanModel, shape: Sequence[int], settings: Settings, conditions: Sequence[Condition] = ()
) -> int:
    """Bytes that a run on latents (b, 16, T, h, w) needs beside the weights."""
    texts, front = 1 if settings.cfg == 1 else 2, in_front(conditions)
    rows, channels, frames, *size = shape
    steps = [spans_of(model.windows, frames, step) for step in range(settings.steps)]
    longest = rows, channels, front + max(stop - start for start, stop in steps[0]), *size
    whole = rows, channels, front + frames, *size
    branches, vace = texts if settings.cfg_merge else 1, model.module.vace is not None
    dtype, widened = model.compute_dtype, widened_room(model.module, model.compute_dtype)
    room = sampling_room(model.layout, longest, branches, dtype, vace, widened) + latents_room(whole)
    room += bool(model.loras) * changed_room(model.layout, dtype)
    room += sum(condition.embedded for condition in conditions) * tokens_room(model.layout, whole, dtype)
    if isinstance(model.cache, EasyCache):
        room += KEPT_LATENTS * math.prod(whole) * settings.state.itemsize
    elif model.cache is not None and model.cache.device != "cpu":
        seen = max(sum(front + stop - start for start, stop in spans) for spans in steps)
        kept = rows, channels, seen, *size
        room += texts * tokens_room(model.layout, kept, dtype)
    return room


def in_front(conditions: Sequence[Condition]) -> int:
    """Latent frames that the conditions put in front of the canvas."""
    return sum(condition.in_front for condition in conditions)


def beginning(latent: Tensor, prefix: Tensor | None, settings: Settings, windows: Windows | None) -> Tensor:
    """What to denoise: noise, mixed with the raw latent unless that is empty; (b, 16, P+T, h, w) normalised.

    prefix: clean normalised frames (b or 1, 16, P, h, w) in front of the canvas.
    """
    noise = draw_noise(latent.shape, 0 if prefix is None else prefix.shape[2], settings, 0, windows)
    noise = noise.to(latent.device, settings.state)
    if is_empty(latent):
        return noise
    clean = normalised(latent).to(settings.state)
    if prefix is not None:
        clean = torch.cat([prefix.to(clean).expand(len(clean), -1, -1, -1, -1), clean], dim=2)
    sigma = settings.levels()[0]
    return (1 - sigma) * clean + sigma * noise


def denoise(
    x: Tensor,
    velocity: Callable,
    settings: Settings,
    report: Callable[[int, Tensor], None],
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Walk x down the noise levels along velocity(x, timestep, step), with noise(step) where a solver wants more;
    `report` gets the clean video seen each step."""
    sigmas = settings.levels()
    solver = SOLVERS[settings.scheduler](sigmas, noise)
    for i in range(settings.steps):
        v = velocity(x, timestep(sigmas[i], x.dtype).to(x.device), i)
        if not v.isfinite().all():
            raise ModelError(
                f"In step {i + 1} of {settings.steps} the model's answer held values that are not numbers. "
                "Load the weights in another weight_dtype, choose the attention 'sdpa', or check the model file."
            )
        report(i, (x - sigmas[i] * v).float())
        x = solver.step(i, x, v)
    return x


def timestep(sigma: float, state: torch.dtype) -> Tensor:
    """What the model is told of a noise level, (1,) fp32: 0 to 1000, as exactly as a `state` can say it."""
    return torch.tensor([1000 * sigma]).to(state).float()


def guided(
    predict: Callable, texts: list[Tensor], settings: Settings, share: Share
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """velocity(x, timestep, step) under classifier-free guidance: away from the negative prompt, to the positive.

    predict(x, timestep, text, step, branch) is called for each prompt (or for this process's share of them), or once
    for both as one batch; outside the guided part of the run for the positive one only.
    Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598.
    """
    def alone(x: Tensor, timestep: Tensor, step: int) -> Tensor:
        branch = 2 if len(texts) > 1 and settings.cfg_merge else 0  # the merged ones are a text of their own
        answer = predict(x, timestep, texts[0], step, branch)  # where processes work at a prompt each, all do this one
        return answer if share.prompt is None else share.answers(answer, len(texts))[0]

    def one_after_the_other(x: Tensor, timestep: Tensor, step: int) -> list[Tensor]:
        return [predict(x, timestep, text, step, branch) for branch, text in enumerate(texts)]

    def one_each(x: Tensor, timestep: Tensor, step: int) -> list[Tensor]:
        mine = predict(x, timestep, texts[share.prompt], step, share.prompt)
        return share.answers(mine, len(texts))

    def as_one_batch(x: Tensor, timestep: Tensor, step: int) -> list[Tensor]:
        length = max(text.shape[1] for text in texts)  # zero rows are what follows a shorter text anyway
        both = torch.cat([F.pad(text, (0, 0, 0, length - text.shape[1])) for text in texts])
        return list(predict(x.repeat(2, 1, 1, 1, 1), timestep, both, step, 0).chunk(2))

    branches = as_one_batch if settings.cfg_merge else one_after_the_other if share.prompt is None else one_each

    def velocity(x: Tensor, timestep: Tensor, step: int) -> Tensor:
        if not settings.guided(step):
            return alone(x, timestep, step)
        positive, negative = branches(x, timestep, step)
        return negative + settings.cfg * (positive - negative)

    return velocity


def prompts(
    positive: Tensor, negative: Tensor | None, latent: Tensor, settings: Settings, text_dim: int
) -> list[Tensor]:
    """The texts that have to be run, (b, L, text_dim) fp32 each: [positive] or [positive, negative]."""
    if settings.cfg == 1:
        wanted = {"positive": positive}
    elif negative is None:
        raise InputError(
            f"cfg is {settings.cfg}, which compares with a negative prompt, but none is connected. "
            "Connect a Wan Prompt to negative (it may be empty), or set cfg to 1."
        )
    else:
        wanted = {"positive": positive, "negative": negative}
    for name, text in wanted.items():
        if text.dim() != 3 or text.shape[2] != text_dim:
            raise ModelError(
                f"{name} has the shape {tuple(text.shape)}, but this model reads (prompts, tokens, {text_dim}). "
                "Encode the prompt with Wan's text encoder (UMT5-XXL)."
            )
        if text.shape[0] not in (1, latent.shape[0]):
            raise InputError(
                f"{name} holds {text.shape[0]} prompts for {latent.shape[0]} videos. "
                "Give one prompt for all, or one a video."
            )
    return [text.float().expand(latent.shape[0], -1, -1) for text in wanted.values()]


def is_empty(latent: Tensor) -> bool:
    """All zero: no video, only a canvas."""
    return not latent.any()


def check_latent(latent: Tensor, settings: Settings) -> None:
    """Raises InputError if the latent cannot be sampled."""
    if latent.dim() != 5 or latent.shape[1] != LATENT_CHANNELS or latent.shape[3] % 2 or latent.shape[4] % 2:
        raise InputError(
            f"The latent has the shape {tuple(latent.shape)}, but Wan 2.1 needs "
            f"(videos, {LATENT_CHANNELS}, frames, even height, even width). Make it with Empty Wan Latent or "
            "Wan VAE Encode."
        )
    if is_empty(latent) and settings.denoise < 1:
        raise InputError(
            f"denoise is {settings.denoise}, but the latent is empty: there is no video to keep a part of. "
            "Set denoise to 1, or connect an encoded video."
        )


def draw_noise(
    shape: Sequence[int], prefix: int, settings: Settings, step: int = 0, windows: Windows | None = None
) -> Tensor:
    """Normal noise (b, 16, P+T, h, w) fp32 for a canvas (b, 16, T, h, w) and `prefix` frames in front of it.

    The whole batch is one draw: for the same seed these are DiffSynth-Studio's and ComfyUI's numbers. The prefix is
    drawn afterwards, so that it does not change the canvas's noise. Each step that wants more has a seed of its own, so
    that one that is done again finds the same. windows: that may share it.
    """
    device, seed = settings.rand_device, (settings.seed + step) % 2**64
    try:
        generator = torch.Generator(device).manual_seed(seed)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise InputError(f"This computer cannot draw noise on rand_device {device!r}. Choose 'cpu'.") from error
    noise = torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)
    front = torch.randn((*shape[:2], prefix, *shape[3:]), generator=generator, device=device, dtype=torch.float32)
    return torch.cat([front, noise if windows is None else windows.shared(noise, seed)], dim=2)
