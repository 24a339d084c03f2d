"""Everything that is wrong with a workflow is said at once, before anything runs."""

import copy
import json
import math
from pathlib import Path

import fake_nodes
import pytest
from comfyui_wanflow.nodes.headless import core_nodes
from comfyui_wanflow.nodes.headless.validate import WorkflowError, types_match, validate

INFOS = {
    node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in [*fake_nodes.NODES, *core_nodes.NODES]
}


def problems(workflow, **more):
    with pytest.raises(WorkflowError) as caught:
        validate(workflow, INFOS, **more)
    return caught.value.problems


def changed(node, **inputs):
    workflow = fake_nodes.workflow()
    workflow[node]["inputs"].update(inputs)
    return workflow


def without(node, name):
    workflow = fake_nodes.workflow()
    del workflow[node]["inputs"][name]
    return workflow


def test_a_good_workflow_passes_and_is_not_touched():
    workflow = fake_nodes.workflow(seed="42", steps=3.0, cfg=2)
    before = copy.deepcopy(workflow)
    inputs = validate(workflow, INFOS)["2"]["inputs"]
    assert workflow == before
    assert (inputs["seed"], inputs["steps"], inputs["cfg"]) == (42, 3, 2.0)
    assert isinstance(inputs["steps"], int) and isinstance(inputs["cfg"], float)


@pytest.mark.parametrize("workflow, expected", [
    ({"1": {"class_type": "FakeModle", "inputs": {}}}, "no such node (did you mean 'FakeModel'?)"),
    (without("2", "seed"), "the input 'seed' is missing; it takes INT from 0 to 18446744073709551615"),
    (without("2", "model"), "the input 'model' is missing; it takes WAN_MODEL"),
    (changed("2", stepps=3), "no input 'stepps' (did you mean 'steps'?)"),
    (changed("2", steps=0), "'steps' is 0; it takes INT from 1 to 100"),
    (changed("2", cfg=math.nan), "'cfg' is nan; it takes FLOAT from 0.0 to 30.0"),
    (changed("2", cfg=31), "'cfg' is 31.0"),
    (changed("2", steps="many"), "'steps' is 'many', which is no INT"),
    (changed("2", steps=None), "'steps' is None, which is no INT"),
    (changed("1", model="Tiny"), "'model' is 'Tiny' (did you mean 'tiny'?); it takes one of: tiny, large"),
    (changed("2", model="tiny"), "'model' is the value 'tiny', but it takes a link to WAN_MODEL"),
    (changed("3", latent=["1", 0]), "'latent' takes LATENT, but output 0 of node 1 (FakeModel) is WAN_MODEL"),
    (changed("3", latent=["2", 1]), "linked to output 1 of node 2 (FakeSampler), which has only: 0 (LATENT)"),
    (changed("3", latent=["2", -1]), "linked to output -1"),
    (changed("3", latent=["9", 0]), "linked to node 9, which is not in the workflow"),
    (changed("3", latent=[2, 0]), "bad link, [2, 0]"),
    (changed("3", latent=["2", 0, 0]), "bad link"),
    (changed("3", latent=[]), "bad link"),
    (changed("2", latent=["2", 0]), "wait for each other: node 2 (FakeSampler) -> node 2 (FakeSampler)"),
    ({"1": {"class_type": "FakeModel", "inputs": {"model": "tiny"}}}, "no output node"),
    ({}, "no output node"),
    ({"1": {"inputs": {}}}, 'Node 1 has no "class_type"'),
    ({"1": "FakeModel"}, 'Node 1 has no "class_type"'),
    ({"1": {"class_type": "FakeModel", "inputs": []}}, 'its "inputs" must be'),
    ([], "not a list"),
    ({"nodes": [], "links": []}, "Export (API)"),
])
def test_each_mistake_has_its_sentence(workflow, expected):
    assert any(expected in problem for problem in problems(workflow)), problems(workflow)


def test_all_mistakes_are_reported_together():
    workflow = fake_nodes.workflow(seed=-1, steps="x", unknown=1)
    workflow["3"]["inputs"]["latent"] = ["1", 0]
    workflow["5"]["class_type"] = "FakeSaver"
    del workflow["4"]["inputs"]["filename_prefix"]
    workflow["6"] = {"class_type": "FakeSampler", "inputs": {"model": ["6", 0], "latent": ["6", 0]}}
    text = "\n".join(problems(workflow))
    for part in ("FakeSaver", "'latent' takes LATENT", "filename_prefix", "wait for each other"):
        assert part in text
    workflow["3"]["inputs"]["latent"] = ["2", 0]
    text = "\n".join(problems(workflow))
    for part in ("'seed' is -1", "'steps' is 'x'", "no input 'unknown'"):
        assert part in text


def test_two_cycles_are_both_named():
    sampler = {"seed": 0, "steps": 1, "cfg": 1.0, "merge": False}
    workflow = {
        "a": {"class_type": "FakeSampler", "inputs": {**sampler, "model": ["m", 0], "latent": ["b", 0]}},
        "b": {"class_type": "FakeSampler", "inputs": {**sampler, "model": ["m", 0], "latent": ["a", 0]}},
        "c": {"class_type": "FakeSampler", "inputs": {**sampler, "model": ["m", 0], "latent": ["c", 0]}},
        "m": {"class_type": "FakeModel", "inputs": {"model": "tiny"}},
        "s": {"class_type": "SaveLatent", "inputs": {"samples": ["a", 0], "filename_prefix": "x"}},
        "t": {"class_type": "SaveLatent", "inputs": {"samples": ["c", 0], "filename_prefix": "x"}},
    }
    assert len(problems(workflow)) == 2


def test_nodes_that_no_output_needs_may_be_unfinished_as_in_comfyui():
    workflow = fake_nodes.workflow()
    workflow["6"] = {"class_type": "FakeSampler", "inputs": {}}
    validate(workflow, INFOS)
    workflow["7"] = {"class_type": "Missing", "inputs": {}}
    assert len(problems(workflow)) == 1


def test_front_end_leftovers_are_dropped():
    workflow = changed("1", **{"upload": "image", "video-preview": "", "audioUI": "", "$$canvas": {}})
    assert validate(workflow, INFOS)["1"]["inputs"] == {"model": "tiny"}


def test_names_from_windows_are_found():
    infos = {**INFOS, "FakeModel": json.loads(json.dumps(INFOS["FakeModel"]).replace("tiny", "wan/tiny"))}
    assert validate(changed("1", model="wan\\tiny"), infos)["1"]["inputs"]["model"] == "wan/tiny"


def test_a_wrapped_list_is_a_value():
    workflow = changed("5", text={"__value__": ["a", 0]})
    assert validate(workflow, INFOS)["5"]["inputs"]["text"] == "['a', 0]"


def test_a_node_s_own_check_replaces_range_and_choices():
    checks = {"FakeModel": {"model": lambda value: value == "huge" or f"{value} is not huge."}}
    assert validate(changed("1", model="huge"), INFOS, checks)["1"]["inputs"]["model"] == "huge"
    assert any("'model': tiny is not huge." in text for text in problems(fake_nodes.workflow(), checks=checks))


@pytest.mark.parametrize("given, wanted, fits", [
    ("IMAGE", "IMAGE", True), ("IMAGE", "MASK", False), ("IMAGE", "MASK,IMAGE", True), ("WAN_VAE", "VAE", False),
    ("VAE", "WAN_VAE, VAE", True), ("*", "IMAGE", True), ("IMAGE", "*", True), (["a"], "COMBO", True),
])
def test_types_match_as_in_comfyui(given, wanted, fits):
    assert types_match(given, wanted) is fits


def test_recorded_object_info_drives_it():
    recorded = json.loads((Path(__file__).parent / "data" / "schema_example.json").read_text())
    infos = {**INFOS, "Example": recorded}
    with pytest.raises(WorkflowError) as caught:
        validate({"1": {"class_type": "Example", "inputs": {"scheduler": "eular", "tiled": True, "image": 3}}}, infos)
    text = str(caught.value)
    assert "'scheduler' is 'eular' (did you mean 'euler'?)" in text
    assert "the input 'vae' is missing; it takes WAN_VAE,VAE" in text
    assert "'image' is the value 3" in text
