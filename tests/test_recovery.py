"""Memory runs out, injected in every phase: what can be given back is, and the work is done again, to equal results."""

import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from comfyui_wanflow.wan_core.adapters.injection import Condition, Injection
from comfyui_wanflow.wan_core.errors import MemoryShortage
from comfyui_wanflow.wan_core.lora import Lora
from comfyui_wanflow.wan_core.model import WanImageEncoder, WanModel, WanTextEncoder, WanVAE
from comfyui_wanflow.wan_core.models.changes import Decomposed, LowRank
from comfyui_wanflow.wan_core.models.compiled import Compile
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.image_encoder import ImageEncoder, ImageEncoderLayout
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.tiling import ladder
from comfyui_wanflow.wan_core.models.tokenizer import Tokens
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.offload import recovery
from comfyui_wanflow.wan_core.offload.recovery import is_shortage, persist
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.sampling import contexts
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from comfyui_wanflow.wan_core.sampling.teacache import TeaCache
from comfyui_wanflow.wan_core.sampling.windows import Windows

ELSEWHERE = torch.device("cpu:0")  # to torch another place than "cpu", with the numbers at hand
LAYOUT = DiTLayout(dim=128, ffn_dim=96, layers=4, heads=1, text_dim=8)


@contextmanager
def shortage(module, *calls, error=torch.OutOfMemoryError):
    """Inside the `with`, memory runs out in these calls of the module, the first of which is 0."""
    count = iter(range(10**6))

    def fail(*_):
        if next(count) in calls:
            raise error("CUDA out of memory. Tried to allocate 1.00 GiB.\nmore")

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def engine(kind, module, **fields):
    module.requires_grad_(False)
    place = {"device": ELSEWHERE, "compute_dtype": torch.float32, "residency": Residency(module)}
    return kind(module=module, name="small", **place, **fields)


@pytest.fixture
def model():
    torch.manual_seed(0)
    trunk = DiT(LAYOUT)
    torch.nn.init.normal_(trunk.head.head.weight, std=0.1)
    return replace(engine(WanModel, trunk, layout=LAYOUT), module=Network(trunk))


def run(model, conditions=(), say=None, on_step=None, **settings):
    torch.manual_seed(1)
    positive, negative = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    settings = Settings(7, **{"steps": 3, "scheduler": "unipc", **settings})
    return sample(model, positive, negative, torch.zeros(1, 16, 2, 4, 4), settings, conditions, on_step, say)


def assert_clean(module):
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not any(parameter.device == ELSEWHERE for parameter in module.parameters())


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("branch", range(2))
def test_a_step_is_repeated_with_fewer_weights(model, step, branch):
    expected, said, steps = run(model), [], []
    with shortage(model.trunk.blocks[2], *(2 * step + branch + n for n in (0, 1, 2))):
        result = run(model, say=said.append, on_step=lambda step, *_: steps.append(step))
    assert torch.equal(result, expected)
    assert steps == [0, 1, 2]
    assert len(said) == 3 and "Memory ran out." in said[0] and "done again" in said[0]
    assert 0 < model.resident_bytes() < model.total_bytes() / 2  # at first the kept context went, then halves
    assert_clean(model.trunk)


def test_changed_weights_leave_and_come_back_changed(model):
    torch.manual_seed(2)
    low = LowRank(torch.randn(96, 2), torch.randn(2, 128))
    turned = Decomposed(LowRank(torch.randn(128, 2), torch.randn(2, 128)), torch.rand(128))
    changes = {"blocks.1.ffn.0.weight": low, "blocks.2.self_attn.q.weight": turned}
    model = model.with_lora(Lora("two kinds", changes), 0.5)
    expected = run(model)
    with shortage(model.trunk.blocks[2], 1, 2, 3, 5):
        assert torch.equal(run(model), expected)
    assert model.resident_bytes() < model.total_bytes() / 4
    assert_clean(model.trunk)


def test_skipped_steps_are_repeated_too(model, monkeypatch):
    monkeypatch.setattr(TeaCache, "plan", lambda *_: [False, True, True, False])
    model = model.with_cache(TeaCache(threshold=0.3, coefficients="T2V-1.3B"))
    expected = run(model, steps=4)
    for call in range(1, 8):
        with shortage(model.trunk.head, call):
            assert torch.equal(run(model, steps=4), expected)


def test_nothing_left_to_give_is_a_sentence(model):
    with (
        shortage(model.trunk.blocks[2], *range(100)),
        pytest.raises(MemoryShortage, match=r"computing step 1 of 3.*Wan Sliding Window.*allocate 1.00 GiB.\)$"),
    ):
        run(model)
    assert model.resident_bytes() == 0
    assert_clean(model.trunk)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_other_errors_pass(model, error):
    def fail(*_):
        raise error("stop")

    hook = model.trunk.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        run(model)
    hook.remove()
    assert_clean(model.trunk)


def test_conditions_are_prepared_again(model):
    class Hungry(Condition):
        calls = 0

        def inject(self, network, canvas):
            type(self).calls += 1
            if self.calls == 1:
                raise torch.OutOfMemoryError("out of memory")
            return Injection()

    assert torch.equal(run(model, [Hungry()]), run(model))
    assert Hungry.calls == 2


def test_contexts_are_kept_where_there_is_memory(model, monkeypatch):
    calls = []
    model.trunk.blocks[0].cross_attn.k.register_forward_hook(lambda *_: calls.append(1))

    def count(free):
        calls.clear()
        monkeypatch.setattr(contexts, "device_memory", lambda _: free and (10**12, free))
        result = run(model, cfg=2.0)
        return len(calls), result

    model.ensure()
    once, expected = count(None)
    assert once == 2  # one a prompt
    times, result = count(1000)
    assert times == 6 and torch.equal(result, expected)
    assert count(10**12)[0] == 2
    assert contexts.Contexts(model.with_compile(Compile()), [torch.zeros(1, 5, 8)], lambda: 0).kept == [None]
    model.release(1)  # and only where all weights stay
    assert count(10**12)[0] == 6


@pytest.mark.parametrize("settings", [{}, {"cfg_merge": True}, {"cfg": 1.0}], ids=["cfg", "merged", "positive"])
@pytest.mark.parametrize("way", ["plain", "windows", "cache", "lora", "streamed"])
def test_what_is_kept_changes_no_number(model, monkeypatch, way, settings):
    if way == "windows":
        model = model.with_windows(Windows(1, 1))
    if way == "cache":
        monkeypatch.setattr(TeaCache, "plan", lambda *_: [False, True, False])
        model = model.with_cache(TeaCache(threshold=0.3, coefficients="T2V-1.3B"))
    if way == "lora":
        torch.manual_seed(2)
        changes = {"blocks.1.cross_attn.k.weight": LowRank(torch.randn(128, 2), torch.randn(2, 128))}
        model = model.with_lora(Lora("keys", changes))
    if way == "streamed":
        model.ensure(0)
    kept = run(model, **settings)
    monkeypatch.setattr(contexts, "device_memory", lambda _: (1, 0))  # there is no room to keep anything
    assert torch.equal(run(model, **settings), kept)


class Words:
    """Stands in for a tokenizer."""

    def __call__(self, texts):
        ids = torch.arange(len(texts) * 4).view(-1, 4)
        return Tokens(ids, torch.ones_like(ids), (4,) * len(texts), ("",) * len(texts), (0,) * len(texts))


def test_encoders_read_and_look_again():
    torch.manual_seed(0)
    reader = UMT5Encoder(UMT5Layout(dim=16, attention_dim=16, ffn_dim=32, heads=2, layers=3, vocabulary=20, buckets=4))
    encoder = engine(WanTextEncoder, reader, tokenizer=Words())
    looker = ImageEncoder(ImageEncoderLayout(dim=80, mlp_dim=32, heads=1, layers=3, patch=4, side=8))
    eye = engine(WanImageEncoder, looker)
    picture = torch.rand(1, 8, 8, 3)
    for fail_in, work, kind in (
        (reader.blocks[1], lambda: encoder.encode(["a", "b"])[0], encoder),
        (looker.visual.transformer[1], lambda: eye.encode(picture), eye),
    ):
        expected = work()
        assert kind.resident_bytes() == kind.total_bytes()
        with shortage(fail_in, 0, 2):
            assert torch.equal(work(), expected)
        assert kind.resident_bytes() < kind.total_bytes()
        assert_clean(kind.module)
        with shortage(fail_in, *range(100)), pytest.raises(MemoryShortage, match="weight_dtype"):
            work()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return engine(WanVAE, VideoVAE(8))


class TestTiles:
    LATENTS = torch.randn(1, 16, 3, 10, 12, generator=torch.Generator().manual_seed(0))

    def test_ladder(self):
        steps = [(step.tiled, step.tile_size, step.tile_stride) for step in ladder((60, 104)).steps]
        assert steps == [
            (False, (30, 52), (15, 26)), (True, (30, 52), (15, 26)), (True, (15, 26), (7, 13)), (True, (8, 13), (3, 6)),
            (True, (8, 8), (3, 3)),
        ]  # fmt: skip
        assert [step.tiled for step in ladder((8, 8)).steps] == [False]
        assert [step.tile_size for step in ladder((20, 20), tiled=True).steps] == [(30, 52), (15, 26), (8, 13), (8, 8)]

    FIRST = {"tile_size": (9, 8), "tile_stride": (6, 6)}

    @pytest.mark.parametrize("failures, tile, stride", [(1, (9, 8), (6, 6)), (2, (8, 8), (5, 6))])
    def test_decoding_and_encoding_take_smaller_tiles(self, vae, failures, tile, stride):
        tiles = {"tiled": True, "tile_size": tile, "tile_stride": stride}
        with shortage(vae.module.decoder, *range(failures)):
            decoded = vae.decode(self.LATENTS, **self.FIRST)
        assert torch.equal(decoded, vae.decode(self.LATENTS, **tiles))
        with shortage(vae.module.encoder, *range(failures)):
            encoded = vae.encode(decoded, **self.FIRST)
        assert torch.equal(encoded, vae.encode(decoded, **tiles))

    def test_the_smallest_tiles_are_the_end(self, vae):
        for work, module in ((vae.decode, vae.module.decoder), (lambda x: list(vae.frames(x)), vae.module.decoder)):
            with shortage(module, *range(100)), pytest.raises(MemoryShortage, match="decoding a video"):
                work(self.LATENTS)

    def test_a_picture_that_would_not_fit_is_tiled_at_once(self, vae, monkeypatch):
        from comfyui_wanflow.wan_core import model, room

        need = room.decoding_room(8, (8 * 9, 8 * 8), torch.float32)
        monkeypatch.setattr(model, "free_memory", lambda _: need)
        assert torch.equal(vae.decode(self.LATENTS, **self.FIRST), vae.module.decode(self.LATENTS, True, **self.FIRST))
        monkeypatch.setattr(model, "free_memory", lambda _: 10**12)
        assert torch.equal(vae.decode(self.LATENTS, **self.FIRST), vae.module.decode(self.LATENTS))

    def test_frames_go_on_where_they_were(self, vae):
        """One group after the other; from a failure on in tiles, which differ a little at their edges."""
        whole = vae.decode(self.LATENTS)
        tiled = vae.decode(self.LATENTS, tiled=True, **self.FIRST)
        groups = list(vae.frames(torch.cat([self.LATENTS] * 2)))
        assert len(groups) == 2 * 2 and torch.equal(torch.cat(groups, dim=2), torch.cat([whole] * 2, dim=2))
        for call, before in [(0, 0), (1, 1)]:
            with shortage(vae.module.decoder, call):
                frames = torch.cat(list(vae.frames(self.LATENTS, **self.FIRST)), dim=2)
            assert torch.equal(frames, torch.cat([whole[:, :, :before], tiled[:, :, before:]], dim=2))


class TestPersist:
    def test_what_failed_is_gone_before_memory_is_looked_for(self):
        held, relieved = [], []

        def work():
            big = torch.zeros(10)
            held.append(weakref.ref(big))
            if len(held) < 3:
                raise torch.OutOfMemoryError("out of memory")
            return "done"

        def relieve():
            relieved.append(held[-1]() is None)
            return True

        assert persist(work, relieve, "", "") == "done" and relieved == [True, True]

    def test_others_give_first(self, model, monkeypatch):
        asked = []
        monkeypatch.setattr(recovery, "OTHERS", [lambda weights: asked.append(weights) or len(asked) == 1])
        model.ensure()
        assert model.relieve() and model.resident_bytes() == model.total_bytes()
        assert model.relieve() and model.resident_bytes() <= model.total_bytes() / 2
        assert asked == [model.weights] * 2

    @pytest.mark.parametrize(
        "error, expected",
        [
            (torch.OutOfMemoryError("x"), True),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
            (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
            (ValueError("out of memory"), False),
        ],
    )
    def test_signs(self, error, expected):
        assert is_shortage(error) is expected
