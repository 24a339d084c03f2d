"""Workflows on disk: found by name, read, and changed by `--set NODE.INPUT=VALUE`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .validate import Workflow, WorkflowError, check_structure, choices, nearest

PACKAGE = Path(__file__).resolve().parents[2]
EXAMPLES = Path("example_workflows", "api")
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def add_workflow(to: argparse.ArgumentParser) -> None:
    """The arguments of commands that take a workflow."""
    to.add_argument("workflow", help="a file, or the name of a workflow that comes with WanFlow, such as quickstart")
    to.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", dest="settings",
                    help="replace a value; NODE is an id, a title or a node name (repeatable)")


def read_workflow(name: str) -> Workflow:
    """The workflow in a file or of a name, such as "quickstart"; WorkflowError when there is none."""
    path = find_workflow(name)
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorkflowError([f"{path} is not JSON ({error})."]) from error
    check_structure(workflow)
    return workflow


def find_workflow(name: str) -> Path:
    """The workflow's file: below the working directory, else among those installed with the package."""
    for root in (Path(), PACKAGE):
        for path in (root / name, root / f"{name}.json", root / EXAMPLES / name, root / EXAMPLES / f"{name}.json"):
            if path.is_file():
                return path
    known = sorted(path.stem for path in (PACKAGE / EXAMPLES).glob("*.json"))
    hint = f" Those that come with WanFlow: {', '.join(known)}." if known else ""
    raise WorkflowError([f"There is no workflow {name!r} in {Path.cwd()}{nearest(name, known)}.{hint}"])


def apply_settings(workflow: Workflow, settings: list[str], infos: dict[str, dict]) -> None:
    """Put each `NODE.INPUT=VALUE` into the workflow; WorkflowError with all that do not fit."""
    problems = []
    for setting in settings:
        try:
            apply_setting(workflow, setting, infos)
        except ValueError as error:
            problems.append(f"--set {setting}: {error}")
    if problems:
        raise WorkflowError(problems)


def apply_setting(workflow: Workflow, setting: str, infos: dict[str, dict]) -> None:
    target, equals, text = setting.partition("=")
    node_name, _, input_name = target.rpartition(".")
    if not (equals and node_name and input_name):
        raise ValueError("write NODE.INPUT=VALUE, such as 5.seed=7.")
    node = workflow[find_node(workflow, node_name)]
    groups = infos.get(node["class_type"], {}).get("input", {})
    spec = {**groups.get("required", {}), **groups.get("optional", {})}.get(input_name)
    node.setdefault("inputs", {})[input_name] = parse_value(text, spec)


def find_node(workflow: Workflow, name: str) -> str:
    """The id of the one node called `name`: by id, else by title or class."""
    if name in workflow:
        return name
    found = [id for id, node in workflow.items() if name in (node["class_type"], node.get("_meta", {}).get("title"))]
    if not found:
        known = ", ".join(f"{id} ({node['class_type']})" for id, node in workflow.items())
        raise ValueError(f"{name!r} is no node. There are {known}.")
    if len(found) > 1:
        raise ValueError(f"{name!r} is the name of the nodes {' and '.join(found)}; use an id.")
    return found[0]


def parse_value(text: str, spec: Any) -> Any:
    """The text as the input of an `/object_info` entry wants it; what does not fit is left for validation to report."""
    if spec is None or spec[0] in ("STRING", "INT", "FLOAT"):
        return text
    if spec[0] == "BOOLEAN":  # here, because validation takes every text for true, as ComfyUI does
        if text.lower() not in TRUTH:
            raise ValueError(f"{text!r} is neither true nor false.")
        return TRUTH[text.lower()]
    if choices(spec) is not None:
        return next((choice for choice in choices(spec) if str(choice) == text), text)
    try:
        return json.loads(text)  # a link, such as ["4", 0]
    except json.JSONDecodeError:
        return text
