"""What rounding the weights costs: `python benchmarks/rounding.py [tiny] [1.3B] [14B]`.

Each way to keep the weights is loaded from one file as a user would load it, and its output compared with that of the
same weights in fp32, on the CPU. Writes results/rounding.json and .md; without names all three are measured.

    tiny   WanTiny as it was trained, its bundled file: the mean over three steps
    1.3B   one block at the published width, between true embeddings and head; 192 tokens, 64 of text
    14B    likewise

Published weights cannot be fetched here. The random ones are Student's t with 5 degrees of freedom, which has outliers
(of two million numbers the largest is some 25 times the standard deviation), of the deviation that Wan's linear layers
are said to have: 0.03 at 1.3B's width, 0.02 at 14B's. Biases are normal (0.05), norms 1 +- 0.2, modulations normal
(0.3).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from datetime import date
from pathlib import Path

import torch
from comfyui_wanflow.wan_core.loading.load import load_model
from comfyui_wanflow.wan_core.loading.rounding import rounding_errors
from comfyui_wanflow.wan_core.models import fp8
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.slots import Run
from comfyui_wanflow.wan_core.offload.quantize import STORAGE, narrowed, relative_error
from measure import HERE, git, processor
from safetensors.torch import save_file
from torch import Tensor

WIDTHS = {
    "1.3B": (DiTLayout(dim=1536, ffn_dim=8960, layers=1, heads=12), 0.03),
    "14B": (DiTLayout(dim=5120, ffn_dim=13824, layers=1, heads=40), 0.02),
}
CHOICES = ["bf16", "int8", *(name for name in STORAGE if name.startswith("fp8"))]
AGAINST = "fp8_e4m3fn_cast"
STEPS = {"tiny": (950.0, 600.0, 200.0), "1.3B": (600.0,), "14B": (600.0,)}


def like_wan(name: str, shape: torch.Size, deviation: float, generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return normal * 0.05
    if "norm" in name:
        return 1 + normal * 0.2
    if "modulation" in name:
        return normal * 0.3
    degrees = 5
    squares = sum(torch.randn(shape, generator=generator).square_() for _ in range(degrees))
    return normal.div_((squares / degrees).sqrt_()) * (deviation * ((degrees - 2) / degrees) ** 0.5)


def random_file(layout: DiTLayout, deviation: float, folder: str) -> Path:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiT(layout).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    path = Path(folder) / "model.safetensors"
    save_file({n: like_wan(n, shape, deviation, generator).bfloat16() for n, shape in shapes.items()}, path)
    return path


def outputs(source: str | Path, choice: str, name: str, dtype: torch.dtype = torch.float32, **options) -> tuple:
    """(the outputs of all steps in one tensor, the mean error of the rounded matrices)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 3, 16, 16, generator=generator)
    text = torch.randn(1, 64, 4096, generator=generator) * 0.2
    trunk = load_model(source, choice, device="cpu", **options).trunk
    with torch.inference_mode():
        found = [trunk(x, torch.tensor([step]), text, run=Run(dtype)).float() for step in STEPS[name]]
    errors = rounding_errors(trunk).values()
    return torch.stack(found), sum(errors) / len(errors) if errors else None


def measured(name: str, source: str | Path) -> list[dict]:
    exact, _ = outputs(source, "fp32", name)
    rows = []
    for choice in CHOICES:
        found, weights = outputs(source, choice, name)
        error = relative_error(found, exact)
        rows.append({"model": name, "weights": choice, "of matrices": weights, "of output": error})
        print(rows[-1], flush=True)
    if name != "14B":  # computed in bf16, which on this machine is slow
        found, _ = outputs(source, "bf16", name, torch.bfloat16)
        rows.append({"model": name, "weights": "bf16, computed in bf16", "of matrices": None,
                     "of output": relative_error(found, exact)})  # fmt: skip
        fp8.has_products = fp8.takes_row_scales = lambda *_: True  # the CPU's own product of 8-bit floats
        found, _ = outputs(source, "fp8_e4m3fn", name, torch.bfloat16, fp8_matmul=True)
        rows.append({"model": name, "weights": "fp8_e4m3fn with fp8_matmul", "of matrices": None,
                     "of output": relative_error(found, exact)})  # fmt: skip
    return rows


def other_ways() -> list[dict]:
    """What else might make e4m3fn better, on one matrix: the error of the weights alone."""
    generator = torch.Generator().manual_seed(0)
    weight = like_wan("weight", torch.Size((1536, 1536)), 0.03, generator)
    e4m3 = torch.float8_e4m3fn

    def error(scale: Tensor) -> float:
        return relative_error((weight / scale).to(e4m3).float() * scale, weight)

    row = weight.abs().amax(1, keepdim=True) / 448
    tried = torch.stack([(((weight / (row * f)).clamp(-448, 448).to(e4m3).float() * row * f) - weight).norm(dim=1)
                         for f in torch.logspace(-1, 0, 17, base=2)])  # fmt: skip
    best = row * torch.logspace(-1, 0, 17, base=2)[tried.argmin(0)][:, None]
    blocks = weight.reshape(-1, 32)
    block = blocks.abs().amax(1, keepdim=True) / 448
    parts = narrowed(weight, torch.int8, "block")
    integers = (parts["weight"].unflatten(1, (-1, 32)) * parts["scale"].float()[..., None]).flatten(1)
    byte = weight.abs().amax(1, keepdim=True) / 127
    ways = {
        "e4m3fn, cast as it is": relative_error(weight.to(e4m3).float(), weight),
        "e4m3fn, one scale": error(weight.abs().max() / 448),
        "e4m3fn, one a row": error(row),
        "e4m3fn, one a row, the best of 17 in an octave": error(best),
        "e4m3fn, one for 32 numbers": relative_error((blocks / block).to(e4m3).float() * block, blocks),
        "int8, one a row": relative_error((weight / byte).round() * byte, weight),
        "int8, one for 32 numbers": relative_error(integers, weight),
    }
    return [{"way": way, "of matrix": found} for way, found in ways.items()]


def markdown(facts: dict, rows: list[dict], ways: list[dict]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()) + ".", "",
             "| model | weights kept as | error of the matrices | error of the output | smaller than the plain cast |",
             "|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        cast = next(r["of output"] for r in rows if r["model"] == row["model"] and r["weights"] == AGAINST)
        matrices = "" if row["of matrices"] is None else f"{row['of matrices']:.2%}"
        ratio = f"{cast / row['of output']:.1f} times" if row["of output"] else ""  # the random files are in bf16
        lines.append(f"| {row['model']} | {row['weights']} | {matrices} | {row['of output']:.2%} | {ratio} |")
    sentence = "Errors are relative to the size (root of the sum of squares) of what is right."
    lines += ["", f"{sentence} Ways to round one random matrix of 1536 x 1536:", "",
              "| way | error of the matrix |", "|---|---|"]  # fmt: skip
    return "\n".join([*lines, *(f"| {row['way']} | {row['of matrix']:.2%} |" for row in ways)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*STEPS, []], help="which to measure; all if none is named")
    names = parser.parse_args().models or list(STEPS)
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows += measured(name, "WanTiny-T2V" if name == "tiny" else random_file(*WIDTHS[name], folder))
    facts = {"date": date.today().isoformat(), "commit": git("rev-parse", "--short", "HEAD"),
             "processor": processor(), "load average": " ".join(f"{load:.1f}" for load in os.getloadavg()),
             "torch": torch.__version__}  # fmt: skip
    ways = other_ways()
    results = HERE / "results"
    (results / "rounding.json").write_text(json.dumps({**facts, "rows": rows, "ways": ways}, indent=1) + "\n")
    (results / "rounding.md").write_text(markdown(facts, rows, ways))


if __name__ == "__main__":
    main()
