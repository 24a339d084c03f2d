"""What is planned before a run: sizes and work of all published models, the decisions, the page and the chart."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_wanflow.nodes import speed_up
from comfyui_wanflow.nodes.headless.cli import main
from comfyui_wanflow.nodes.headless.rehearsal import Rehearsal
from comfyui_wanflow.nodes.headless.workflows import read_workflow
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.nodes.plan import Plan
from comfyui_wanflow.wan_core.errors import InputError
from comfyui_wanflow.wan_core.loading import catalog
from comfyui_wanflow.wan_core.loading.load import load_model, load_text_encoder, load_vae
from comfyui_wanflow.wan_core.loading.outline import open_outline, published_layout
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.slots import Run, Slots
from comfyui_wanflow.wan_core.offload.options import Offload
from comfyui_wanflow.wan_core.offload.policy import plan, plan_all
from comfyui_wanflow.wan_core.planning import cards
from comfyui_wanflow.wan_core.planning.chart import draw
from comfyui_wanflow.wan_core.planning.forecast import forecast, outlook
from comfyui_wanflow.wan_core.planning.machines import CARDS, GIB, Machine, any_card, card_like
from comfyui_wanflow.wan_core.planning.phases import Phase, free_for, moved, sampling_phase
from comfyui_wanflow.wan_core.planning.report import WIDTH, bar, page
from comfyui_wanflow.wan_core.planning.work import trunk_work
from comfyui_wanflow.wan_core.sampling.loop import Settings
from torch.utils.flop_counter import FlopCounterMode

MANIFEST = json.loads((Path(__file__).parent / "data" / "wan21_key_manifest.json").read_text())
LATENT = (1, 16, 21, 60, 104)  # 480p, 81 frames
PUBLISHED = {  # row -> the manifest's entries for its diffusion model
    "T2V-1.3B": "t2v-1.3b", "T2V-14B": "t2v-14b", "I2V-14B-480P": "i2v-or-inp-14b", "I2V-14B-720P": "i2v-or-inp-14b",
    "FLF2V-14B-720P": "flf2v-14b", "Fun-1.3B-InP": "fun-inp-1.3b", "Fun-14B-InP": "i2v-or-inp-14b",
    "Fun-1.3B-Control": "fun-control-1.3b", "Fun-14B-Control": "fun-control-14b",
    "Fun-V1.1-1.3B-Control": "fun-v1.1-control-1.3b", "Fun-V1.1-14B-Control": "fun-v1.1-control-14b",
    "Fun-V1.1-1.3B-InP": "fun-inp-1.3b", "Fun-V1.1-14B-InP": "i2v-or-inp-14b",
    "Fun-V1.1-1.3B-Control-Camera": "fun-v1.1-camera-1.3b", "Fun-V1.1-14B-Control-Camera": "fun-v1.1-camera-14b",
    "VACE-1.3B-Preview": "t2v-1.3b vace-1.3b-module", "VACE-1.3B": "t2v-1.3b vace-1.3b-module",
    "VACE-14B": "t2v-14b vace-14b-module", "1.3b-speedcontrol-v1": "t2v-1.3b",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_models(tmp_path, monkeypatch):
    """No published model is on this machine, and none is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANFLOW_OFFLINE", "1")
    monkeypatch.setenv("WANFLOW_COMPUTE_DTYPE", "bfloat16")  # as cards compute
    for name in ("models_dir", "output_directory", "quiet"):
        monkeypatch.setattr(host, name, tmp_path if name != "quiet" else True)


# ---- what is known before a download ----------------------------------------------------------------------------


def manifest_shapes(entry):
    return {
        key.replace("{N}", str(n)): tuple(shape)
        for key, (shape, count) in MANIFEST[entry]["keys"].items()
        for n in range(count)
    }


@pytest.mark.parametrize("row", catalog.PUBLISHED, ids=lambda row: row.name)
def test_the_outline_of_a_published_model_has_its_tensors(row):
    entries = PUBLISHED[row.name.replace("Wan2.1-", "")].split()
    outline = open_outline(row.name, "dit")
    assert outline.missing
    assert outline.shapes == {key: shape for entry in entries for key, shape in manifest_shapes(entry).items()}


@pytest.mark.parametrize("kind, entry", [("text_encoder", "umt5-xxl-encoder"), ("vae", "vae-2.1")])
def test_the_outline_of_what_stands_beside(kind, entry):
    outline = open_outline("Wan2.1-T2V-1.3B", kind)
    assert outline.shapes == manifest_shapes(entry)
    assert outline.bytes == pytest.approx({"text_encoder": 11.36e9, "vae": 0.508e9}[kind], rel=0.01)


def test_an_outline_of_a_file_has_its_sizes_and_no_numbers():
    outline = open_outline("WanTiny-T2V", "dit")
    assert not outline.missing and outline.bytes == outline.files[0].stat().st_size
    assert all(outline.tensor(name).is_meta for name in outline.shapes)
    real, planned = load_model("WanTiny-T2V", device="cpu"), load_model(outline, device="cpu")
    assert real.residency.sizes() == planned.residency.sizes()


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B", "Wan2.1-I2V-14B-480P"])
def test_the_work_is_what_torch_counts(name, monkeypatch):
    import comfyui_wanflow.wan_core.models.dit as dit

    monkeypatch.setattr(dit, "pad_text", lambda text: (text, None))
    layout = replace(published_layout(next(row for row in catalog.PUBLISHED if row.name == name)), layers=2)
    with torch.device("meta"):
        model = DiT(layout).requires_grad_(False)
        x, time, text = torch.empty(1, 16, 2, 16, 16), torch.empty(1), torch.empty(1, 512, 4096)
        image = torch.empty(1, 257, layout.dim) if layout.image_tokens else None
        concat = {"mask": torch.empty(1, 4, 2, 16, 16), "image": x} if layout.image_tokens else {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, time, text, Slots(concat=concat, context_prefix=image), Run())
    tokens, images = 2 * 8 * 8, 257 if layout.image_tokens else 0
    time_work = 2 * (256 * layout.dim + 7 * layout.dim**2)
    assert counter.get_total_flops() - time_work == pytest.approx(trunk_work(layout, tokens, images), rel=1e-3)


# ---- what is decided --------------------------------------------------------------------------------------------


def test_networks_that_run_together_share_a_budget():
    trunk, vace = ([100] * 10 + [30], range(10)), ([50] * 4 + [20], range(4))
    for budget in (2000, 1250, 900, 500, 400):
        plans = plan_all([trunk, vace], budget)
        assert sum(found.peak(0) for found in plans) <= budget
    assert not plan_all([trunk, vace], 1250)[1].streamed and plan_all([trunk, vace], 1249)[1].streamed
    assert plan_all([trunk], 700) == [plan(*trunk[:1], 700, trunk[1])]
    assert not any(found.streamed for found in plan_all([trunk, vace], None))


def model(name="Wan2.1-T2V-14B", device="cuda", **options):
    return load_model(open_outline(name, "dit"), device=device, **options)


@pytest.mark.parametrize("row", catalog.PUBLISHED, ids=lambda row: row.name)
def test_every_model_fits_every_card_at_480p(row):
    """Whatever does not fit travels: the peak stays below the card's memory, for 14B models on 8 GB too."""
    phase = sampling_phase(model(row.name), LATENT, Settings(0))
    streamed = []
    for size in (8, 12, 16, 24, 32, 48, 80):
        found = outlook(phase, any_card(size * GIB))
        assert found.vram <= size * GIB, f"{size} GB"
        streamed.append(found.streamed)
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[-1] == 0
    assert bool(streamed[0]) == ("14B" in row.name)


def test_limits_hold_for_the_plan_too():
    card = card_like("RTX 4090")
    limited = model(offload=Offload(vram_limit=12 * GIB))
    found, free = (outlook(sampling_phase(m, LATENT, Settings(0)), card) for m in (limited, model()))
    assert found.vram <= 12 * GIB < free.vram
    none = outlook(sampling_phase(model(offload=Offload(persistent=0)), LATENT, Settings(0)), card)
    assert none.resident == 0 and none.blocks == (0, 40)


def test_what_takes_more():
    """Longer videos, merged prompts, references, cameras and caches."""
    found = model("Wan2.1-T2V-1.3B")
    plain = sampling_phase(found, LATENT, Settings(0))
    assert sampling_phase(found, (1, 16, 41, 60, 104), Settings(0)).room > 1.8 * plain.room
    merged = sampling_phase(found, LATENT, Settings(0, cfg_merge=True))
    assert merged.room > 1.8 * plain.room and merged.passes == plain.passes / 2 and merged.work == 2 * plain.work
    for condition in (SimpleNamespace(in_front=1, embedded=0), SimpleNamespace(in_front=0, embedded=1)):
        assert sampling_phase(found, LATENT, Settings(0), [condition]).room > plain.room
    alone = sampling_phase(found, LATENT, Settings(0, cfg=1.0))
    assert alone.passes * 2 == plain.passes


def test_streaming_costs_time_where_computing_is_short():
    card, found = card_like("RTX 4090").with_sizes(vram=8 * GIB, ram=256 * GIB), model()
    video = outlook(sampling_phase(found, LATENT, Settings(0)), card)
    image = outlook(sampling_phase(found, (1, 16, 1, 60, 104), Settings(0)), card)
    assert video.streamed and video.hidden == 1 and video.seconds == pytest.approx(
        video.compute_seconds + video.resident / card.bus
    )
    assert image.hidden < 0.5 and image.seconds > 2 * image.compute_seconds
    assert outlook(sampling_phase(found, LATENT, Settings(0)), card.with_sizes(ram=16 * GIB)).reread > 0


def test_an_engine_is_planned_as_it_would_compute_elsewhere():
    here = load_model("WanTiny-T2V", device="cpu")
    there = moved(here, card_like("RTX 4090"))
    assert (there.device.type, there.compute_dtype) == ("cuda", torch.bfloat16)
    assert moved(there, card_like("RTX 3060")) is there
    vae = load_vae("WanTiny-T2V", device="cpu")
    assert free_for(vae, Machine("no card", None, GIB, 1.0)) is None


# ---- whole workflows --------------------------------------------------------------------------------------------

API = Path(__file__).resolve().parents[1] / "example_workflows" / "api"


def test_the_plan_is_what_the_run_asks_for(monkeypatch):
    """The rooms that the nodes ask of the host, and the plan that the host follows, are those of the rehearsal."""
    planned = Rehearsal(Machine("processor", None, 8 * GIB, 1e11)).run(read_workflow("quickstart"))
    asked = {}

    def make_room(engine, room):
        asked[type(engine)] = max(room, asked.get(type(engine), 0))

    monkeypatch.setattr(host, "make_room", make_room)
    assert main(["run", "quickstart", "--set", "7.steps=1"]) == 0
    assert asked == {type(one.phase.engine): one.phase.room for one in planned.outlooks if one.phase.engine}


@pytest.mark.parametrize("name", ["Wan2.1-VACE-14B-edit", "Wan2.1-FLF2V-14B-720P", "Wan2.1-Fun-V1.1-14B-Control",
                                  "Wan2.1-Fun-V1.1-14B-Control-Camera", "video_to_video"])  # fmt: skip
def test_examples_are_planned_before_their_download(name):
    found = Rehearsal(card_like("RTX 4090")).run(read_workflow(name))
    phases = [one.phase.name for one in found.outlooks]
    assert phases[0] == "text encoding" or "text encoding" in phases
    assert {"sampling", "VAE decoding", "saving"} <= set(phases)
    assert ("VAE encoding" in phases) and found.fits
    assert all(file.missing for file in found.files) and found.disk > 10e9


def test_every_example_can_be_rehearsed():
    """The cheap half: that every node of every example has a role. A training tells its memory itself."""
    from comfyui_wanflow.nodes.headless.rehearsal import REAL, ROLES

    graphs = [json.loads(path.read_text(encoding="utf-8")).values() for path in API.glob("*.json")]
    used = {node["class_type"] for graph in graphs for node in graph}
    assert used - {"WanFlowDataset", "WanFlowTrain", "WanFlowSaveLora"} <= {*ROLES, *REAL}
    with pytest.raises(InputError, match="Wan Training Data cannot be planned: leave it out"):
        Rehearsal(CARDS[0]).run(read_workflow("train_and_use"))


def test_weights_that_are_converted_take_memory_that_stays():
    workflow = read_workflow("Wan2.1-T2V-1.3B")
    found = {}
    for dtype in ("auto", "bf16", "fp8_e4m3fn"):
        workflow["1"]["inputs"]["weight_dtype"] = dtype
        found[dtype] = Rehearsal(card_like("RTX 4090")).run(workflow)
    plain, half, quarter = (one.machine.base / 1e9 - 2 * GIB / 1e9 for one in found.values())
    assert plain == 0 and half == pytest.approx(2.84, rel=0.02) and 1.3 < quarter < 2.0
    sampling = {dtype: one.outlooks[1] for dtype, one in found.items()}
    assert sampling["auto"].mapped > 5e9 and sampling["bf16"].mapped < 0.1e9
    assert sampling["fp8_e4m3fn"].resident < 0.7 * sampling["bf16"].resident


def test_frames_that_are_saved_while_they_are_decoded_do_not_wait():
    workflow = read_workflow("Wan2.1-T2V-1.3B")
    whole = Rehearsal(card_like("RTX 4090")).run(workflow)
    (decode,) = (id for id, node in workflow.items() if node["class_type"] == "WanFlowVAEDecode")
    (save,) = (id for id, node in workflow.items() if node["class_type"] == "WanFlowSaveVideo")
    inputs = workflow[decode]["inputs"] | workflow[save]["inputs"]
    del inputs["images"], workflow[decode]
    workflow[save] = {"class_type": "WanFlowDecodeAndSave", "inputs": inputs}
    streamed = Rehearsal(card_like("RTX 4090")).run(workflow)
    assert streamed.outlooks[-1].phase.name == "decode and save"
    assert streamed.outlooks[-1].vram == whole.outlooks[-2].vram and streamed.ram < whole.ram


def test_optional_inputs_of_the_sampler_are_no_hindrance():
    workflow = read_workflow("quickstart")
    workflow["7"]["inputs"] |= {"denoise_as": "ComfyUI", "rounding": "none", "cfg_end": 0.5}
    assert Rehearsal(Machine("processor", None, 8 * GIB, 1e11)).run(workflow)


@pytest.mark.parametrize("node", speed_up.NODES)
def test_every_way_to_run_a_model_faster_can_be_planned(node):
    schema, workflow = node.GET_SCHEMA(), read_workflow("quickstart")
    inputs = {socket.id: socket.arguments["default"] for socket in schema.inputs if socket.id != "model"}
    workflow["speed"] = {"class_type": schema.node_id, "inputs": {"model": ["1", 0], **inputs}}
    workflow["7"]["inputs"]["model"] = ["speed", 0]
    assert Rehearsal(Machine("processor", None, 8 * GIB, 1e11)).run(workflow)


def test_the_command(capsys):
    options = ["--card", "nvidia rtx4090", "--ram", "16", "--set", "6.num_frames=161"]
    assert main(["plan", "Wan2.1-T2V-1.3B", *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Wan2.1-T2V-1.3B on RTX 4090 (24 GB) with 16 GB of main memory: it fits.")
    assert "sampling         |o" in text and "not on this machine: planned from the catalogue" in text
    assert main(["plan", "quickstart", "--vram", "0", "--chart", "chart.png"]) == 0
    assert Path("chart.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--card", "RTX 4091"], "The card 'RTX 4091' is not known. The nearest is RTX 4090."),
        (["--vram", "-1"], "--vram is -1. Enter how many GB there are"),
    ],
)
def test_what_the_command_refuses(arguments, sentence, capsys):
    assert main(["plan", "quickstart", *arguments]) == 1
    assert sentence in capsys.readouterr().err


def test_a_workflow_that_computes_nothing_is_refused():
    with pytest.raises(InputError, match="nothing to plan"):
        Rehearsal(CARDS[0]).run({
            "1": {"class_type": "LoadImage", "inputs": {"image": "toy_first_image.png"}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        })  # fmt: skip


def test_the_table_of_cards_is_what_the_planner_says():
    assert cards.PAGE.read_text(encoding="utf-8") == cards.page(), f"Write it anew: python -m {cards.__name__}"


# ---- how it is shown --------------------------------------------------------------------------------------------

CARD = Machine("a card", 10 * GIB, 32 * GIB, 1e12, taken=GIB, base=GIB)


def test_the_bar_shows_the_shares():
    engine = SimpleNamespace(
        weights=[SimpleNamespace(sizes=lambda: ([GIB] * 4, range(4)), rest_on="disk")], offload=None,
        plans=lambda offload, room, memory: plan_all([([GIB] * 4, range(4))], 5 * GIB), stored_bytes=lambda: 4 * GIB,
    )  # fmt: skip
    found = outlook(Phase("sampling", engine, room=GIB, passes=2, work=1e12), CARD)
    assert bar(found, 10 * GIB) == f"{'o' * 4}{'#' * 16}{'+' * 4}{' ' * 16}"
    assert len(bar(found, 5 * GIB)) == WIDTH and bar(found, 5 * GIB).endswith("!")
    text = page(forecast([found.phase], CARD), "A run")
    assert text.startswith("A run on a card (10 GB) with 32 GB of main memory: it fits.")


def test_what_does_not_fit_is_said_first():
    found = forecast([Phase("sampling", room=12 * GIB), Phase("saving", kept=40 * GIB)], CARD)
    assert not found.fits
    assert "IT DOES NOT FIT. Sampling lacks 3 GB on the card." in page(found, "A run")
    assert draw(found, "A run").width == 960


def test_the_node():
    engines = {"text_encoder": load_text_encoder("WanTiny-T2V"), "vae": load_vae("WanTiny-T2V")}
    tiny, latent = load_model("WanTiny-T2V"), {"samples": torch.zeros(1, 16, 5, 8, 8)}
    report, chart = Plan.execute(tiny, latent, 20, 5.0, False, "RTX 3060", 0.0, 0.0, **engines).args
    assert "WanTiny-T2V, 64x64 with 17 frames, on RTX 3060 (12 GB)" in report and "VAE decoding" in report
    assert chart.ndim == 4 and chart.shape[3] == 3 and 0 <= chart.min() and chart.max() <= 1
    with pytest.raises(InputError, match="There is no card 'Voodoo 2'"):
        Plan.execute(tiny, latent, 20, 5.0, False, "Voodoo 2", 0.0, 0.0)
