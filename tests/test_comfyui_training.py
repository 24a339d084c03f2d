"""Training inside a real ComfyUI, and the LoRA on ComfyUI's own Wan model. COMFYUI_PATH as in test_comfyui.py."""

import json
import os
import sys
from pathlib import Path

import pytest
from comfyui_server import ROOT, Server
from safetensors.torch import load_file, save_file

COMFYUI = os.environ.get("COMFYUI_PATH")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
EXAMPLE = ROOT / "example_workflows/api/train_and_use.json"
TINY = ROOT / "wan_core/tiny/weights/diffusion_pytorch_model.safetensors"
EQUAL = 1e-4  # relative, of the LoRA's effect on a sampled latent: both compute in fp32, by other kernels

pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH does not name a ComfyUI folder")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(Path(COMFYUI).resolve(), PYTHON, tmp_path_factory.mktemp("comfyui"))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def id_of(graph, name):
    (found,) = [id for id, entry in graph.items() if entry["class_type"] == name]
    return found


def training(**settings):
    """The example's training alone, of four clips of five frames, 32 x 32."""
    graph = json.loads(EXAMPLE.read_text())
    for id in ("4", "5", "6", "7", "8", "9", id_of(graph, "WanFlowApplyLora")):
        del graph[id]
    graph[id_of(graph, "WanFlowDataset")]["inputs"].update(size="32x32", num_frames=5, repeat=1)
    usual = {"epochs": 2, "learning_rate": 0.01, "rank": 4, "sample_every": 0, "save_every": 0, "schedule": "constant"}
    graph[id_of(graph, "WanFlowTrain")]["inputs"].update({**usual, **settings})
    return graph


@pytest.fixture(scope="module")
def trained(server):
    """A finished training, its LoRA saved twice; the run and its graph."""
    graph = training(folder="training/first", sample_every=3)
    save = graph[id_of(graph, "WanFlowSaveLora")]
    graph["kohya"] = {**save, "inputs": {**save["inputs"], "key_format": "kohya", "filename_prefix": "loras/kohya"}}
    run = server.run(graph)
    assert run.status == "execution_success", run.error
    return run, graph


def losses(server, folder):
    lines = (server.base / "output" / folder / "losses.csv").read_text().splitlines()
    return [line.split(",")[2] for line in lines[1:]]


def while_it_trains(act):
    """Calls `act` once, when the page is told of the training's first steps."""
    told = []

    def on_message(kind, data):
        if kind == "wanflow.training" and data.get("curve") and not told:
            told.append(data)
            act()

    return on_message


def test_it_trains_saves_and_shows(server, trained):
    run, graph = trained
    assert run.steps[-1] == (id_of(graph, "WanFlowTrain"), 6)
    (state,) = run.outputs[id_of(graph, "WanFlowTrain")]["wanflow_training"]
    assert state["text"].startswith("step 6 of 6") and len(state["curve"]) == 6 and not state["running"]
    for sample in state["samples"]:
        assert (server.base / "output" / sample["subfolder"] / sample["filename"]).stat().st_size > 500
    assert len(losses(server, "training/first")) == 6
    shown = run.outputs[id_of(graph, "WanFlowDataset")]["images"]
    assert shown[0]["type"] == "temp"


def test_cancelled_it_keeps_everything_and_goes_on(server, trained):
    whole, stopped = (training(folder=f"training/{name}", epochs=20, rank=2) for name in ("whole", "stopped"))
    assert server.run(whole).status == "execution_success"
    run = server.run(stopped, on_message=while_it_trains(lambda: server.ask("/interrupt", {})))
    assert run.status == "execution_interrupted"
    done = len(losses(server, "training/stopped"))
    assert 1 <= done < 60 and (server.base / f"output/training/stopped/step-{done}.safetensors").is_file()
    assert server.run(stopped).status == "execution_success"
    assert losses(server, "training/stopped") == losses(server, "training/whole")


def test_finished_early_the_graph_goes_on(server, trained):
    graph = training(folder="training/finished", epochs=300, rank=2)
    finish = f"/wanflow/finish/{id_of(graph, 'WanFlowTrain')}"
    run = server.run(graph, on_message=while_it_trains(lambda: server.ask(finish, {})))
    assert run.status == "execution_success", run.error
    assert 1 <= len(losses(server, "training/finished")) < 900
    assert run.outputs[id_of(graph, "WanFlowSaveLora")]["loras"]


def sampled(server, graph, source, name):
    graph["save"] = {"class_type": "SaveLatent", "inputs": {"samples": source, "filename_prefix": name}}
    run = server.run(graph)
    assert run.status == "execution_success", run.error
    (file,) = (server.base / "output").glob(f"{name}_*.latent")
    return load_file(file)["latent_tensor"]


@pytest.mark.parametrize("lora", ["pink_00001_.safetensors", "kohya_00001_.safetensors"])
def test_core_s_loader_gives_core_s_model_the_same(server, trained, lora):
    """Load Diffusion Model, LoraLoaderModelOnly, KSampler, against our loader, Apply Wan LoRA and Wan Sampler."""
    weights = {name: tensor.float() for name, tensor in load_file(TINY).items()}
    save_file(weights, server.base / "models/diffusion_models/tiny_fp32.safetensors")
    example = json.loads(EXAMPLE.read_text())
    shared = {id: example[id] for id in ("2", "4", "5", "6")}
    settings = {"seed": 3, "steps": 4, "cfg": 1.0, "denoise": 1.0}
    texts = {"positive": ["4", 0], "negative": ["5", 0]}
    core = shared | {
        "unet": node("UNETLoader", unet_name="tiny_fp32.safetensors", weight_dtype="default"),
        "lora": node("LoraLoaderModelOnly", model=["unet", 0], lora_name=lora, strength_model=1.0),
        "shift": node("ModelSamplingSD3", model=["lora", 0], shift=3.0),
        "sampler": node("KSampler", model=["shift", 0], latent_image=["6", 0], sampler_name="euler", scheduler="simple",
                        **texts, **settings),
    }  # fmt: skip
    sampler = example["7"]["inputs"] | {"model": ["lora", 0], "shift": 3.0} | settings
    ours = shared | {
        "model": node("WanFlowLoadModel", model="tiny_fp32.safetensors", weight_dtype="auto", attention="auto"),
        "lora": node("WanFlowApplyLora", model=["model", 0], lora_name=lora, strength=1.0),
        "sampler": node("WanFlowSampler", **sampler),
    }
    found = {}
    for name, graph in (("core", core), ("ours", ours)):
        found[name] = sampled(server, graph, ["sampler", 0], f"{name}-{lora[:5]}-with")
        entry = graph["lora"]["inputs"]
        entry["strength_model" if name == "core" else "strength"] = 0.0
        found[name] -= sampled(server, graph, ["sampler", 0], f"{name}-{lora[:5]}-without")
    difference = (found["core"] - found["ours"]).norm() / found["ours"].norm()
    print(f"{lora}: effect {found['ours'].norm():.2f}, relative difference {difference:.1e}")
    assert found["ours"].std() > 1e-2 and difference < EQUAL


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}
