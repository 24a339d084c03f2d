"""The stand-in for ComfyUI's `io` says what ComfyUI says, and refuses what old ComfyUIs lack."""

import json
import sys
from pathlib import Path

import pytest
from comfyui_wanflow.nodes.host import ComfyExtension, io
from schema_example import example_node

RECORDED = json.loads((Path(__file__).parent / "data" / "schema_example.json").read_text())


def test_object_info_equals_comfyui_s():
    info = json.loads(json.dumps(example_node(io).GET_NODE_INFO_V1()))
    assert info == RECORDED
    assert info["input_order"] == RECORDED["input_order"]


def test_the_stand_in_is_used_outside_comfyui():
    assert "folder_paths" not in sys.modules
    assert io.__name__ == "comfyui_wanflow.nodes.host.schema"
    assert hasattr(ComfyExtension, "get_node_list")


@pytest.mark.parametrize("make", [
    lambda: io.Int.Input("steps", advanced=True),
    lambda: io.Int.Input("steps", extra_dict={}),
    lambda: io.Float.Input("cfg", control_after_generate=True),
    lambda: io.Float.Input("cfg", lazy=True),
    lambda: io.String.Input("text", "Text"),
    lambda: io.Image.Input("image", default=0),
    lambda: io.Image.Output("image"),
    lambda: io.Image.Output(id="image"),
    lambda: io.Image.Output(is_output_list=True),
    lambda: io.Combo.Input("size", options=[], multiselect=True),
    lambda: io.Schema(node_id="X", search_aliases=["y"]),
    lambda: io.Schema("X"),
    lambda: io.NodeOutput(1, expand={}),
])
def test_what_old_comfyuis_or_our_runner_lack_is_refused(make):
    with pytest.raises(TypeError):
        make()


def test_input_ids_are_unique():
    with pytest.raises(ValueError, match="steps"):
        io.Schema(node_id="X", inputs=[io.Int.Input("steps"), io.Float.Input("steps")])


def test_an_output_node_is_told_the_graph():
    schema = io.Schema(node_id="X", is_output_node=True)
    assert schema.hidden == [io.Hidden.prompt, io.Hidden.extra_pnginfo]


def test_hidden_values_nobody_asked_for_are_none():
    assert example_node(io).hidden.prompt is None
