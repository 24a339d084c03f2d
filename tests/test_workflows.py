"""The example workflows: one for each model in the catalog, complete with inputs, the same in both formats."""

import json
from pathlib import Path

import numpy
import pytest
from comfyui_wanflow.example_workflows import pink
from comfyui_wanflow.example_workflows.build import cards, files
from comfyui_wanflow.example_workflows.inputs import FOLDER as INPUTS
from comfyui_wanflow.example_workflows.inputs import inputs, tiny_inputs, training_clips
from comfyui_wanflow.nodes import node_classes
from comfyui_wanflow.nodes.headless import core_nodes
from comfyui_wanflow.nodes.headless.runner import Runner
from comfyui_wanflow.nodes.headless.validate import is_link, validate
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.loading.catalog import BY_NAME, PUBLISHED
from comfyui_wanflow.wan_core.video import read_video
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "example_workflows"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
RUNNER = Runner([*node_classes(), *core_nodes.NODES], host)
NODES_OF_ADAPTERS = {
    "image": "WanFlowImageToVideo",
    "control": "WanFlowControlVideo",
    "reference": "WanFlowReferenceImage",
    "camera": "WanFlowCamera",
    "vace": "WanFlowVACE",
    "speed": "WanFlowMotionSpeed",
}


def read(*path):
    return json.loads(EXAMPLES.joinpath(*path).read_text(encoding="utf-8"))


def the(workflow, kind):
    """The inputs of the one node of a kind."""
    (node,) = [node for node in workflow.values() if node["class_type"] == kind]
    return node["inputs"]


def test_the_files_are_what_build_writes():
    built = files()
    for path, text in built.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run example_workflows/build.py"
    assert set(built) == {*EXAMPLES.rglob("*.json"), ROOT / "README.md", ROOT / "README_zh.md"}
    for page in ("README.md", "README_zh.md"):  # the table of models is there
        assert "| WanTiny-T2V " in built[ROOT / page]
        assert all(f"{row.name} |" in built[ROOT / page] for row in PUBLISHED)


def test_the_inputs_are_what_is_drawn():
    """Pictures to the pixel; of videos, which lose a little, every frame."""
    drawn, table = inputs() | training_clips() | tiny_inputs(), INPUTS / pink.FOLDER / pink.TABLE
    files = {path for path in INPUTS.rglob("*") if path.is_file()}
    assert {INPUTS / name for name in drawn} | {table} == files
    assert table.read_text(encoding="utf-8") == pink.table(pink.clips())
    for name, frames in drawn.items():
        if name.endswith((".png", ".webp")):
            with Image.open(INPUTS / name) as picture:
                for number, frame in enumerate(frames):
                    picture.seek(number)
                    found = numpy.array(picture.convert("RGBA"))[..., : frame.shape[-1]]
                    assert numpy.array_equal(found, (frame * 255).round()), name
        else:
            found, _ = read_video(INPUTS / name)
            assert found.shape == frames.shape
            assert numpy.abs(found.numpy() - frames).mean(axis=(1, 2, 3)).max() < 0.02, name
        assert (INPUTS / name).stat().st_size < 25_000


def test_the_pictures_are_what_is_drawn():
    drawn = cards()
    assert {path.stem for path in drawn} == set(NAMES) - {"quickstart"}
    assert set(EXAMPLES.glob("*.jpg")) - {EXAMPLES / "quickstart.jpg"} == set(drawn)
    for path, card in drawn.items():
        with Image.open(path) as picture:
            difference = numpy.array(picture).astype(float) - numpy.array(card)
        assert abs(difference).mean() < 4, path.name  # JPEG loses a little, and fonts differ a little


def test_every_model_has_an_example_that_shows_its_settings():
    for name, row in {"quickstart": BY_NAME["WanTiny-T2V"], **{row.name: row for row in PUBLISHED}}.items():
        workflow = read("api", f"{name}.json")
        preset, sampler = row.preset, the(workflow, "WanFlowSampler")
        size = the(workflow, "WanFlowEmptyLatent")
        assert (size["width"], size["height"], size["num_frames"]) == (preset.width, preset.height, preset.num_frames)
        assert (sampler["steps"], sampler["shift"], sampler["cfg"]) == (preset.steps, preset.shift, preset.cfg)
        assert workflow[sampler["negative"][0]]["inputs"]["text"] == preset.negative_prompt
        assert the(workflow, "WanFlowSaveVideo")["frame_rate"] == preset.fps
        loaded = the(workflow, "WanFlowLoadModel")["model"]
        assert BY_NAME[loaded].files["dit"] == row.files["dit"]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_an_example_gives_the_model_what_it_takes(row):
    workflow = read("api", f"{row.name}.json")
    wanted = {NODES_OF_ADAPTERS[adapter] for adapter in row.adapters if adapter in NODES_OF_ADAPTERS}
    if "control" in row.adapters:
        wanted.discard("WanFlowImageToVideo")  # a control model can begin with an image, but need not
    assert {node["class_type"] for node in workflow.values()} & set(NODES_OF_ADAPTERS.values()) == wanted
    if "last_image" in row.adapters:
        assert {"start_image", "end_image", "image_encoder"} <= set(the(workflow, "WanFlowImageToVideo"))


def test_vace_and_video_to_video_are_shown_in_their_ways():
    for model in (row.name for row in PUBLISHED if "vace" in row.adapters):
        ways = [set(the(read("api", f"{model}{end}.json"), "WanFlowVACE")) for end in ("", "-edit", "-reference")]
        given = [way & {"video", "mask", "reference_image"} for way in ways]
        assert given == [{"video", "reference_image"}, {"video", "mask"}, {"reference_image"}]
    workflow = read("api", "video_to_video.json")
    sampler = the(workflow, "WanFlowSampler")
    assert workflow[sampler["latent"][0]]["class_type"] == "WanFlowVAEEncode" and sampler["denoise"] < 1


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_valid_with_the_inputs_that_come_with_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "input_directory", tmp_path)  # empty
    validate(read("api", f"{name}.json"), RUNNER.infos(), RUNNER.checks())


def test_the_users_file_goes_before_the_one_that_comes_with_an_example(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "input_directory", tmp_path)
    assert host.input_path("toy_mask.png") == INPUTS / "toy_mask.png"
    (tmp_path / "toy_mask.png").touch()
    assert host.input_path("toy_mask.png") == tmp_path / "toy_mask.png"


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_say_the_same(name):
    """The editor's graph, turned into API format as the front end does it, is the API file."""
    graph, infos = read(f"{name}.json"), RUNNER.infos()
    sources = {link: [str(source), slot] for link, source, slot, *_ in graph["links"]}
    turned = {}
    for node in graph["nodes"]:
        values, inputs = list(node["widgets_values"]), {}
        for socket in node["inputs"]:
            if "widget" in socket:
                inputs[socket["name"]] = values.pop(0)
                if socket["name"] == "seed":
                    assert values.pop(0) == "fixed"  # what the front end adds after a seed
            elif socket["link"] is not None:
                inputs[socket["name"]] = sources[socket["link"]]
        assert not values
        turned[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": node["title"]}}
    assert set(turned) == set(read("api", f"{name}.json"))
    for id, node in read("api", f"{name}.json").items():
        known = infos[node["class_type"]]["input"].get("optional", {})
        defaults = {name: spec[1]["default"] for name, spec in known.items() if "default" in spec[1]}
        assert turned[id] == node | {"inputs": defaults | node["inputs"]}


@pytest.mark.parametrize("name", NAMES)
def test_the_editors_wires_hang_together(name):
    graph = read(f"{name}.json")
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, source, slot, target, target_slot, kind in graph["links"]:
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[source]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][target_slot]["link"] == link
    links = sum(is_link(value) for node in read("api", f"{name}.json").values() for value in node["inputs"].values())
    assert len(graph["links"]) == links == graph["last_link_id"]
    boxes = [(*node["pos"], *node["size"]) for node in graph["nodes"]]
    for x, y, width, height in boxes:  # no node lies on another
        assert not [b for b in boxes if x < b[0] + b[2] and b[0] < x + width and y < b[1] + b[3] and b[1] < y + height
                    and b != (x, y, width, height)]
