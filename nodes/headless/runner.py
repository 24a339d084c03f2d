"""Runs a workflow node by node, and remembers results from one run to the next."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import torch

from ..host.schema import ComfyNode, Hidden, HiddenHolder, Schema
from ..host.standalone import Interrupted, StandaloneHost
from .validate import Checks, Workflow, WorkflowError, links, reached, validate

LOADERS = "WanFlow/loaders"  # the category of all nodes that may download something


class NodeError(RuntimeError):
    """A node failed; the cause is the exception it raised."""


@dataclass
class Result:
    """What one run did: by node id its outputs and what it showed, which nodes really ran, the files saved in order."""

    outputs: dict[str, tuple] = field(default_factory=dict)
    ui: dict[str, dict] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


class Runner:
    """Runs workflows made of the given node classes. Unchanged nodes keep their results between runs, as in ComfyUI."""

    def __init__(self, classes: Iterable[type[ComfyNode]], host: StandaloneHost):
        self.host = host
        known = [(node.GET_SCHEMA(), node) for node in classes]  # each call lists folders
        self.schemas = {schema.node_id: schema for schema, _ in known}
        self.classes = {schema.node_id: node for schema, node in known}
        self.cache: dict[str, tuple] = {}  # key -> outputs, of the last run's nodes

    def infos(self) -> dict[str, dict]:
        """The nodes as `/object_info` would list them; folders are read anew each time."""
        return {name: node.GET_NODE_INFO_V1() for name, node in self.classes.items()}

    def checks(self) -> Checks:
        """The nodes' own `validate_inputs`, each of which names exactly one input."""
        own = {name: getattr(node, "validate_inputs", None) for name, node in self.classes.items()}
        return {name: one_input_check(check) for name, check in own.items() if check}

    def run(self, workflow: Workflow) -> Result:
        """Validate and run. Raises WorkflowError, NodeError, or the host's Interrupted."""
        self.host.interrupted = False
        infos = self.infos()
        workflow = validate(workflow, infos, self.checks())
        sources = {id: [link[0] for link in links(workflow[id]).values()] for id in reached(workflow, infos)}
        order = list(TopologicalSorter(sources).static_order())
        outputs = {id for id in order if self.is_goal(workflow[id]["class_type"])}
        if self.host.team is not None:
            self.check_team(workflow, order, sources)
        with torch.inference_mode():
            keys = self.keys(workflow, order)
            self.cache = {key: self.cache[key] for key in keys.values() if key in self.cache}
            cached = {id for id in order if keys[id] in self.cache} - outputs
            return self.run_nodes(workflow, wanted(order, sources, outputs, cached), outputs, keys)

    def run_nodes(self, workflow: Workflow, order: list[str], outputs: set[str], keys: dict[str, str]) -> Result:
        result = Result()
        for id in order:
            if id in outputs or keys[id] not in self.cache:
                self.host.check_interrupted()
                self.cache[keys[id]], ui = self.execute(workflow, id, result.outputs)
                result.ran.append(id)
                if ui:
                    result.ui[id] = ui
                    result.files += self.saved_files(ui)
            result.outputs[id] = self.cache[keys[id]]
        return result

    def execute(self, workflow: Workflow, id: str, outputs: dict[str, tuple]) -> tuple[tuple, dict]:
        """Run one node; its outputs, and what it shows."""
        node = workflow[id]
        values = {name: outputs[link[0]][int(link[1])] for name, link in links(node).items()}
        node_class = self.prepared(workflow, id)
        name = self.schemas[node["class_type"]].display_name or node["class_type"]
        self.host.say(name)
        try:
            with self.turn(workflow, id):
                returned = node_class.execute(**{**node["inputs"], **values})
        except Interrupted:
            raise
        except Exception as error:
            raise NodeError(f"{name} (node {id}): {str(error) or type(error).__name__}") from error
        return returned.args, returned.ui or {}

    def is_goal(self, class_type: str) -> bool:
        """Whether nodes of this class are what a run is for: those that save or show something.

        Of several processes one saves; the others run for the nodes in which all work together.
        """
        if self.host.team is None or self.host.team.leads:
            return self.schemas[class_type].is_output_node
        return getattr(self.classes[class_type], "WORKS_TOGETHER", False)

    def check_team(self, workflow: Workflow, order: list[str], sources: dict[str, list[str]]) -> None:
        """Raises WorkflowError where several processes would save the same file: only what comes last is saved once."""
        shared = {id for id in order if getattr(self.classes[workflow[id]["class_type"]], "WORKS_TOGETHER", False)}
        problems = [
            f"node {id} ({workflow[id]['class_type']}) saves files, and Wan Sampler needs what it makes: several "
            "processes would save at once. Run this workflow without --processes."
            for id in wanted(order, sources, shared, set())
            if self.schemas[workflow[id]["class_type"]].is_output_node
        ]
        if problems:
            raise WorkflowError(problems)

    def turn(self, workflow: Workflow, id: str) -> AbstractContextManager:
        """Of several processes the first loads first: what has to be downloaded is then there for all."""
        class_type = workflow[id]["class_type"]
        if self.host.team is None or self.schemas[class_type].category != LOADERS:
            return nullcontext()
        return self.host.team.in_turn(f"{class_type} {id}")

    def prepared(self, workflow: Workflow, id: str) -> type[ComfyNode]:
        """The node's class as its `execute` sees it: a subclass that holds what the node asked of the host."""
        class_type = workflow[id]["class_type"]
        node_class = self.classes[class_type]
        offered = {Hidden.unique_id: id, Hidden.prompt: workflow}
        asked = {hidden.name: offered.get(hidden) for hidden in self.schemas[class_type].hidden}
        return type(node_class.__name__, (node_class,), {"hidden": HiddenHolder(**asked)})

    def keys(self, workflow: Workflow, order: list[str]) -> dict[str, str]:
        """For each node a hash of all that its result depends on: class, fingerprint, values, and the sources' keys."""
        keys: dict[str, str] = {}
        for id in order:
            node, linked = workflow[id], links(workflow[id])
            values = {name: None if name in linked else value for name, value in node["inputs"].items()}
            fingerprint = getattr(self.classes[node["class_type"]], "fingerprint_inputs", None)
            parts = [node["class_type"], fingerprint(**values) if fingerprint else None, values,
                     {name: [keys[link[0]], link[1]] for name, link in linked.items()},
                     id if depends_on_id(self.schemas[node["class_type"]]) else None]
            keys[id] = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        return keys

    def saved_files(self, ui: dict) -> list[Path]:
        """The files in the output folder that a node's `ui` names."""
        entries = [entry for value in ui.values() if isinstance(value, (list, tuple)) for entry in value]
        saved = [entry for entry in entries if isinstance(entry, dict) and entry.get("type") == "output"]
        return [self.host.output_dir() / entry["subfolder"] / entry["filename"] for entry in saved]


def wanted(order: list[str], sources: dict[str, list[str]], outputs: set[str], cached: set[str]) -> list[str]:
    """Of the nodes in order: the output nodes, and those whose result a running node needs."""
    needed = set(outputs)
    for id in reversed(order):
        if id in needed and id not in cached:
            needed.update(sources[id])
    return [id for id in order if id in needed]


def depends_on_id(schema: Schema) -> bool:
    """Whether two equal nodes of a workflow may give different results."""
    return schema.not_idempotent or Hidden.unique_id in schema.hidden


def one_input_check(check: Callable) -> dict[str, Callable[[Any], bool | str]]:
    """`{the one input it names: the check as a function of the value}`."""
    names = list(inspect.signature(check).parameters)
    if len(names) != 1:
        raise TypeError(f"{check.__qualname__} must name exactly one input, not {names}.")
    return {names[0]: lambda value: check(**{names[0]: value})}
