"""Doing less: TeaCache against recorded skip patterns, windows against their definition, compiled against plain."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.nodes.speed_up import CacheSteps, CompileModel, SlideWindow
from comfyui_wanflow.wan_core.adapters.injection import Condition, Injection
from comfyui_wanflow.wan_core.adapters.vace import VACECondition
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.loading.catalog import Preset
from comfyui_wanflow.wan_core.loading.lora_files import load_lora
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.compiled import Compile
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.models.vae import unnormalised
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.sampling import loop
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample, working_room
from comfyui_wanflow.wan_core.sampling.reuse import Residuals
from comfyui_wanflow.wan_core.sampling.teacache import COEFFICIENTS, TeaCache
from comfyui_wanflow.wan_core.sampling.windows import Sliding, Windows
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "data" / "golden"
RECORDED = json.loads((GOLDEN / "teacache_skip.json").read_text())  # 1: the step was skipped
LAYOUT = DiTLayout(dim=128, ffn_dim=64, layers=2, heads=1, in_dim=48, text_dim=8)
LATENT = torch.zeros(1, 16, 5, 4, 4)
EAGER = Compile(dynamic=False, backend="eager")
EAGERLY = TeaCache(threshold=0.3, method="DiffSynth")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    trunk = DiT(LAYOUT)
    network = Network(trunk, VACE(VACELayout(dim=128, ffn_dim=64, layers=1, heads=1)))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, parameter.shape[-1] ** -0.5)
    return WanModel(
        module=network, name="small", device=torch.device("cpu"), compute_dtype=torch.float32,
        residency=Residency(trunk), beside={"vace": Residency(network.vace)}, layout=LAYOUT,
    )  # fmt: skip


class Everything(Condition):
    """A control video, a camera, a motion speed, and VACE with a reference picture."""

    def inject(self, network, canvas):
        size = (canvas.frames, canvas.height, canvas.width)
        vace = VACECondition(
            kept=random(1, 16, *size, seed=1), changed=random(1, 16, *size, seed=2), mask=torch.ones(1, 64, *size),
            references=random(1, 16, 1, *size[1:], seed=3),
        )  # fmt: skip
        rest = Injection(
            concat={"control": random(1, 16, *size, seed=4)},
            embed_add=random(1, 128, canvas.frames, canvas.height // 2, canvas.width // 2, seed=5),
            time_add=random(1, 6, 128, seed=6),
        )
        return rest + vace.inject(network, canvas)


def run(model, latent=LATENT, say=None, **settings):
    positive, negative = random(1, 4, 8, seed=7), random(1, 6, 8, seed=8)
    settings = Settings(**{"seed": 1, "steps": 8, "cfg": 3.0, **settings})
    return sample(model, positive, negative, latent, settings, [Everything()], say=say)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


class Calls:
    """Counts the calls of a module inside the `with`."""

    def __init__(self, module):
        self.module, self.count = module, 0

    def __enter__(self):
        self.hook = self.module.register_forward_hook(lambda *_: setattr(self, "count", self.count + 1))
        return self

    def __exit__(self, *_):
        self.hook.remove()


# ---- TeaCache: which steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RECORDED)
def test_skips_the_steps_that_the_reference_skips(case):
    name, threshold = case.split("@")
    cache = TeaCache(float(threshold), "DiffSynth", name.removeprefix("Wan2.1-"))
    skipped = cache.skipped(load_file(GOLDEN / "teacache_tmod.safetensors")["t_mod"])
    assert "".join(str(int(skip)) for skip in skipped) == RECORDED[case]


def authors_pattern(signals, polynomial, threshold, first, last):
    """The authors' loop, in doubles."""
    total, previous, skipped = 0.0, None, []
    for i, signal in enumerate(signals.double()):
        compute = i < first or i >= len(signals) - last
        if not compute:
            x = ((signal - previous).abs().mean() / previous.abs().mean()).item()
            total += sum(factor * x**power for power, factor in enumerate(reversed(polynomial)))
            compute = total >= threshold
        total = 0.0 if compute else total
        previous = signal
        skipped.append(not compute)
    return skipped


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_authors_two_ways(name):
    signals = load_file(GOLDEN / "teacache_tmod.safetensors")["t_mod"]
    projected, embedded = COEFFICIENTS[name]
    warm_up = TeaCache(0.2, "warm-up", name).skipped(signals)
    assert warm_up == authors_pattern(signals, projected, 0.2, first=5, last=0)
    assert not any(warm_up[:5])
    whole = TeaCache(0.2, "whole run", name).skipped(signals)
    assert whole == authors_pattern(signals, embedded, 0.2, first=1, last=1)
    assert not whole[0] and not whole[-1]
    if name == "T2V-1.3B":
        assert any(warm_up) and any(whole) and warm_up != whole


def test_measures_what_the_method_says(model):
    timesteps = torch.linspace(1000, 100, 12)
    with torch.no_grad():
        time, modulation = model.trunk.embed_time(timesteps)
        speed = random(1, 6, 128, seed=6)
        for method, signals in [("warm-up", modulation + speed), ("whole run", time)]:
            cache = TeaCache(0.3, method, "T2V-14B")
            assert cache.plan(model.trunk, timesteps, speed) == cache.skipped(signals)


def test_skips_only_in_its_part_of_the_run():
    signals = load_file(GOLDEN / "teacache_tmod.safetensors")["t_mod"]
    skipped = TeaCache(0.3, "DiffSynth", "T2V-1.3B", start=0.25, end=0.5).skipped(signals)
    assert any(skipped) and not any(skipped[:5]) and not any(skipped[10:])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_short_runs_are_computed_whole(steps):
    signals = load_file(GOLDEN / "teacache_tmod.safetensors")["t_mod"][:steps]
    assert TeaCache(9.0, "warm-up", "T2V-1.3B").skipped(signals) == [False] * steps


def test_auto_takes_the_nearest_models_numbers(model):
    wide = replace(LAYOUT, dim=5120, heads=40)
    image = replace(wide, image_tokens=True)
    found = [TeaCache(0.1).chosen_for(*case).coefficients for case in
             [(LAYOUT, 832), (wide, 1280), (image, 832), (image, 1280)]]  # fmt: skip
    assert found == list(COEFFICIENTS)
    assert model.with_cache(TeaCache(0.1)).cache.coefficients == "T2V-1.3B"
    assert model.with_cache(TeaCache(0.1, coefficients="T2V-14B")).cache.coefficients == "T2V-14B"
    hd = replace(model, layout=image, preset=Preset(width=1280))
    assert hd.with_cache(TeaCache(0.1)).cache.coefficients == "I2V-14B-720P"
    assert model.cache is None


# ---- TeaCache: what a skipped step does -------------------------------------------------------------------------


def test_a_skipped_step_adds_what_the_blocks_added_before(model):
    cached = model.with_cache(EAGERLY)
    heard = []
    with Calls(model.trunk.blocks[1]) as blocks, Calls(model.module.vace.vace_blocks[0]) as vace:
        run(cached, cfg=1.0, say=heard.append)
    skipped = 8 - blocks.count
    assert 0 < skipped < 7 and vace.count == blocks.count
    assert heard == [f"TeaCache (DiffSynth, T2V-1.3B): skipped {skipped} of 8 steps."]


def test_the_residual_is_that_of_the_last_computed_step(model, monkeypatch):
    monkeypatch.setattr(TeaCache, "plan", lambda *_: [False, True, True, False, True, False])
    seen, body = [], Residuals.body

    def watched(self, step, key):
        def see(advance, x):
            before = x.clone()  # the blocks write over it
            result = body(self, step, key)(advance, x)
            seen.append((before, result.clone()))
            return result

        return see

    monkeypatch.setattr(Residuals, "body", watched)
    with Calls(model.trunk.blocks[0]) as calls:
        run(model.with_cache(EAGERLY), cfg=1.0, steps=6)
    assert calls.count == 3
    for step, source in [(1, 0), (2, 0), (4, 3)]:
        (before, after), (x, y) = seen[source], seen[step]
        assert torch.equal(y, x + (after - before)) and not torch.equal(x, before)


@pytest.mark.parametrize("windows", [None, Windows(3, 2)])
def test_merged_guidance_gives_equal_numbers(model, windows):
    cached = model.with_cache(EAGERLY).with_windows(windows)
    apart = run(cached)
    assert relative_error(run(cached, cfg_merge=True), apart) <= 1e-5
    assert relative_error(run(model.with_windows(windows)), apart) > 1e-4  # something was skipped


def test_each_row_of_a_batch_has_its_own(model, monkeypatch):
    cached, noise = model.with_cache(EAGERLY), random(2, 16, 6, 4, 4, seed=9)  # one frame of it for the reference

    def run_with(noise):
        monkeypatch.setattr(loop, "draw_noise", lambda *_: noise)
        return run(cached, LATENT.expand(len(noise), -1, -1, -1, -1))

    alone = [run_with(row) for row in noise.split(1)]
    assert relative_error(run_with(noise), torch.cat(alone)) <= 1e-5 < relative_error(*alone)


def test_windows_skip_the_same_steps(model):
    cached = model.with_cache(EAGERLY)
    with Calls(model.trunk.blocks[0]) as whole:
        run(cached)
    with Calls(model.trunk.blocks[0]) as calls:
        run(cached.with_windows(Windows(3, 2)))
    assert calls.count == 2 * whole.count < 2 * 2 * 8


def test_what_is_kept_may_lie_elsewhere(model):
    assert torch.equal(run(model.with_cache(EAGERLY)), run(model.with_cache(replace(EAGERLY, device="cpu"))))


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"threshold": 0}, "threshold is 0"),
        ({"threshold": 0.1, "method": "fast"}, "no preset 'fast'. Choose one of warm-up"),
        ({"threshold": 0.1, "coefficients": "5B"}, "no coefficients '5B'"),
        ({"threshold": 0.1, "start": 0.5, "end": 0.5}, "start has to be before end"),
    ],
)
def test_impossible_caches_are_sentences(values, sentence):
    with pytest.raises(InputError, match=sentence):
        TeaCache(**values)


# ---- windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, stride, frames, spans",
    [
        (4, 4, 4, [(0, 4)]),
        (9, 3, 5, [(0, 5)]),
        (4, 2, 8, [(0, 4), (2, 6), (4, 8)]),
        (4, 3, 9, [(0, 4), (3, 7), (6, 9)]),
        (3, 3, 7, [(0, 3), (3, 6), (6, 7)]),
        (1, 1, 2, [(0, 1), (1, 2)]),
    ],
)
def test_windows_cover_everything(size, stride, frames, spans):
    assert Windows(size, stride).spans(frames) == spans


def test_ramps_are_straight_lines_as_wide_as_the_overlap():
    windows = Windows(6, 4)
    assert windows.weights(0, 6, 20).tolist() == [1, 1, 1, 1, 0.75, 0.25]
    assert windows.weights(4, 10, 20).tolist() == [0.25, 0.75, 1, 1, 0.75, 0.25]
    assert windows.weights(16, 20, 20).tolist() == [0.25, 0.75, 1, 1]
    assert Windows(5, 5).weights(5, 10, 20).tolist() == [1] * 5
    assert Windows(4, 1).weights(1, 5, 9).tolist() == pytest.approx([1 / 6, 0.5, 0.5, 1 / 6])


def test_the_model_sees_each_window_with_its_conditions(model):
    """Against windows cut by hand from everything there is, and blended by hand."""
    prefix, seen = 1, []
    whole = DiT.forward

    class Spy(DiT):
        def forward(self, x, timestep, text, injection=None, run=None):
            answer = whole(self, x, timestep, text, injection, run)
            seen.append((x, injection, answer))
            return answer

    model.trunk.__class__ = Spy
    try:
        result = run(model.with_windows(Windows(3, 2)), cfg=1.0, steps=1)
    finally:
        model.trunk.__class__ = DiT
    assert result.shape == LATENT.shape and len(seen) == 2
    noise = torch.randn(LATENT.shape, generator=torch.Generator().manual_seed(1))
    for (x, injection, _), (start, stop) in zip(seen, [(0, 3), (2, 5)], strict=True):
        assert torch.equal(x[:, :, prefix:], noise[:, :, start:stop])
        control = random(1, 16, 5, 4, 4, seed=4)
        assert torch.equal(injection.concat["control"][:, :, prefix:], control[:, :, start:stop])
        assert not injection.concat["image"].any() and injection.concat["image"].shape[2] == prefix + 3
        camera = random(1, 128, 5, 2, 2, seed=5)
        assert torch.equal(injection.embed_add[:, :, prefix:], camera[:, :, start:stop])
        kept = random(1, 16, 5, 4, 4, seed=1)
        assert torch.equal(injection.block_residuals[0].context[:, :16, prefix:], kept[:, :, start:stop])
    first, second = (answer[:, :, prefix:] for *_, answer in seen)
    blended = torch.cat([first[:, :, :2], (first[:, :, 2:] + second[:, :, :1]) / 2, second[:, :, 1:]], dim=2)
    assert relative_error(result, unnormalised(noise - blended)) < 1e-6


def test_the_prefix_is_averaged():
    injection = Injection(prefix_frames=torch.zeros(1, 16, 2, 4, 4))
    sliding = Sliding(Windows(3, 2), injection, frames=5)
    x = random(1, 16, 7, 4, 4)
    blended = sliding(lambda x, injection, number: x * (number + 1), x)
    torch.testing.assert_close(blended[:, :, :2], x[:, :, :2] * 1.5)
    torch.testing.assert_close(blended[:, :, 2:], x[:, :, 2:] * torch.tensor([1, 1, 1.5, 2, 2]).view(-1, 1, 1))


def test_one_window_is_the_whole(model):
    assert torch.equal(run(model.with_windows(Windows(5, 2)), steps=2), run(model, steps=2))


@pytest.mark.parametrize("size, stride", [(4, 0), (4, 5), (0, 0)])
def test_impossible_windows_are_sentences(size, stride):
    with pytest.raises(InputError, match="stride has to be between 1 and the size"):
        Windows(size, stride)


# ---- torch.compile ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_block():
    torch.manual_seed(0)
    trunk = DiT(replace(LAYOUT, layers=1, in_dim=16))
    torch.nn.init.normal_(trunk.head.head.weight, std=0.1)
    return WanModel(
        module=Network(trunk), name="small", device=torch.device("cpu"), compute_dtype=torch.float32,
        residency=Residency(trunk), layout=trunk.layout,
    )  # fmt: skip


@torch.inference_mode()  # as in ComfyUI
def answer(model):
    with model.attached() as network, model.attached():
        return network(random(1, 16, 2, 4, 4), torch.tensor([500.0]), random(1, 4, 8))


def test_compiled_is_plain_with_and_without_a_lora(one_block, tmp_path):
    up, down = random(128, 4, seed=1), random(4, 128, seed=2) / 4
    name = "diffusion_model.blocks.0.self_attn.v"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    changed = one_block.with_lora(load_lora(tmp_path / "lora.safetensors"))
    assert relative_error(answer(changed), answer(one_block)) > 1e-3
    for plain in (one_block, changed, one_block):  # what was compiled before must not be used for the other
        assert relative_error(answer(plain.with_compile(EAGER)), answer(plain)) <= 1e-5


def test_compiled_for_a_run_only(model):
    with model.with_compile(EAGER).attached() as network:
        compiled = [module for module in network.modules() if "forward" in vars(module)]
    assert compiled == [*network.trunk.blocks, *network.vace.vace_blocks]
    assert not any("forward" in vars(module) for module in network.modules())


def test_a_compiler_that_fails_is_a_sentence(one_block):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    with pytest.raises(InputError, match="torch.compile failed on this computer .*Remove Wan Torch Compile"):
        answer(one_block.with_compile(Compile(backend=broken, dynamic=False)))
    with pytest.raises(InputError, match="no compile mode 'fastest'"):
        Compile("fastest")


# ---- all together -----------------------------------------------------------------------------------------------


def test_room_for_a_run(model):
    latent, settings = (1, 16, 21, 60, 104), Settings(0)
    plain = working_room(model, latent, settings)
    kept = 2 * 21 * 30 * 52 * 128 * 4
    assert working_room(model.with_cache(EAGERLY), latent, settings) == plain + kept
    assert working_room(model.with_cache(EAGERLY), latent, Settings(0, cfg=1)) == plain + kept // 2
    assert working_room(model.with_cache(replace(EAGERLY, device="cpu")), latent, settings) == plain
    assert working_room(model.with_windows(Windows(7, 7)), latent, settings) < plain  # the latents are held as a whole
    assert plain < working_room(model, latent, Settings(0, cfg_merge=True)) < 2 * plain


def test_nodes_make_new_handles(model):
    (cached,) = CacheSteps.execute(model, 0.2, "DiffSynth", "T2V-14B", 0.1, 0.9, "cpu").args
    assert cached.cache == TeaCache(0.2, "DiffSynth", "T2V-14B", 0.1, 0.9, "cpu")
    (windowed,) = SlideWindow.execute(cached, 21, 11).args
    (compiled,) = CompileModel.execute(windowed, "default", False).args
    assert compiled.windows == Windows(21, 11, "DiffSynth", "overlap-linear", False)
    assert compiled.compile == Compile("default", False)
    assert compiled.cache is cached.cache and compiled.module is model.module
    assert model.cache is model.windows is model.compile is None
