"""Everything that is wrong with a workflow, found before anything runs.

A workflow is ComfyUI's API format, `{node id: {"class_type": name, "inputs": {name: value | [node id, slot]}}}`. Nodes
are known by their `/object_info` entries only, so a recording of a real ComfyUI serves as well as our own classes.
Values are coerced and types compared as ComfyUI's `execution.py` does; unlike ComfyUI this goes on after a mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from typing import Any

Workflow = dict[str, dict[str, Any]]
NodeInfos = Mapping[str, Mapping[str, Any]]
Checks = Mapping[str, Mapping[str, Callable[[Any], "bool | str"]]]  # class -> input -> True, or what is wrong

FRONT_END_LEFTOVERS = {"video-preview", "upload", "audioUI"}  # widgets that carry no value; "$$…" are such too
CONVERSIONS: dict[str, Callable[[Any], Any]] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


class WorkflowError(ValueError):
    """The workflow cannot run. `problems` holds one sentence for each thing that is wrong."""

    def __init__(self, problems: list[str]):
        self.problems = [problem[:1].upper() + problem[1:] for problem in problems]
        super().__init__("\n".join(self.problems))


def validate(workflow: Workflow, infos: NodeInfos, checks: Checks | None = None) -> Workflow:
    """A copy of the workflow with coerced values and without front-end leftovers.

    `checks` are the nodes' own `validate_inputs`; for the input they name they replace the test of range and choices.
    Raises WorkflowError with everything that is wrong.
    """
    check_structure(workflow)
    problems = []
    workflow = {id: node | {"inputs": dict(node.get("inputs", {}))} for id, node in workflow.items()}
    for id, node in workflow.items():
        if node["class_type"] not in infos:
            hint = nearest(node["class_type"], infos)
            problems.append(f"{title(workflow, id)}: there is no such node{hint}. `wanflow nodes` lists all of them.")
    if not any(is_output(node, infos) for node in workflow.values()):
        problems.append("The workflow has no output node, so nothing would be made. Add one, such as Save Wan Video.")
    for id in reached(workflow, infos):
        if workflow[id]["class_type"] in infos:
            problems += [f"{title(workflow, id)}: {text}" for text in node_problems(workflow, id, infos, checks or {})]
    for cycle in cycles(workflow):
        path = " -> ".join(title(workflow, id) for id in cycle)
        problems.append(f"These nodes wait for each other: {path}. Cut one of the links.")
    if problems:
        raise WorkflowError(problems)
    return workflow


def check_structure(workflow: Any) -> None:
    """Raises WorkflowError for what is not in API format at all."""
    problems = list(structure_problems(workflow))
    if problems:
        raise WorkflowError(problems)


def structure_problems(workflow: Any) -> Iterator[str]:
    """What keeps the rest from being looked at."""
    if not isinstance(workflow, dict):
        yield f"A workflow is a JSON object of nodes, not a {type(workflow).__name__}."
    elif isinstance(workflow.get("nodes"), list):
        yield "This is the editor's format. In ComfyUI choose Workflow > Export (API) and run that file."
    else:
        for id, node in workflow.items():
            if not (isinstance(node, dict) and isinstance(node.get("class_type"), str)):
                yield f'Node {id} has no "class_type".'
            elif not isinstance(node.get("inputs", {}), dict):
                yield f'Node {id}: its "inputs" must be an object of names and values.'


def node_problems(workflow: Workflow, id: str, infos: NodeInfos, checks: Checks) -> Iterator[str]:
    """The sentences about one node; its inputs are coerced in place."""
    inputs, class_type = workflow[id]["inputs"], workflow[id]["class_type"]
    groups = infos[class_type]["input"]
    known = {**groups.get("required", {}), **groups.get("optional", {})}
    for name in list(inputs):
        if name in FRONT_END_LEFTOVERS or name.startswith("$$"):
            del inputs[name]
        elif name not in known:
            yield f"it has no input {name!r}{nearest(name, known)}."
    for name in groups.get("required", {}):
        if name not in inputs:
            yield f"the input {name!r} is missing; it takes {describe(known[name])}."
    for name in [name for name in inputs if name in known]:
        if isinstance(inputs[name], list):
            yield from link_problems(workflow, name, inputs[name], known[name], infos)
        else:
            yield from value_problems(inputs, name, known[name], checks.get(class_type, {}).get(name))


def link_problems(workflow: Workflow, name: str, link: list, spec: Any, infos: NodeInfos) -> Iterator[str]:
    if not is_link(link):
        yield f'{name!r} is a bad link, {link!r}. A link is ["node id", slot], such as ["4", 0].'
        return
    source, slot = link[0], int(link[1])
    if source not in workflow:
        yield f"{name!r} is linked to node {source}, which is not in the workflow."
        return
    if workflow[source]["class_type"] not in infos:
        return  # said already
    outputs = infos[workflow[source]["class_type"]]["output"]
    if not 0 <= slot < len(outputs):
        there = ", ".join(f"{number} ({type_name(kind)})" for number, kind in enumerate(outputs)) or "none"
        yield f"{name!r} is linked to output {slot} of {title(workflow, source)}, which has only: {there}."
    elif not types_match(outputs[slot], input_type(spec)):
        yield (f"{name!r} takes {describe(spec)}, but output {slot} of {title(workflow, source)} "
               f"is {type_name(outputs[slot])}.")


def value_problems(inputs: dict[str, Any], name: str, spec: Any, check: Callable | None) -> Iterator[str]:
    value, kind, options = inputs[name], input_type(spec), input_options(spec)
    if isinstance(value, dict) and "__value__" in value:  # how the front end writes a list that is no link
        value = value["__value__"]
    try:
        value = CONVERSIONS.get(kind, lambda same: same)(value)
    except (TypeError, ValueError, OverflowError):
        yield f"{name!r} is {value!r}, which is no {kind}; it takes {describe(spec)}."
        return
    inputs[name] = value
    if check is not None:
        verdict = check(value)
        if verdict is not True:
            yield f"{name!r}: {verdict or f'{value!r} was refused.'}"
    elif kind in CONVERSIONS:
        low, high = options.get("min"), options.get("max")
        # The comparisons are written so that NaN fails them.
        if low is not None and not value >= low or high is not None and not value <= high:
            yield f"{name!r} is {value!r}; it takes {describe(spec)}."
    elif choices(spec) is not None:
        if isinstance(value, str) and value.replace("\\", "/") in choices(spec):
            inputs[name] = value.replace("\\", "/")  # a workflow made on Windows
        elif value not in choices(spec):
            yield f"{name!r} is {value!r}{nearest(value, choices(spec))}; it takes {describe(spec)}."
    else:
        yield f"{name!r} is the value {value!r}, but it takes a link to {describe(spec)}."


def cycles(workflow: Workflow) -> list[list[str]]:
    """Cycles of node ids, each beginning and ending with the same node; one for every link that has to go."""
    graph = {id: {link[0] for link in links(node).values() if link[0] in workflow} for id, node in workflow.items()}
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
            return found
        except CycleError as error:
            cycle = error.args[1]  # each node is a source of the next
            found.append(cycle)
            graph[cycle[1]].discard(cycle[0])


def reached(workflow: Workflow, infos: NodeInfos) -> list[str]:
    """The nodes that some output node needs, in the file's order; ComfyUI lets the others be whatever they are.

    Without any output node all are looked at.
    """
    waiting = [id for id, node in workflow.items() if is_output(node, infos)] or list(workflow)
    needed = set()
    while waiting:
        id = waiting.pop()
        if id in workflow and id not in needed:
            needed.add(id)
            waiting += [link[0] for link in links(workflow[id]).values()]
    return [id for id in workflow if id in needed]


def links(node: dict[str, Any]) -> dict[str, list]:
    """The node's well-formed links by input name."""
    return {name: value for name, value in node["inputs"].items() if is_link(value)}


def is_link(value: Any) -> bool:
    """Whether a value is `[node id, slot]`, the form of a link."""
    return (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
            and isinstance(value[1], (int, float)) and not isinstance(value[1], bool))


def is_output(node: dict[str, Any], infos: NodeInfos) -> bool:
    return bool(infos.get(node["class_type"], {}).get("output_node"))


def types_match(given: Any, wanted: Any) -> bool:
    """ComfyUI's rule: the comma-separated types have one in common, or one of them is `*`."""
    given, wanted = set(type_name(given).split(",")), set(type_name(wanted).split(","))
    return bool(given & wanted) or "*" in given | wanted


def type_name(kind: Any) -> str:
    return kind.replace(" ", "") if isinstance(kind, str) else "COMBO"  # old nodes write the list of choices itself


def input_type(spec: Any) -> str:
    return type_name(spec[0])


def input_options(spec: Any) -> Mapping[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def choices(spec: Any) -> list | None:
    """What a combo offers; None for other inputs."""
    if isinstance(spec[0], (list, tuple)):
        return list(spec[0])
    return list(input_options(spec).get("options") or []) if spec[0] == "COMBO" else None


def describe(spec: Any) -> str:
    """What an input takes, in words."""
    kind, options, offered = input_type(spec), input_options(spec), choices(spec)
    if offered is not None:
        shown = ", ".join(map(str, offered[:12])) + (f" and {len(offered) - 12} more" if len(offered) > 12 else "")
        return f"one of: {shown}" if offered else "one of a list that is empty here"
    low, high = options.get("min"), options.get("max")
    if low is not None and high is not None:
        return f"{kind} from {low} to {high}"
    return kind + (f" of at least {low}" if low is not None else f" of at most {high}" if high is not None else "")


def nearest(name: Any, names: Any) -> str:
    """", did you mean 'x'?" for a name that somebody may have mistyped; else nothing."""
    lower = {str(other).lower(): str(other) for other in names}
    close = get_close_matches(str(name).lower(), lower, n=1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""


def title(workflow: Workflow, id: str) -> str:
    """How a node is called in a message."""
    return f"node {id} ({workflow[id]['class_type']})"
