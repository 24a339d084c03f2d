"""The memory that phases really take against what the planner says of them.

`python benchmarks/memory.py [--only WORD] [--folder FOLDER]` runs every case in a fresh process on the CPU, at true
widths with random weights, and compares the peak of its resident memory with the plan. Writes results/memory.md and
memory.json. `--device cuda` does so on a graphics card, whole models at 480p and 720p under limits from 8 to 80 GB
(held by a cap on torch's allocator), and writes results/memory_cuda.*: it needs 64 GB of disk and of main memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from comfyui_wanflow.nodes.host.standalone import StandaloneHost
from comfyui_wanflow.wan_core.adapters.image import ImageCondition
from comfyui_wanflow.wan_core.adapters.reference import ReferenceCondition
from comfyui_wanflow.wan_core.adapters.vace import VACECondition
from comfyui_wanflow.wan_core.compute import OVERRIDE
from comfyui_wanflow.wan_core.loading.load import load_image_encoder, load_model, load_text_encoder, load_vae
from comfyui_wanflow.wan_core.loading.outline import TRUNKS
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.image_encoder import ImageEncoder, ImageEncoderLayout
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.offload.options import Offload
from comfyui_wanflow.wan_core.planning.forecast import outlook
from comfyui_wanflow.wan_core.planning.here import this_machine
from comfyui_wanflow.wan_core.planning.machines import GIB
from comfyui_wanflow.wan_core.planning.phases import (
    Phase,
    decoding_phase,
    encoding_phase,
    free_for,
    image_phase,
    sampling_phase,
    text_phase,
)
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from comfyui_wanflow.wan_core.sampling.teacache import TeaCache
from comfyui_wanflow.wan_core.sampling.windows import Windows
from comfyui_wanflow.wan_core.size import latent_shape
from measure import HERE, git, memory_mb, processor
from random_weights import on_meta, write_random

BF16, FP32 = torch.bfloat16, torch.float32
PROMPT = "a red fox runs over a field of snow while the sun rises behind a row of tall dark trees, seen from afar. "
LIMITS = (8, 12, 16, 24, 48, 80)


@dataclass(frozen=True)
class Case:
    """kind: sampling, text, image, decoding or encoding; size: width, height, frames; limit: GB of the card."""

    kind: str
    size: tuple[int, int, int] = (0, 0, 0)
    model: str = "1.3B"
    layers: int | None = None  # None: all
    dtype: torch.dtype = BF16
    compute: str = "float32"
    beside: str = ""  # i2v, reference, vace, merged, teacache, windows, tiled
    limit: int = 0

    @property
    def name(self) -> str:
        width, height, frames = self.size
        parts = [self.kind]
        if self.kind in ("sampling", "text", "image"):
            parts += [self.model] if self.kind == "sampling" else []
            parts += [f"{self.layers} layers"] if self.layers else []
            parts += [f"{str(self.dtype).removeprefix('torch.')} in {self.compute}"]
        parts += [f"{width}x{height}x{frames}"] if width else []
        return " ".join([*parts, *filter(None, [self.beside]), *([f"in {self.limit} GB"] if self.limit else [])])


CPU = (
    Case("text", layers=2),
    Case("text", layers=4),
    Case("text", layers=4, compute="bfloat16"),
    Case("image", compute="bfloat16"),
    Case("sampling", (832, 480, 1), layers=4),
    Case("sampling", (832, 480, 1), "14B", layers=2, compute="bfloat16"),
    Case("sampling", (832, 480, 9), layers=2, compute="bfloat16"),
    Case("sampling", (832, 480, 5), layers=2, compute="bfloat16", beside="vace"),
    Case("sampling", (832, 480, 5), layers=1, compute="bfloat16", beside="merged"),
    Case("sampling", (832, 480, 5), layers=1, compute="bfloat16", beside="reference"),
    Case("sampling", (832, 480, 5), layers=1, compute="bfloat16", beside="teacache"),
    Case("sampling", (832, 480, 17), layers=1, compute="bfloat16", beside="windows"),
    Case("sampling", (832, 480, 33), layers=1, compute="bfloat16", beside="windows"),
    Case("sampling", (832, 480, 65), layers=1, compute="bfloat16", beside="windows"),
    Case("sampling", (832, 480, 129), layers=1, compute="bfloat16", beside="windows"),
    Case("sampling", (832, 480, 33), layers=1, compute="bfloat16"),
    Case("sampling", (832, 480, 1), "14B", layers=1, compute="bfloat16", beside="i2v"),
    Case("sampling", (832, 480, 5), layers=1, dtype=FP32),
    Case("sampling", (832, 480, 1), compute="bfloat16"),
    Case("decoding", (128, 128, 9), dtype=FP32),
    Case("decoding", (256, 256, 5), dtype=FP32),
    Case("decoding", (832, 480, 1), dtype=FP32),
    Case("decoding", (416, 240, 5), dtype=FP32),
    Case("encoding", (256, 256, 5), dtype=FP32),
    Case("encoding", (832, 480, 1), dtype=FP32),
)
CUDA = tuple(
    Case("sampling", (*size, 81), model, limit=limit)
    for model in ("1.3B", "14B")
    for size in ((832, 480), (1280, 720))
    for limit in LIMITS
) + tuple(Case("decoding", (*size, 81), limit=limit) for size in ((832, 480), (1280, 720)) for limit in (8, 12, 24))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="cases whose name holds this; the table keeps its other rows")
    parser.add_argument("--folder", type=Path, help="where the random weights are kept (a temporary folder)")
    parser.add_argument("--replan", action="store_true", help="only plan anew what the table holds measured")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = {case.name: case for case in (CPU if options.device == "cpu" else CUDA) if options.only in case.name}
    if options.case:
        device = torch.device(options.device)
        print(json.dumps(measured(cases[options.case], device, options.folder, work=not options.replan)))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA card here: nothing was measured.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        rows = kept_rows(options.device) if options.only or options.replan else {}
        for case in cases.values():
            if options.replan and case.name not in rows:
                continue
            rows[case.name] = rows.get(case.name, {}) | in_fresh_process(case, options.device, folder, options.replan)
            keep([*rows.values()], options.device)


def in_fresh_process(case: Case, device: str, folder: Path, replan: bool) -> dict:
    files_of(case, folder)
    command = [sys.executable, __file__, "--device", device, "--case", case.name, "--folder", folder]
    command += ["--replan"] if replan else []
    environment = os.environ | {OVERRIDE: case.compute if device == "cpu" else "bfloat16"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    row = {"case": case.name, **json.loads(done.stdout.splitlines()[-1])}
    measured = "" if replan else f" {row['measured']:8.0f} MB, off {off(row):+.1%}"
    print(f"{row['case']:60} planned {row['planned']:8.0f} MB{measured}", flush=True)
    return row


def kept_rows(device: str) -> dict[str, dict]:
    """Of the last run, to which some cases are added."""
    file = HERE / "results" / f"{table_name(device)}.json"
    return {row["case"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}


def table_name(device: str) -> str:
    return "memory" if device == "cpu" else "memory_cuda"


def off(row: dict) -> float:
    return row["planned"] / row["measured"] - 1


def keep(rows: list[dict], device: str) -> None:
    name = table_name(device)
    changed = git("status", "--porcelain", "-uno", "--", HERE.parent / "wan_core", HERE.parent / "nodes")
    facts = {
        "commit": git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "machine": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    head = ["| case | measured MB | planned MB | off | of it working memory, planned MB |", "|---|---|---|---|---|"]
    lines = [
        f"| {row['case']} | {row['measured']:.0f} | {row['planned']:.0f} | {off(row):+.1%} | {row['room']:.0f} |"
        for row in rows
    ]
    text = ", ".join(f"{key} {value}" for key, value in facts.items())
    (HERE / "results" / f"{name}.md").write_text("\n".join([text + ".", "", *head, *lines]) + "\n")
    (HERE / "results" / f"{name}.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


# ---- one case, in a process of its own --------------------------------------------------------------------------


def hold_pages() -> None:
    """Keep the system from taking pages of files back, as it does where other programs need memory: they count too."""
    current, future, on_fault = 1, 2, 4
    if ctypes.CDLL(None).mlockall(current | future | on_fault):
        print("Pages cannot be held: where memory is short, measured values are too small.", file=sys.stderr)


def measured(case: Case, device: torch.device, folder: Path, work: bool) -> dict:
    """MB at the peak, of resident memory or of the card, as planned and, after the work, as measured."""
    hold_pages()
    machine = this_machine(device)
    if case.limit:
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.limit * GIB / machine.vram))
        machine = machine.with_sizes(vram=case.limit * GIB)
    engine = engine_of(case, files_of(case, folder), device)
    phase, run = prepared(case, engine, machine)
    planned = outlook(phase, machine)
    expected = planned.ram + planned.mapped if machine.vram is None else planned.vram
    found = {"planned": expected / 2**20, "room": planned.room / 2**20}
    if not work:
        return found
    with torch.inference_mode(), StandaloneHost().attached(engine, phase.room):
        run()
    return {"measured": memory_mb("VmHWM") if device.type == "cpu" else card_mb(), **found}


def card_mb() -> float:
    """The peak of the whole card: what is not torch's, and the most that torch's tensors took."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_allocated()) / 2**20


def files_of(case: Case, folder: Path) -> Path:
    path = folder / f"{case.kind}_{case.model}_{case.layers}_{str(case.dtype)[6:]}_{case.beside or 'plain'}.safetensors"
    return write_random(path, [on_meta(make) for make in makers(case)], case.dtype)


def makers(case: Case) -> list:
    if case.kind == "text":
        return [lambda: UMT5Encoder(replace(UMT5Layout(), layers=case.layers or 24))]
    if case.kind == "image":  # the published file has one block that is not used
        return [lambda: ImageEncoder(ImageEncoderLayout(layers=32))]
    if case.kind in ("decoding", "encoding"):
        return [VideoVAE]
    sizes = TRUNKS[case.model] | ({"layers": case.layers} if case.layers else {})
    more = {"i2v": {"in_dim": 36, "image_tokens": True},
            "reference": {"in_dim": 48, "image_tokens": True, "reference": True}}  # fmt: skip
    made = [lambda: DiT(DiTLayout(**sizes, **more.get(case.beside, {})))]
    if case.beside == "vace":
        vace = VACELayout(sizes["dim"], sizes["ffn_dim"], sizes["layers"] // 2, sizes["heads"])
        made.append(lambda: VACE(vace))
    return made


def engine_of(case: Case, path: Path, device: torch.device):
    if case.kind == "text":
        return load_text_encoder(path, device=device, tokenizer=str(tokenizer_folder(path.parent)))
    if case.kind == "image":
        return load_image_encoder(path, device=device)
    if case.kind != "sampling":
        return load_vae(path, device=device)
    limit = Offload(vram_limit=case.limit * GIB) if case.limit else None
    model = load_model(path, device=device, offload=limit)
    if case.beside == "teacache":
        model = model.with_cache(TeaCache(10.0, "whole run"))
    return model.with_windows(Windows(3, 2)) if case.beside == "windows" else model


def tokenizer_folder(folder: Path) -> Path:
    """A tokenizer that knows the words of the prompt."""
    import tokenizers

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: 3 + number for number, word in enumerate(set(PROMPT.split()))}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    found.save(str(folder / "tokenizer.json"))
    return folder


def prepared(case: Case, engine, machine) -> tuple[Phase, object]:
    """The phase as it is planned, and the work itself."""
    width, height, frames = case.size
    if case.kind == "text":
        text = PROMPT * 30
        return text_phase(engine, text), lambda: engine.encode([text])
    if case.kind == "image":
        return image_phase(engine), lambda: engine.encode(torch.rand(1, 480, 832, 3))
    tiling = {"tiled": True} if case.beside == "tiled" else {}
    if case.kind == "encoding":
        pixels = torch.zeros(1, 3, frames, height, width)
        phase = encoding_phase(engine, frames, height, width, free_for(engine, machine), **tiling)
        return phase, lambda: engine.encode(pixels, **tiling)
    shape = latent_shape(width, height, frames)
    if case.kind == "decoding":
        phase = decoding_phase(engine, shape, free_for(engine, machine), **tiling)
        return phase, lambda: engine.decode(torch.randn(shape), **tiling)
    # in the second step all weights have been read, when the first of them are widened again
    settings = Settings(0, 3 if case.beside == "teacache" else 2, 5.0 if case.beside == "merged" else 1.0,
                        cfg_merge=case.beside == "merged")  # fmt: skip
    conditions = conditions_of(case, shape)
    text = torch.randn(1, 100, 4096)
    phase = sampling_phase(engine, shape, settings, conditions, text.shape[1])
    return phase, lambda: sample(engine, text, text, torch.zeros(shape), settings, conditions)


def conditions_of(case: Case, shape: tuple) -> list:
    _, channels, *size = shape
    latents, features = torch.zeros(1, channels, *size), torch.randn(1, 257, 1280)
    image = ImageCondition(latents, torch.zeros(1, 4, *size), features)
    reference = ReferenceCondition(torch.randn(1, channels, 1, *size[1:]), features)
    vace = VACECondition(latents, latents, torch.zeros(1, 64, *size))
    return {"i2v": [image], "reference": [image, reference], "vace": [vace]}.get(case.beside, [])


if __name__ == "__main__":
    main()
