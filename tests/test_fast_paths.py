"""WANFLOW_PLAIN=1 computes everything in the most ordinary way, with the same results. See docs/fast_paths.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core import compute
from comfyui_wanflow.wan_core.models import blocks, vae_layers, winograd
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.slots import Run, Slots
from comfyui_wanflow.wan_core.models.trials import chosen
from comfyui_wanflow.wan_core.models.vae import VideoVAE

ROOT = Path(__file__).resolve().parents[1]
TABLE = (ROOT / "docs" / "fast_paths.md").read_text(encoding="utf-8")


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def without(monkeypatch):
    """From here on in the plain way, in which nothing of this may be called."""

    def forbidden(*arguments, **options):
        raise AssertionError("this is a fast path")

    monkeypatch.setattr(compute, "PLAIN", True)
    for module, name in [(winograd, "convolve_frames"), (vae_layers, "phase_weights"), (torch, "mkldnn_convolution")]:
        monkeypatch.setattr(module, name, forbidden)


def assert_equal(fast, plain, tolerance=1e-5):
    """Close, and not the same, so that something was another way indeed."""
    assert 0 < ((fast - plain).norm() / plain.norm()).item() <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("image", [False, True])
def test_the_transformer(monkeypatch, image):
    torch.manual_seed(0)
    in_dim = 36 if image else 16
    layout = DiTLayout(dim=256, ffn_dim=96, layers=2, heads=2, in_dim=in_dim, text_dim=8, image_tokens=image)
    model = DiT(layout)
    torch.nn.init.normal_(model.head.head.weight)
    size = (3, 6, 8)
    slots = Slots()
    if image:
        concat = {"mask": random(1, 4, *size), "image": random(1, 16, *size)}
        slots = Slots(concat=concat, context_prefix=random(1, 7, 256))
    given = random(1, 16, *size), torch.tensor([500.0]), random(1, 4, 8), slots, Run()
    monkeypatch.setattr(blocks, "PRODUCT_TOKENS", 10)
    fast = model(*given)
    without(monkeypatch)
    assert_equal(fast, model(*given))


@pytest.mark.parametrize("size", [(1, 32, 24), (9, 32, 24)], ids=["picture", "video"])
def test_the_vae(monkeypatch, size):
    torch.manual_seed(0)
    vae = VideoVAE(16).requires_grad_(False)
    pixels = random(1, 3, *size).clamp(-1, 1)
    latents = vae.encode(pixels)
    decoded = torch.cat(list(vae.decode_groups(latents)), dim=2)
    without(monkeypatch)
    assert_equal(latents, vae.encode(pixels))
    assert_equal(decoded, torch.cat(list(vae.decode_groups(latents)), dim=2))


@torch.no_grad()
def test_attention_is_torchs_own(monkeypatch):
    monkeypatch.setattr(compute, "PLAIN", True)
    assert chosen("auto", torch.device("cuda"), torch.bfloat16) == "sdpa"
    assert chosen("flash3", torch.device("cuda"), torch.bfloat16) == "sdpa"


@pytest.mark.parametrize("value, plain", [(None, False), ("0", False), ("", False), ("1", True)])
def test_the_environment_decides(value, plain, monkeypatch):
    monkeypatch.delenv("WANFLOW_PLAIN", raising=False)
    if value is not None:
        monkeypatch.setenv("WANFLOW_PLAIN", value)
    program = (
        "import runpy; runpy.run_path('tests/conftest.py'); from comfyui_wanflow.wan_core import compute; "
        "print(compute.PLAIN)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(plain)


def test_every_path_in_the_table_has_a_test_that_exists():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "`test_" in line]
    assert len(rows) >= 15
    for row in rows:
        file, name = re.search(r"`(test_\w+\.py)` `(test_\w+)`", row).groups()
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), row
