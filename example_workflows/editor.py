"""An API-format workflow as ComfyUI's editor stores it: with positions, sockets and wires."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..nodes import node_classes
from ..nodes.headless.core_nodes import NODES as CORE_NODES

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
COLUMN, GAP, WIDTH = 400, 60, 340  # of the layout, pixels
PREVIEW = 250  # the upload button, and the picture below it


@cache
def node_infos() -> dict[str, dict[str, Any]]:
    """What `/object_info` says of each node."""
    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in (*node_classes(), *CORE_NODES)}


def editor_graph(workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow as ComfyUI's editor stores it."""
    infos = node_infos()
    depths = {id: depth(workflow, id) for id in workflow}
    heights = dict.fromkeys(depths.values(), GAP)
    nodes, links = [], []
    for order, (id, entry) in enumerate(sorted(workflow.items(), key=lambda item: depths[item[0]])):
        info = infos[entry["class_type"]]
        drawn = editor_node(int(id), order, entry, info)
        drawn["pos"] = [GAP + COLUMN * depths[id], heights[depths[id]]]
        heights[depths[id]] += drawn["size"][1] + GAP
        nodes.append(drawn)
    by_id = {drawn["id"]: drawn for drawn in nodes}
    for drawn in nodes:
        for slot, socket in enumerate(drawn["inputs"]):
            value = workflow[str(drawn["id"])]["inputs"].get(socket["name"])
            if isinstance(value, list):
                source = by_id[int(value[0])]["outputs"][value[1]]
                socket["link"] = len(links) + 1
                source["links"].append(socket["link"])
                links.append([socket["link"], int(value[0]), value[1], drawn["id"], slot, source["type"]])
    return {
        "last_node_id": max(by_id), "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [],
        "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def editor_node(id: int, order: int, entry: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """One node, not yet placed or wired. Widget values are stored by position: required inputs, then optional ones."""
    inputs = {name: spec for group in ("required", "optional") for name, spec in info["input"].get(group, {}).items()}
    sockets, values, height = [], [], 40
    for name, (kind, options) in inputs.items():
        socket = {"name": name, "type": kind, "link": None}
        height += 24
        if kind in WIDGETS:
            socket["widget"] = {"name": name}
            values.append(entry["inputs"].get(name, options.get("default")))
            if options.get("control_after_generate"):
                values.append("fixed")
            height += 80 if options.get("multiline") else 0
            height += PREVIEW if options.get("image_upload") or options.get("video_upload") else 0
        sockets.append(socket)
    pairs = zip(info["output_name"], info["output"], strict=True)
    outputs = [{"name": name, "type": kind, "links": []} for name, kind in pairs]
    return {
        "id": id, "type": entry["class_type"], "title": entry["_meta"]["title"], "size": [WIDTH, height], "flags": {},
        "order": order, "mode": 0, "inputs": sockets, "outputs": outputs,
        "properties": {"Node name for S&R": entry["class_type"]}, "widgets_values": values,
    }  # fmt: skip


def depth(workflow: dict[str, Any], id: str) -> int:
    """The longest way from a node without inputs, in wires."""
    sources = [value[0] for value in workflow[id]["inputs"].values() if isinstance(value, list)]
    return 1 + max((depth(workflow, source) for source in sources), default=-1)
