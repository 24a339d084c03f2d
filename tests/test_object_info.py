"""Every node says outside ComfyUI what a real ComfyUI 0.3.64 says of it (recorded by test_comfyui.py)."""

import json
from pathlib import Path

import pytest
from comfyui_wanflow.nodes import node_classes
from comfyui_wanflow.nodes.host import host

RECORDED = json.loads((Path(__file__).parent / "data/object_info.json").read_text())
CLASSES = {node.GET_SCHEMA().node_id: node for node in node_classes()}


def test_these_are_the_nodes():
    assert CLASSES.keys() == RECORDED.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_the_stand_in_says_what_comfyui_says(name, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "models_dir", tmp_path)  # no files of this machine in the lists of choices
    monkeypatch.setattr(host, "input_directory", tmp_path)
    info = json.loads(json.dumps(CLASSES[name].GET_NODE_INFO_V1()))
    info.pop("python_module")
    assert info == RECORDED[name]
    assert [*info["input_order"].values()] == [[*group] for group in RECORDED[name]["input"].values()]
