"""The sampler on a field whose exact answer is known, on a small random DiT, and at its edges."""

import math
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_wanflow.wan_core.adapters.injection import Condition, Injection
from comfyui_wanflow.wan_core.errors import InputError, ModelError
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.vae import LATENT_MEAN, LATENT_STD
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from comfyui_wanflow.wan_core.sampling.schedules import SOLVERS
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "data" / "golden" / "scheduler.safetensors"
SPREAD = 0.4
EMPTY = torch.zeros(1, 16, 2, 4, 4)
MEAN, STD = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))


def text(value, rows=1, length=4):
    return torch.full((rows, length, 8), float(value))


class GaussianField:
    """A trunk that knows one thing: clean latents are N(the text's value, SPREAD^2) everywhere. Keeps its calls."""

    def __init__(self):
        self.layout = SimpleNamespace(in_dim=16, text_dim=8, image_tokens=False, concat={})
        self.calls = []

    def __call__(self, x, timestep, text, injection, run):
        self.calls.append(SimpleNamespace(x=x, timestep=timestep, text=text, injection=injection, run=run))
        sigma = timestep.view(-1, 1, 1, 1, 1) / 1000
        mean = text[:, 0, 0].view(-1, 1, 1, 1, 1)
        slope = (sigma - (1 - sigma) * SPREAD**2) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
        return slope * (x - (1 - sigma) * mean) - mean


class FakeModel:
    """What the sampler uses of a WanModel, around any trunk."""

    device, compute_dtype, attention = torch.device("cpu"), torch.float32, "auto"
    cache = windows = compile = riflex = None

    def __init__(self, trunk):
        self.trunk, self.layout, self.attachments = trunk, trunk.layout, []

    @contextmanager
    def attached(self, device):
        self.attachments.append("in")
        try:
            yield SimpleNamespace(trunk=self.trunk)
        finally:
            self.attachments.append("out")


@pytest.fixture
def field():
    return FakeModel(GaussianField())


@pytest.fixture(scope="module")
def small():
    """A real, random DiT of two layers."""
    torch.manual_seed(0)
    layout = DiTLayout(dim=128, ffn_dim=96, layers=2, heads=1, text_dim=8)
    module = DiT(layout)
    torch.nn.init.normal_(module.head.head.weight, std=0.1)
    return WanModel(
        module=Network(module), name="small", device=torch.device("cpu"), compute_dtype=torch.float32,
        residency=Residency(module), layout=layout,
    )  # fmt: skip


def noise(seed, shape=EMPTY.shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoded_video(shape=EMPTY.shape):
    return noise(99, shape) * STD + MEAN


@pytest.mark.parametrize(
    "scheduler, steps, tolerance", [("euler", 400, 2e-2), ("dpm++", 60, 2e-3), ("unipc", 60, 2e-3)]
)
def test_reaches_the_exact_solution(field, scheduler, steps, tolerance):
    settings = Settings(7, steps, cfg=1, scheduler=scheduler)
    result = sample(field, text(0.7), None, EMPTY, settings)
    # From pure noise the flow to N(m, s^2) is x -> m + s * x. Raw latents are the normalised ones * std + mean.
    expected = (0.7 + SPREAD * noise(7)) * STD + MEAN
    assert (result - expected).norm() / expected.norm() <= tolerance


def test_guidance_extrapolates_from_negative_to_positive(field):
    result = sample(field, text(0.5), text(-0.5), EMPTY, Settings(7, 60, cfg=3, scheduler="unipc"))
    # The field is linear in the mean, so guidance moves the mean to -0.5 + 3 * (0.5 - -0.5).
    expected = (2.5 + SPREAD * noise(7)) * STD + MEAN
    assert (result - expected).norm() / expected.norm() <= 2e-3
    assert len(field.trunk.calls) == 120


def test_noise_equals_the_recorded_reference(field):
    golden = load_file(GOLDEN)["noise_seed0_1x16x3x4x6"]
    sample(field, text(0), None, torch.zeros_like(golden), Settings(0, 1, cfg=1))
    assert torch.equal(field.trunk.calls[0].x, golden)


def test_a_batch_is_one_draw_with_one_or_many_prompts(field):
    canvas = EMPTY.repeat(3, 1, 1, 1, 1)
    prompts = torch.cat([text(0), text(1), text(2)])
    result = sample(field, prompts, None, canvas, Settings(3, 40, cfg=1, scheduler="unipc"))
    assert torch.equal(field.trunk.calls[0].x, noise(3, canvas.shape))
    means = ((result - MEAN) / STD - SPREAD * noise(3, canvas.shape)).mean((1, 2, 3, 4))
    assert torch.allclose(means, torch.tensor([0.0, 1.0, 2.0]), atol=1e-2)
    assert sample(field, text(0), text(1), canvas, Settings(3, 2)).shape == canvas.shape


def test_timesteps_are_exact_and_float32(field):
    sample(field, text(0), None, EMPTY, Settings(0, 3, cfg=1, shift=5.0))
    timesteps = torch.cat([call.timestep for call in field.trunk.calls])
    assert timesteps.dtype == torch.float32
    assert torch.allclose(timesteps, torch.tensor([1000, 1000 * 10 / 11, 1000 * 5 / 7]))


def test_cfg_of_exactly_one_skips_the_negative(field):
    with_negative = sample(field, text(1), text(-1), EMPTY, Settings(0, 5, cfg=1))
    assert len(field.trunk.calls) == 5
    assert torch.equal(with_negative, sample(field, text(1), None, EMPTY, Settings(0, 5, cfg=1, cfg_merge=True)))


def test_merged_guidance_is_one_call_a_step_with_equal_numbers(small):
    canvas = EMPTY.repeat(2, 1, 1, 1, 1)
    positive, negative = (
        torch.randn(1, length, 8, generator=torch.Generator().manual_seed(length)) for length in (5, 9)
    )
    calls = []
    handle = small.trunk.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    apart = sample(small, positive, negative, canvas, Settings(0, 3))
    merged = sample(small, positive, negative, canvas, Settings(0, 3, cfg_merge=True))
    handle.remove()
    assert calls == [2] * 6 + [4] * 3
    assert (apart - merged).norm() / apart.norm() <= 1e-5
    assert (apart - sample(small, positive, positive, canvas, Settings(0, 3))).abs().max() > 1e-3


def test_a_seed_decides_everything(small):
    first, again, other = (sample(small, text(1), None, EMPTY, Settings(seed, 3, cfg=1)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with torch.inference_mode():  # as inside ComfyUI
        assert torch.equal(first, sample(small, text(1), None, EMPTY, Settings(5, 3, cfg=1)))


def test_video_to_video_starts_from_the_encoded_video(field):
    video = encoded_video()
    sample(field, text(0), None, video, Settings(1, 4, cfg=1, denoise=0.7))
    sigma = 3.5 / 3.8  # 0.7 after a shift of 5
    first = field.trunk.calls[0]
    assert first.timestep.item() == pytest.approx(1000 * sigma) and len(field.trunk.calls) == 4
    assert torch.allclose(first.x, (1 - sigma) * (video - MEAN) / STD + sigma * noise(1), atol=1e-5)


def test_denoise_as_comfyui_takes_the_last_steps_of_a_longer_run(field):
    video = encoded_video()
    settings = Settings(1, 20, cfg=1, shift=3, denoise=0.7, denoise_as="ComfyUI")
    sample(field, text(0), None, video, settings)
    # What KSampler.set_steps of ComfyUI 0.3.64 gives with the scheduler "simple" and a ModelSamplingDiscreteFlow of
    # shift 3, whose levels are a thousandth apart before the shift: of 28 steps the last 20.
    recorded = [0.882716, 0.863868, 0.843832, 0.823105, 0.800373, 0.776062]
    told = [call.timestep.item() / 1000 for call in field.trunk.calls]
    assert len(told) == 20 and told[:6] == pytest.approx(recorded, abs=2e-3)
    assert Settings(1, 20, denoise_as="ComfyUI").levels() == Settings(1, 20).levels()
    assert Settings(1, 10, denoise=0.3, denoise_as="ComfyUI").levels() == Settings(1, 33).levels()[-11:]
    near = Settings(1, 20, cfg=1, shift=3, denoise=0.7).levels()
    assert settings.levels() != near and settings.levels() == pytest.approx(near, abs=0.02)


def test_rounding_as_diffsynth_keeps_latents_and_timesteps_in_bf16(field):
    """Against its loop, written out: everything between two calls of the model is bf16."""
    settings = Settings(1, 5, cfg=3, denoise=0.6, rounding="DiffSynth")
    got = sample(field, text(0.5), text(-0.5), encoded_video(), settings)
    sigmas = settings.levels()
    x = (1 - sigmas[0]) * ((encoded_video() - MEAN) / STD).bfloat16() + sigmas[0] * noise(1).bfloat16()
    model = GaussianField()
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        timestep = torch.tensor([1000 * sigma]).bfloat16().float()
        positive, negative = (model(x.float(), timestep, text(v), None, None).bfloat16() for v in (0.5, -0.5))
        x = x + (negative + 3 * (positive - negative)) * (following - sigma)
        assert x.dtype == torch.bfloat16
    expected = x.float() * STD + MEAN
    assert (got - expected).norm() <= 1e-6 * expected.norm()
    exact = sample(field, text(0.5), text(-0.5), encoded_video(), Settings(1, 5, cfg=3, denoise=0.6))
    assert 1e-4 < (got - exact).norm() / exact.norm() < 0.1
    assert all(call.x.dtype == call.timestep.dtype == torch.float32 for call in field.trunk.calls)


def test_a_full_denoise_ignores_the_video(field):
    settings = Settings(1, 4, cfg=1)
    assert torch.equal(
        sample(field, text(0), None, encoded_video(), settings), sample(field, text(0), None, EMPTY, settings)
    )


def test_denoise_needs_a_video(field):
    with pytest.raises(InputError, match="denoise is 0.7, but the latent is empty.*Set denoise to 1"):
        sample(field, text(0), None, EMPTY, Settings(1, 4, cfg=1, denoise=0.7))


def test_steps_are_reported_with_the_clean_video(field):
    seen = []
    sample(field, text(1), None, EMPTY, Settings(0, 4, cfg=1), on_step=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    call = field.trunk.calls[2]
    velocity = field.trunk(call.x, call.timestep, call.text, None, None)
    assert torch.allclose(seen[2][2], call.x - call.timestep / 1000 * velocity, atol=1e-6)


def test_an_exception_of_the_callback_passes_and_detaches(field):
    class Interrupted(Exception):
        pass

    def stop(step, steps, clean):
        if step == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        sample(field, text(1), None, EMPTY, Settings(0, 4, cfg=1), on_step=stop)
    assert len(field.trunk.calls) == 2 and field.attachments == ["in", "out"]


def test_not_a_number_is_said_with_its_step(field):
    with pytest.raises(ModelError, match="In step 1 of 4 .* not numbers"):
        sample(field, text(math.nan), None, EMPTY, Settings(0, 4, cfg=1))


def test_the_model_decides_type_and_attention_while_the_state_stays_float32(field):
    field.compute_dtype, field.attention = torch.bfloat16, "sdpa"
    result = sample(field, text(1).bfloat16(), None, EMPTY.half(), Settings(0, 2, cfg=1))
    call = field.trunk.calls[1]
    assert call.run.compute_dtype == torch.bfloat16 and call.run.attention == "sdpa"
    assert call.x.dtype == call.text.dtype == result.dtype == torch.float32


class FramesInFront(Condition):
    """Two clean frames before the canvas, and a motion speed, to see that injections arrive."""

    def inject(self, network, canvas):
        frames = torch.full((1, 16, 2, canvas.height, canvas.width), 5.0)
        return Injection(prefix_frames=frames, time_add=torch.ones(1, 6, 128))


def test_conditions_reach_the_trunk_and_frames_in_front_stay_out_of_the_result(field):
    seen = []
    settings = Settings(2, 2, cfg=1, denoise=0.7)
    result = sample(
        field, text(0), None, encoded_video(), settings, [FramesInFront()], lambda *step: seen.append(step[2].shape)
    )
    call = field.trunk.calls[0]
    sigma = settings.levels()[0]
    assert call.injection.time_add.shape == (1, 6, 128)
    assert call.x.shape[2] == 4 and call.x[:, :, :2].mean().item() == pytest.approx((1 - sigma) * 5, abs=0.2)
    assert torch.equal(call.x[:, :, 2:], (1 - sigma) * ((encoded_video() - MEAN) / STD) + sigma * noise(2))
    assert result.shape == EMPTY.shape and seen == [EMPTY.shape] * 2


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"steps": 0}, "steps is 0, but sampling needs at least 1"),
        ({"cfg": math.inf}, "cfg is inf"),
        ({"shift": 0}, "shift is 0"),
        ({"scheduler": "ddim"}, "no scheduler 'ddim'. Choose one of euler, unipc"),
        ({"denoise": 0}, "denoise is 0"),
        ({"denoise": 1.1}, "denoise is 1.1"),
        ({"denoise_as": "A1111"}, "no denoise_as 'A1111'. Choose one of DiffSynth, ComfyUI"),
        ({"rounding": "fp8"}, "no rounding 'fp8'. Choose one of none, DiffSynth"),
    ],
)
def test_impossible_settings_are_sentences(change, sentence):
    with pytest.raises(InputError, match=sentence):
        Settings(**{"seed": 0, **change})


def test_impossible_inputs_are_sentences(field):
    settings, plain = Settings(0, 1), Settings(0, 1, cfg=1)
    with pytest.raises(InputError, match="cfg is 5.0, .*none is connected.*set cfg to 1"):
        sample(field, text(0), None, EMPTY, settings)
    with pytest.raises(ModelError, match=r"negative has the shape \(1, 77, 768\).*Wan's text encoder"):
        sample(field, text(0), torch.zeros(1, 77, 768), EMPTY, settings)
    with pytest.raises(InputError, match="positive holds 2 prompts for 1 videos"):
        sample(field, text(0, rows=2), None, EMPTY, plain)
    for shape in [(1, 4, 64, 64), (1, 48, 2, 4, 4), (1, 16, 2, 5, 4)]:
        with pytest.raises(InputError, match="The latent has the shape .*Empty Wan Latent"):
            sample(field, text(0), None, torch.zeros(shape), plain)
    with pytest.raises(InputError, match="cannot draw noise on rand_device 'no such thing'.*Choose 'cpu'"):
        sample(field, text(0), None, EMPTY, Settings(0, 1, cfg=1, rand_device="no such thing"))


@pytest.mark.parametrize("scheduler", SOLVERS)
def test_one_step_works(field, scheduler):
    assert sample(field, text(0), text(1), EMPTY, Settings(0, 1, scheduler=scheduler)).isfinite().all()


# ---- distilled models -------------------------------------------------------------------------------------------


def test_timesteps_are_the_levels_of_the_steps():
    settings = Settings(0, 3, timesteps=(1000.0, 757.0, 522.0), scheduler="lcm")
    assert settings.levels() == [1.0, 0.757, 0.522, 0.0]
    assert Settings(0, 1, timesteps=(1000.0,), scheduler="unipc").levels() == [0.999, 0.0]


@pytest.mark.parametrize("values, sentence", [
    ({"steps": 4, "timesteps": (1000.0, 757.0, 522.0)}, r"timesteps names 3 steps .1000, 757, 522., but steps is 4"),
    ({"steps": 2, "timesteps": (500.0, 600.0)}, "timesteps is 500, 600, but the numbers have to fall"),
    ({"steps": 1, "timesteps": (1001.0,)}, "from 1000 at most"),
    ({"steps": 2, "timesteps": (500.0, 0.0)}, "to above 0"),
    ({"steps": 1, "timesteps": (500.0,), "denoise": 0.5}, "timesteps says where to begin"),
])  # fmt: skip
def test_impossible_timesteps_are_sentences(values, sentence):
    with pytest.raises(InputError, match=sentence):
        Settings(0, **values)
