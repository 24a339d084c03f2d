"""Attention kernels: which one serves a run, tried on a CPU that passes for a card, with kernels made up here."""

import json
import time

import pytest
import torch
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.models import attention as kernels
from comfyui_wanflow.wan_core.models import trials
from comfyui_wanflow.wan_core.models.attention import SOURCES, attention, check_backend, sdpa
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.slots import Run

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def off_by(part):
    """A kernel that answers wrongly by this part of its size."""
    return lambda q, k, v: sdpa(q, k, v) * (1 + part)


def broken(q, k, v):
    raise ValueError("no such card\nat all")


def forget():
    for remembered in (kernels.kernel, kernels.say_refused, trials.is_right, trials.fastest):
        remembered.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """install(name=kernel, ...): these are installed, no others."""

    def install(**installed):
        for name, source in SOURCES.items():
            load = (lambda found: lambda: found)(installed[name]) if name in installed else missing
            monkeypatch.setitem(SOURCES, name, source._replace(load=load))
        forget()

    def missing():
        raise ImportError

    install()
    yield install
    forget()


@pytest.fixture
def card(install, monkeypatch, tmp_path):
    """As `install`, on a CPU that passes for a card on which torch's own choice is slow."""

    def slow(q, k, v, bias=None):
        time.sleep(0.005)
        return sdpa(q, k, v, bias)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "sdpa", slow)
    monkeypatch.setattr(trials, "has_kernels", lambda device, dtype: True)
    for name, value in {"TOKENS": 150, "HEADS": 2, "HEAD_DIM": 16}.items():
        monkeypatch.setattr(trials, name, value)
    return install


# ---- the formula ------------------------------------------------------------------------------------------------


def test_attention_is_the_formula():
    q, k, v = random(2, 5, 3, 16), random(2, 7, 3, 16), random(2, 7, 3, 16)
    bias = random(7)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 4 + bias
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    torch.testing.assert_close(attention(q, k, v, bias), expected)


def test_the_sample_tells_right_from_wrong(card):
    data = trials.sample(CPU, BF16)
    assert all(torch.equal(a, b) for a, b in zip(data, trials.sample(CPU, BF16), strict=True))
    assert trials.error(sdpa, *data) < trials.EXACT / 2
    assert trials.error(off_by(0.04), *data) == pytest.approx(0.04, abs=0.005)
    for useless in (broken, lambda q, k, v: q * float("nan"), lambda q, k, v: q[:, :5]):
        assert trials.error(useless, *data) == trials.FAILED


# ---- auto -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_auto_is_the_fastest_that_is_right_and_remembers(card, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")

    def slower(q, k, v):
        time.sleep(0.002)
        return sdpa(q, k, v)

    card(cudnn=broken, flash3=slower, flash2=sdpa, sage=off_by(0.05))
    assert trials.chosen("auto", CPU, BF16) == "flash2"
    assert caplog.records[-1].getMessage().startswith("Attention by flash2: of those tried here, sdpa ")
    times = json.loads((tmp_path / "wanflow" / "attention.json").read_text())
    names = {key.split(", ")[-1].split()[0]: value for key, value in times.items()}
    assert names["flash2"] < names["flash3"] < names["sdpa"] < names["cudnn"] == trials.FAILED
    assert "sage" not in names  # it computes in 8 bits: only by its name

    tried = []
    monkeypatch.setattr(trials, "times", lambda names, *_: tried.append(names) or dict.fromkeys(names, 1.0))
    forget()
    assert trials.chosen("auto", CPU, BF16) == "flash2" and not tried
    monkeypatch.setattr(trials, "version", lambda name: "another")
    forget()
    assert trials.chosen("auto", CPU, BF16) == "sdpa" and tried == [["sdpa", "cudnn", "flash3", "flash2"]]


@torch.no_grad()
def test_auto_takes_no_kernel_that_is_wrong_or_hardly_faster(card, monkeypatch):
    card(flash2=off_by(0.02), flash3=lambda q, k, v: q * float("nan"))
    assert trials.chosen("auto", CPU, BF16) == "sdpa"
    card(cudnn=sdpa)
    monkeypatch.setattr(trials, "milliseconds", lambda *_: {"sdpa": 1.04, "cudnn": 1.0})
    assert trials.chosen("auto", CPU, BF16) == "sdpa"


def test_auto_is_torchs_own_with_gradients_and_where_there_are_no_others(card, monkeypatch):
    card(flash2=sdpa)
    assert trials.chosen("auto", CPU, BF16) == "sdpa"  # trials know nothing of the way back
    with torch.no_grad():
        assert trials.chosen("auto", CPU, BF16) == "flash2"
        monkeypatch.undo()
        assert trials.chosen("auto", CPU, BF16) == "sdpa"


# ---- by name ----------------------------------------------------------------------------------------------------


def test_a_named_kernel_is_taken_if_it_is_as_right_as_it_should_be(card, caplog):
    card(flash2=off_by(0.05), sage=off_by(0.05), flash3=broken)
    assert [trials.chosen(name, CPU, BF16) for name in ("sage", "flash2", "flash2", "flash3")] == [
        "sage", "sdpa", "sdpa", "sdpa"
    ]  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [
        "The attention backend 'flash2' is 5% off the formula here: 'sdpa' is used instead.",
        "The attention backend 'flash3' does not work here: 'sdpa' is used instead.",
    ]
    card(sage=off_by(0.2))
    assert trials.chosen("sage", CPU, BF16) == "sdpa"


def test_a_kernel_that_does_not_know_the_type_is_replaced_and_said_once(install, caplog):
    install(sage=broken)
    assert [trials.chosen("sage", CPU, FP32) for _ in range(2)] == ["sdpa", "sdpa"]
    assert [record.getMessage() for record in caplog.records] == [
        "The attention backend 'sage' does not know float32 on cpu: 'sdpa' is used instead."
    ]


def test_a_call_that_a_kernel_refuses_is_made_without_it(install, caplog):
    q = random(1, 5, 2, 16)
    install(flash2=broken)
    for _ in range(2):
        assert torch.equal(attention(q, q, q, backend="flash2"), sdpa(q, q, q))
    assert [record.getMessage() for record in caplog.records] == [
        "The attention backend 'flash2' refused a call (no such card): 'sdpa' is used instead."
    ]

    def full(q, k, v):
        raise torch.OutOfMemoryError("CUDA out of memory")

    install(flash2=full)
    with pytest.raises(torch.OutOfMemoryError):  # who runs the model knows what to do about that
        attention(q, q, q, backend="flash2")


def test_a_bias_is_torchs_own(install):
    q, bias = random(1, 5, 2, 16), random(5)
    install(flash2=broken)
    assert torch.equal(attention(q, q, q, bias, "flash2"), attention(q, q, q, bias))


def test_backends_that_cannot_be_used_are_named(install):
    assert check_backend("auto") == "auto"
    with pytest.raises(InputError, match="no attention backend 'flash9'.*sdpa, cudnn"):
        check_backend("flash9")
    with pytest.raises(InputError, match="'sage' is not installed. Install sageattention, or choose 'auto'"):
        check_backend("sage")


# ---- in a model -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_attends_by_the_chosen_kernel(card):
    calls = []
    card(flash2=lambda q, k, v: calls.append(q.shape) or sdpa(q, k, v))
    torch.manual_seed(0)
    model = DiT(DiTLayout(dim=256, ffn_dim=32, layers=2, heads=2, text_dim=8))
    torch.nn.init.normal_(model.head.head.weight)
    given = random(1, 16, 2, 4, 4), torch.tensor([500.0]), random(1, 4, 8)
    expected = model(*given, run=Run(attention="sdpa"))
    assert not calls
    for backend in ("auto", "flash2"):
        calls.clear()
        assert torch.equal(model(*given, run=Run(attention=backend)), expected)
        assert calls[-2:] == [(1, 8, 2, 128)] * 2  # the text has a bias on a CPU


@torch.no_grad()
def test_a_kernel_is_one_operation_for_the_compiler(install):
    """Without a break at code that it cannot read, and without compiling that code."""

    def unreadable(q, k, v):
        assert not torch.compiler.is_compiling()
        torch._dynamo.graph_break()
        return sdpa(q, k, v)

    install(flash2=unreadable)
    once = torch.compile(lambda q: attention(q * 2, q, q, None, "flash2") + 1, backend="aot_eager", fullgraph=True)
    for tokens in (5, 9):
        q = random(1, tokens, 2, 16)
        torch.testing.assert_close(once(q), sdpa(q * 2, q, q) + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", ["sdpa", *SOURCES])
@pytest.mark.parametrize("dtype", trials.DTYPES)
def test_on_a_card(name, dtype):
    if kernels.kernel(name) is None:
        pytest.skip(f"{name} is not installed")
    tolerance = SOURCES[name].tolerance if name in SOURCES else trials.EXACT
    assert trials.error(kernels.kernel(name), *trials.sample(torch.device("cuda"), dtype)) <= tolerance
