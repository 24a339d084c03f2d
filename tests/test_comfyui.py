"""The pack inside a real ComfyUI. COMFYUI_PATH is its folder, COMFYUI_PYTHON the interpreter that has its requirements.

WANFLOW_RECORD=1 writes what it answers on /object_info to tests/data/object_info.json.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fake_hub
import gguf
import numpy as np
import pytest
import torch
from comfyui_server import COMPUTE_DTYPE, ROOT, Server
from comfyui_wanflow.nodes.headless import cli
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.video import read_video
from PIL import Image
from safetensors.torch import load_file, save_file

COMFYUI = os.environ.get("COMFYUI_PATH")
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
RECORDED = ROOT / "tests/data/object_info.json"
QUICKSTART = ROOT / "example_workflows/api/quickstart.json"

pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PATH does not name a ComfyUI folder")


@pytest.fixture(scope="module")
def hub():
    """A stand-in of ModelScope, which the server asks."""
    with fake_hub.running() as (hub, address):
        os.environ["MODELSCOPE_ENDPOINT"] = address
        yield hub
        del os.environ["MODELSCOPE_ENDPOINT"]


@pytest.fixture(scope="module")
def server(tmp_path_factory, hub):
    server = Server(Path(COMFYUI).resolve(), PYTHON, tmp_path_factory.mktemp("comfyui"))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def quickstart(folder="first", **settings):
    """The quickstart graph with `settings` on its sampler, its frames also saved as images in `folder`."""
    graph = json.loads(QUICKSTART.read_text())
    graph[node(graph, "WanFlowSampler")]["inputs"].update(settings)
    images = [node(graph, "WanFlowVAEDecode"), 0]
    graph["frames"] = {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": f"{folder}/frames"}}
    return graph


def node(graph, name):
    (found,) = [id for id, entry in graph.items() if entry["class_type"] == name]
    return found


def frames(folder):
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("frames_*.png"))]).astype(int)


@pytest.fixture(scope="module")
def first_run(server):
    """The quickstart graph, run once as the front end runs it."""
    run = server.run(quickstart(), workflow={"nodes": [], "note": "a = b; c"})
    assert run.status == "execution_success", run.error
    return run


def test_the_pack_loads_without_a_word(server):
    lines = [line for line in server.log.splitlines() if "wanflow" in line.lower()]
    assert len(lines) == 1, lines  # the one in the list of import times
    assert "FAILED" not in lines[0]


def test_object_info_is_what_was_recorded(server):
    answer = server.ask("/object_info")
    infos = {name: info for name, info in answer.items() if info.pop("python_module") == "custom_nodes.comfyui-wanflow"}
    if os.environ.get("WANFLOW_RECORD"):
        RECORDED.write_text(json.dumps(infos, indent=1, ensure_ascii=False) + "\n")
    recorded = json.loads(RECORDED.read_text())
    assert infos.keys() == recorded.keys()
    for name, info in recorded.items():
        assert {key: infos[name][key] for key in info} == info  # newer versions of ComfyUI answer with more keys


def test_frames_are_those_of_the_headless_run(server, first_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANFLOW_COMPUTE_DTYPE", COMPUTE_DTYPE)
    (tmp_path / "graph.json").write_text(json.dumps(quickstart()))
    assert cli.main(["run", str(tmp_path / "graph.json"), "--output-dir", str(tmp_path), "--quiet"]) == 0
    ours, theirs = frames(tmp_path / "first"), frames(server.base / "output/first")
    assert ours.shape == theirs.shape and len(ours) > 4
    assert np.abs(ours - theirs).max() <= 1


def test_progress_and_previews_are_shown(first_run):
    graph = quickstart()
    sampler = node(graph, "WanFlowSampler")
    steps = [step for id, step in first_run.steps if id == sampler]
    assert steps == list(range(1, graph[sampler]["inputs"]["steps"] + 1))
    assert first_run.previews >= len(steps)


def saved_video(server, run):
    shown = run.outputs[node(quickstart(), "WanFlowSaveVideo")]
    assert shown["animated"] == [True]
    (entry,) = shown["images"]
    return server.base / entry["type"] / entry["subfolder"] / entry["filename"]


def test_the_saved_video_carries_its_graph_and_is_shown(server, first_run):
    tags = saved_video(server, first_run).read_bytes()
    assert b'"note": "a = b; c"' in tags and b'"WanFlowSampler"' in tags


def test_unchanged_nodes_are_not_run_again(server, first_run):
    graph = quickstart()
    again = server.run(graph)
    assert set(again.cached) == set(graph) and not again.steps
    changed = server.run(quickstart("changed", seed=123456))
    ran = {"WanFlowSampler", "WanFlowVAEDecode", "WanFlowSaveVideo", "SaveImage"}
    assert {graph[id]["class_type"] for id in set(graph) - set(changed.cached)} == ran


def test_interrupt_stops_within_one_step(server, first_run):
    graph = quickstart("interrupted", steps=1000, seed=99)
    graph[node(graph, "WanFlowEmptyLatent")]["inputs"].update(width=192, height=192)  # steps that take a while
    sampler, asked = node(graph, "WanFlowSampler"), []

    def interrupt(id, step):
        if id == sampler and step == 3:
            server.ask("/interrupt", {})
            asked.append(step)

    run = server.run(graph, on_step=interrupt)
    assert asked and run.status == "execution_interrupted"
    assert max(step for id, step in run.steps if id == sampler) <= 4  # that which ran when the request arrived


def test_errors_are_our_sentences(server):
    graph = quickstart()
    graph[node(graph, "WanFlowLoadModel")]["inputs"]["files"] = "/nowhere/model.safetensors"
    run = server.run(graph)
    assert run.status == "execution_error"
    assert "/nowhere/model.safetensors" in run.error["exception_message"]
    assert run.error["exception_type"].endswith("FileError")


def test_memory_is_handed_back(server, first_run):
    assert "EnginePatcher" in [name for name, _ in server.ask("/probe/loaded")]
    for _ in range(30):  # ComfyUI overhears it while it cleans up after a run
        server.ask("/free", {"unload_models": True, "free_memory": True})
        threading.Event().wait(1)
        if not server.ask("/probe/loaded"):
            break
    assert server.ask("/probe/loaded") == []
    run = server.run(quickstart("again"))  # nothing is left in the cache, and everything loads again
    assert run.status == "execution_success" and run.cached == []


def test_video_to_video(server, first_run):
    shutil.copy(saved_video(server, first_run), server.base / "input/clip.mp4")
    graph = quickstart("video_to_video", denoise=0.5)
    clip = {"video": "clip.mp4", "frame_rate": 0.0, "num_frames": 0, "size": "original"}
    graph["clip"] = {"class_type": "WanFlowLoadVideo", "inputs": clip}
    inputs = {"vae": [node(graph, "WanFlowLoadVAE"), 0], "images": ["clip", 0], "fit": "cover"}
    inputs |= {"tiled": False, "tile_size": "30x52", "tile_stride": "15x26"}
    graph["encoded"] = {"class_type": "WanFlowVAEEncode", "inputs": inputs}
    graph[node(graph, "WanFlowSampler")]["inputs"]["latent"] = ["encoded", 0]
    run = server.run(graph)
    assert run.status == "execution_success", run.error
    assert frames(server.base / "output/video_to_video").shape == frames(server.base / "output/first").shape
    tags = saved_video(server, run).read_bytes()
    assert b'"WanFlowLoadVideo"' in tags and b"is_changed" not in tags  # ComfyUI's name for the file's hash


@pytest.fixture(scope="module")
def full_width_vae(server):
    """The name of a random VAE in models/vae: core's own code knows Wan's only at its true width."""
    torch.manual_seed(0)
    vae = VideoVAE().half()
    for name, weight in vae.named_parameters():
        if weight.ndim > 1 and "gamma" not in name:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    save_file(vae.state_dict(), server.base / "models/vae/random_vae.safetensors")
    return "random_vae.safetensors"


def test_core_nodes_take_our_latents_and_we_take_theirs(server, full_width_vae):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(server.base / "input/noise.png")
    graph = {
        "picture": {"class_type": "LoadImage", "inputs": {"image": "noise.png"}},
        "image": {"class_type": "RepeatImageBatch", "inputs": {"image": ["picture", 0], "amount": 5}},
        "core_vae": {"class_type": "VAELoader", "inputs": {"vae_name": full_width_vae}},
        "our_vae": {"class_type": "WanFlowLoadVAE", "inputs": {"vae": full_width_vae, "weight_dtype": "auto"}},
    }
    tiling = {"tiled": False, "tile_size": "30x52", "tile_stride": "15x26"}
    for encoder in ("core", "our"):
        latent, images, vae = [f"{encoder}_latent", 0], ["image", 0], [f"{encoder}_vae", 0]
        graph[latent[0]] = {
            "core": {"class_type": "VAEEncode", "inputs": {"vae": vae, "pixels": images}},
            "our": {
                "class_type": "WanFlowVAEEncode", "inputs": {"vae": vae, "images": images, "fit": "cover", **tiling}
            },
        }[encoder]
        for decoder in ("core", "our"):
            decoded, vae = f"{encoder}_{decoder}", [f"{decoder}_vae", 0]
            graph[decoded] = {
                "core": {"class_type": "VAEDecode", "inputs": {"vae": vae, "samples": latent}},
                "our": {"class_type": "WanFlowVAEDecode", "inputs": {"vae": vae, "latent": latent, **tiling}},
            }[decoder]
            graph[f"{decoded}_save"] = {
                "class_type": "SaveImage", "inputs": {"images": [decoded, 0], "filename_prefix": f"{decoded}/frames"}
            }
    run = server.run(graph)
    assert run.status == "execution_success", run.error
    ours = frames(server.base / "output/our_our")
    assert ours.shape == (5, 32, 32, 3) and ours.std() > 5
    for other in ("core_core", "core_our", "our_core"):
        assert np.abs(frames(server.base / "output" / other) - ours).max() <= 1, other


def test_our_sampler_takes_core_s_prompts_and_canvas(server, first_run):
    graph = quickstart("canvas")
    sampler, empty = (graph[node(graph, name)]["inputs"] for name in ("WanFlowSampler", "WanFlowEmptyLatent"))
    size = {"width": empty["width"], "height": empty["height"], "length": empty["num_frames"], "batch_size": 1}
    graph["core canvas"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": size}
    graph["clip"] = {"class_type": "ProbeSmallWanClip", "inputs": {}}
    for name in ("positive", "negative"):
        graph[name] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": f"a {name} prompt"}}
    sampler.update(latent=["core canvas", 0])
    assert server.run(graph).status == "execution_success"
    assert (frames(server.base / "output/canvas") == frames(server.base / "output/first")).all()
    sampler.update(positive=["positive", 0], negative=["negative", 0])
    run = server.run(graph)
    assert run.status == "execution_success", run.error


MANAGED = """
import gc, importlib.util, sys
sys.argv = ["comfyui", "--cpu"]
sys.path.insert(0, {comfyui!r})
import comfy.options
comfy.options.enable_args_parsing()
import comfy.model_management as manager
import folder_paths, torch
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from pack.nodes.host.patcher import EnginePatcher

class Weights:
    held = 0
    def total_bytes(self): return 100
    def resident_bytes(self): return self.held
    def ensure(self, budget, device): self.held = max(0, min(100, budget))
    def release(self, amount=None):
        freed = min(self.held, 100 if amount is None else amount)
        self.held -= freed
        return freed

weights, cpu = Weights(), torch.device("cpu")
patcher = EnginePatcher(weights, cpu)
manager.load_models_gpu([patcher], memory_required=5)
assert weights.held == 100 and manager.loaded_models() == [patcher]
assert patcher.partially_unload(cpu, 30) == 30 and patcher.loaded_size() == 70
assert patcher.partially_load(cpu, -50.5) == -51 and patcher.loaded_size() == 19
assert patcher.partially_load(cpu, 1e32) == 81
manager.load_models_gpu([patcher.clone()])
assert len(manager.loaded_models()) == 1
manager.unload_all_models()
assert weights.held == 0 and manager.loaded_models() == []
manager.load_models_gpu([patcher])
del weights
assert patcher.model_size() == patcher.loaded_size() == patcher.partially_unload(cpu, 1e32) == 0
del patcher
gc.collect()
assert manager.loaded_models() == []
"""


def test_comfyui_s_memory_manager_loads_shrinks_and_unloads():
    script = MANAGED.format(comfyui=str(Path(COMFYUI).resolve()), root=str(ROOT))
    result = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr[-3000:]


def test_comfyui_makes_room_for_ours_and_for_others():
    """Other packs' models are evicted for ours, ours for theirs; and theirs again when memory runs out in our run."""
    script = [PYTHON, ROOT / "tests/comfyui_crowded.py", Path(COMFYUI).resolve(), ROOT]
    result = subprocess.run(script, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_video_is_saved_while_it_is_decoded(server, first_run):
    graph = quickstart()
    save, decode = (graph.pop(node(graph, name)) for name in ("WanFlowSaveVideo", "WanFlowVAEDecode"))
    del graph["frames"]
    inputs = {**decode["inputs"], **save["inputs"], "filename_prefix": "streamed/video"}
    inputs.pop("images")
    graph["both"] = {"class_type": "WanFlowDecodeAndSave", "inputs": inputs}
    run = server.run(graph)
    assert run.status == "execution_success", run.error
    (entry,) = run.outputs["both"]["images"]
    streamed = server.base / entry["type"] / entry["subfolder"] / entry["filename"]
    assert torch.equal(read_video(streamed)[0], read_video(saved_video(server, first_run))[0])
    assert max(step for id, step in run.steps if id == "both") == len(read_video(streamed)[0])


def test_gguf_files_are_listed_and_loaded(server, first_run):
    """ComfyUI itself lists no .gguf; the GGUF packs keep them in models/unet."""
    if subprocess.run([PYTHON, "-c", "import gguf"]).returncode:
        pytest.skip("this ComfyUI's interpreter lacks the package gguf")
    folder = server.base / "models/unet/mine"
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "wan")
    for name, tensor in load_file(ROOT / "wan_core/tiny/weights/diffusion_pytorch_model.safetensors").items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (spec, options) = server.ask("/object_info/WanFlowLoadModel")["WanFlowLoadModel"]["input"]["required"]["model"]
    assert "mine/tiny.gguf" in options["options"]
    graph = quickstart("gguf")
    graph[node(graph, "WanFlowLoadModel")]["inputs"]["model"] = "mine/tiny.gguf"
    run = server.run(graph)
    assert run.status == "execution_success", run.error
    shown = frames(server.base / "output/gguf") - frames(server.base / "output/first")
    assert abs(shown).max() <= 1


def test_a_model_is_downloaded_into_comfyuis_folder(server, hub, first_run):
    weights = (ROOT / "wan_core/tiny/weights/diffusion_pytorch_model.safetensors").read_bytes()
    hub.files["Org/Tiny"] = {"diffusion_pytorch_model.safetensors": weights}
    graph = quickstart("downloaded")
    loader = node(graph, "WanFlowLoadModel")
    graph[loader]["inputs"]["files"] = "Org/Tiny:diffusion_pytorch_model*.safetensors"
    run = server.run(graph)
    assert run.status == "execution_success", run.error
    assert (server.base / "models/Org/Tiny/diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert (loader, 10) in run.steps  # megabytes
    assert "Downloading Org/Tiny:diffusion_pytorch_model*.safetensors from ModelScope into" in server.log
    assert abs(frames(server.base / "output/downloaded") - frames(server.base / "output/first")).max() == 0
