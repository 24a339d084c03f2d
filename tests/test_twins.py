"""`wanflow run --tiny`: every workflow has a twin for the toys, or says why not."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from comfyui_wanflow.example_workflows.build import workflows
from comfyui_wanflow.example_workflows.gallery import COLUMNS, ROWS, Exhibit, contact_sheet, moving_picture
from comfyui_wanflow.nodes import node_classes
from comfyui_wanflow.nodes.headless import core_nodes
from comfyui_wanflow.nodes.headless.cli import main
from comfyui_wanflow.nodes.headless.runner import Runner
from comfyui_wanflow.nodes.headless.toys import CAPTIONS, DISTILLED, PICTURES, SETTINGS, UNSEEN
from comfyui_wanflow.nodes.headless.twin import toy_called, toy_for, twin
from comfyui_wanflow.nodes.headless.validate import WorkflowError, is_link, validate
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.wan_core.loading.catalog import LORAS
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.tiny import world
from comfyui_wanflow.wan_core.video import read_graphs, read_video
from safetensors.torch import save_file

EXAMPLES = workflows()
RUNNER = Runner([*node_classes(), *core_nodes.NODES], host)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Empty ones."""
    for name in ("models_dir", "input_directory", "output_directory"):
        monkeypatch.setattr(host, name, tmp_path / name)
    monkeypatch.setattr(host, "quiet", False)


def graph(workflow):
    """The nodes and their links, without the values."""
    links = [(id, name, *value) for id, node in workflow.items() for name, value in node["inputs"].items()
             if is_link(value)]  # fmt: skip
    return {id: node["class_type"] for id, node in workflow.items()}, links


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_s_twin_is_the_same_graph_for_the_toys(name):
    made = twin(EXAMPLES[name])
    assert graph(made) == graph(EXAMPLES[name])
    validate(made, RUNNER.infos(), RUNNER.checks())
    for node in made.values():
        for key in ("model", "module", "text_encoder", "vae", "image_encoder"):
            if isinstance(node["inputs"].get(key), str):
                assert node["inputs"][key].startswith("WanTiny-")
        for key in ("image", "video"):
            assert str(node["inputs"].get(key, "tiny/")).startswith("tiny/") or is_link(node["inputs"][key])
    assert made["6"]["inputs"] == {"width": 64, "height": 64, "num_frames": 17, "batch_size": 1}
    assert is_link(made["7"]["inputs"]["steps"]) or made["7"]["inputs"]["steps"] <= 20
    assert made["9"]["inputs"]["filename_prefix"].endswith("-tiny")


@pytest.mark.parametrize("name, cfg", [("Wan2.1-T2V-14B", 6), ("Wan2.1-1.3b-speedcontrol-v1", 6),
                                       ("Wan2.1-I2V-14B-480P", 1), ("Wan2.1-VACE-14B", 1)])  # fmt: skip
def test_guidance_is_as_strong_as_the_toy_needs_it(name, cfg):
    assert twin(EXAMPLES[name])["7"]["inputs"]["cfg"] == cfg


@pytest.mark.parametrize("name, toy", [
    ("Wan2.1-T2V-14B", "T2V"),
    ("wan2.1_t2v_1.3B_fp16.safetensors", "T2V"),
    ("Wan2_1-I2V-14B-480P_fp8_e4m3fn.safetensors", "I2V"),
    ("Wan2.1-FLF2V-14B-720P", "FLF2V"),
    ("Wan2.1-Fun-V1.1-14B-InP", "Fun-InP"),
    ("wan2.1_fun_inp_1.3B_bf16.safetensors", "Fun-InP"),
    ("Wan2.1-Fun-14B-Control", "Fun-Control"),
    ("Wan2.1-Fun-V1.1-1.3B-Control", "Fun-V1.1-Control"),
    ("Wan2.1-Fun-V1.1-1.3B-Control-Camera", "Fun-V1.1-Control-Camera"),
    ("VACE-Wan2.1-1.3B-Preview", "VACE"),
    ("Wan2_1-VACE_module_14B_bf16.safetensors", "VACE"),
    ("Wan2.1-1.3b-speedcontrol-v1", "speedcontrol"),
    ("my_merge.safetensors", None),
])  # fmt: skip
def test_a_model_s_name_tells_its_toy(name, toy):
    assert toy_called(name) == (toy and f"WanTiny-{toy}")


def test_files_go_before_the_choice_above_them():
    files = "models/PAI/Wan2.1-Fun-14B-Control/part-1.safetensors\nmodels/PAI/Wan2.1-Fun-14B-Control/part-2.safetensors"
    assert toy_for({"model": "Wan2.1-T2V-14B", "files": files}, "model", "dit") == "WanTiny-Fun-Control"


def test_a_name_that_does_not_tell_is_looked_into(tmp_path):
    layout = DiTLayout(dim=128, ffn_dim=8, layers=1, heads=1, in_dim=36, text_dim=8, image_tokens=True)
    file = tmp_path / "mine.safetensors"
    save_file({name: torch.zeros_like(x) for name, x in DiT(layout).state_dict().items()}, file)
    assert toy_for({"files": str(file)}, "model", "dit") == "WanTiny-Fun-InP"


def test_what_has_no_twin_is_told_all_at_once():
    workflow = EXAMPLES["Wan2.1-T2V-1.3B"] | {"20": node("LoadLatent", latent="mine.latent"),
                                              "21": node("WanFlowLoadModel", model="my_merge.safetensors")}  # fmt: skip
    with pytest.raises(WorkflowError) as error:
        twin(workflow)
    first, second = error.value.problems
    assert first.startswith("Node 20 (LoadLatent) has no twin: it reads what a published VAE has encoded.")
    assert second.startswith("Node 21 (WanFlowLoadModel) has no twin: There is no file 'my_merge.safetensors'")


def test_what_was_given_stays_as_it_is():
    before = json.dumps(EXAMPLES)
    twin(EXAMPLES["Wan2.1-T2V-14B"])
    assert json.dumps(EXAMPLES) == before


def test_linked_numbers_become_the_toys_or_stay_linked():
    workflow = {
        "1": node("PrimitiveInt", value=81),
        "2": node("WanFlowEmptyLatent", width=832, height=480, num_frames=["1", 0], batch_size=1),
        "3": node("WanFlowSampler", steps=["1", 0], cfg=1.0, shift=["1", 0]),
    }
    made = twin(workflow)
    assert made["2"]["inputs"]["num_frames"] == 17
    assert made["3"]["inputs"] == workflow["3"]["inputs"]


def test_a_lora_is_left_out_unless_it_makes_few_steps_do(capsys):
    workflow = {"1": node("WanFlowApplyLora", lora_name="style.safetensors"),
                "2": node("WanFlowApplyLora", lora_name="more.safetensors"),
                "3": node("WanFlowSampler", cfg=5.0)}  # fmt: skip
    assert [twin(workflow)[id]["inputs"]["lora_name"] for id in "12"] == ["none", "none"]
    assert "In the place of the LoRA style.safetensors is none." in capsys.readouterr().err
    workflow["3"]["inputs"]["cfg"] = 1.0
    assert [twin(workflow)[id]["inputs"]["lora_name"] for id in "12"] == [DISTILLED, "none"]
    assert DISTILLED in LORAS


def test_captions_say_what_the_toys_know():
    for caption in {*CAPTIONS.values(), UNSEEN.caption}:
        words = set(caption.split())
        known = {*world.COLORS, *world.SHAPES, *world.DIRECTIONS, "a", "moves", "on", "background"}
        assert words <= known
    assert world.is_held_out(UNSEEN.words)


def test_the_table_names_nodes_and_inputs_that_exist():
    infos = RUNNER.infos()
    for kind, name in [*PICTURES, *CAPTIONS, *((kind, name) for kind, values in SETTINGS.items() for name in values)]:
        groups = infos[kind]["input"]
        assert name in {**groups["required"], **groups.get("optional", {})}, (kind, name)


def test_the_mask_is_the_same_however_it_is_loaded():
    _, by_alpha = core_nodes.LoadImage.execute(image="tiny/mask.webp").args
    for channel in ("red", "alpha"):
        (mask,) = core_nodes.LoadImageMask.execute(image="tiny/mask.webp", channel=channel).args
        assert torch.equal(mask, by_alpha) and 0.2 < mask.mean() < 0.8


def test_the_command_runs_the_twin_with_what_is_set(tmp_path, capsys):
    text = "a blue square moves up on a white background"
    settings = ["--set", "7.steps=1", "--set", f"4.text={text}"]
    assert main(["run", "Wan2.1-T2V-14B", "--tiny", "--output-dir", str(tmp_path), *settings]) == 0
    printed = capsys.readouterr()
    (path,) = map(Path, printed.out.splitlines())
    assert path == tmp_path / "WanFlow" / "Wan2.1-T2V-14B-tiny_00001_.mp4"
    assert f"The twin in the toy world: {UNSEEN.caption}" in printed.err
    assert read_video(path)[0].shape == (17, 64, 64, 3)
    prompt = read_graphs(path)["prompt"]
    assert (prompt["1"]["inputs"]["model"], prompt["4"]["inputs"]["text"]) == ("WanTiny-T2V", text)


def test_the_command_tells_what_has_no_twin(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps({"1": node("LoadLatent", latent="mine.latent")}))
    assert main(["run", str(tmp_path / "mine.json"), "--tiny"]) == 2
    assert "Node 1 (LoadLatent) has no twin" in capsys.readouterr().err


def test_help_tells_of_it(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "--tiny" in capsys.readouterr().out


def test_twins_are_shown_with_what_they_are_made_of():
    video = numpy.linspace(0, 1, 17, dtype=numpy.float32)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)
    shown = [Exhibit([name], twin(workflow), video) for name, workflow in EXAMPLES.items()]
    by_name = {exhibit.names[0]: exhibit for exhibit in shown}
    assert list(by_name["Wan2.1-VACE-14B-edit"].pictures) == ["Video to Change", "Mask"]
    assert by_name["Wan2.1-Fun-V1.1-14B-Control-Camera"].facts == ["Camera: Left"]
    assert contact_sheet(shown).height > 100 * len(shown)
    stills = moving_picture(shown[: COLUMNS * ROWS])
    assert len(stills) == 17 and stills[0].getpixel((50, 50)) == (0, 0, 0) != stills[-1].getpixel((50, 50))
