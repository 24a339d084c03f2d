"""`wanflow run --tiny`: a workflow's twin in the toy world, which shows in seconds whether the graph works.

It has the same nodes and links, but WanTiny's files in the place of the published ones, their size and steps, toy
pictures in the place of the user's, and a caption that goes with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from ...wan_core.errors import FileError
from ...wan_core.loading.catalog import BY_NAME, offered_as
from ...wan_core.loading.identify import identify
from ...wan_core.loading.outline import open_outline
from ..host.standalone import host
from ..library import library_of
from ..load import chosen
from ..lora import NONE
from .toys import (
    CAPTIONS,
    DISTILLED,
    MODELS,
    NO_TWIN,
    PICTURES,
    PRESET,
    SETTINGS,
    UNSEEN,
    WITH_A_CAMERA,
    WITH_A_MASK,
)
from .validate import Workflow, WorkflowError, is_link, title

FILE_INPUTS = {"LoadImage": "image", "LoadImageMask": "image", "WanFlowLoadVideo": "video"}


def twin(workflow: Workflow) -> Workflow:
    """The workflow for the toys. Raises WorkflowError for all that they have nothing for."""
    workflow = deepcopy(workflow)
    problems = []
    for id, node in workflow.items():
        node.setdefault("inputs", {})
        try:
            give_models_and_settings(node)
        except FileError as error:
            problems.append(f"{title(workflow, id)} has no twin: {error}")
    if problems:
        raise WorkflowError(problems)
    given = {(node["class_type"], name) for node in workflow.values() for name in node["inputs"]}
    give_loras(workflow)
    give_guidance(workflow)
    give_pictures(workflow, given)
    give_captions(workflow, given)
    return workflow


def give_models_and_settings(node: dict[str, Any]) -> None:
    """Raises FileError where there is no toy to take."""
    kind, inputs = node["class_type"], node["inputs"]
    if kind in NO_TWIN:
        raise FileError(NO_TWIN[kind])
    if kind == "WanFlowLoadModel":
        inputs |= {"model": offered_as(toy_for(inputs, "model", "dit"), "dit"), "files": ""}
    if kind == "WanFlowAddModule":
        inputs |= {"module": toy_for(inputs, "module", "vace_module"), "files": ""}
    for name, value in SETTINGS.get(kind, {}).items():
        if name in inputs and not (callable(value) and is_link(inputs[name])):
            inputs[name] = value(inputs[name]) if callable(value) else value


def toy_for(inputs: dict[str, Any], name: str, kind: str) -> str:
    """The toy that is of the kind of model that a loader loads, by what that is called, else by its tensors."""
    files, called = str(inputs.get("files", "")).strip(), str(inputs.get(name, ""))
    words = "/".join(Path(files.splitlines()[0]).parts[-2:]) if files else called
    if toy := toy_called(words):
        return toy
    outline = open_outline(chosen("diffusion_models", called, files), kind, library_of("diffusion_models"))
    summary = identify(outline.shapes).summary
    if toy := toy_called(summary):
        return toy
    raise FileError(f"{words} is {summary}, for which there is no toy.")


def toy_called(words: str) -> str | None:
    return next((toy for pattern, toy in MODELS.items() if re.search(pattern, words, re.IGNORECASE)), None)


def give_loras(workflow: Workflow) -> None:
    """Without guidance, which distilled models do not need, the first LoRA is the toys' own; others are left out."""
    nodes = workflow.values()
    few_steps = any(node["inputs"].get("cfg") == 1 or node["class_type"] == "WanFlowFewSteps" for node in nodes)
    own = iter([DISTILLED] if few_steps else [])
    for node in nodes:
        if node["class_type"] == "WanFlowApplyLora" and "lora" not in node["inputs"]:
            lora, toy = node["inputs"].get("lora_name", NONE), next(own, NONE)
            node["inputs"]["lora_name"] = toy
            if lora != toy:
                host.say(f"In the place of the LoRA {lora} is {toy}.")


def give_guidance(workflow: Workflow) -> None:
    """Its toys' own. Exactly 1 stays: it means none."""
    named = [node["inputs"].get(name) for node in workflow.values() for name in ("model", "module")]
    cfg = min((BY_NAME[toy].preset.cfg for toy in named if isinstance(toy, str) and toy in BY_NAME), default=PRESET.cfg)
    for node in workflow.values():
        if node["class_type"] == "WanFlowSampler" and isinstance(node["inputs"].get("cfg"), (int, float)):
            node["inputs"]["cfg"] = 1 if node["inputs"]["cfg"] == 1 else cfg


def give_pictures(workflow: Workflow, given: set[tuple[str, str]]) -> None:
    """The nodes that load pictures load those which are for what they are used for."""
    files = dict(PICTURES)
    if ("WanFlowCamera", "latent") in given:
        files |= WITH_A_CAMERA
    if ("WanFlowVACE", "mask") in given:
        files |= WITH_A_MASK
    for (kind, name), file in files.items():
        for source in sources(workflow, name, kind):
            if source["class_type"] in FILE_INPUTS:
                source["inputs"][FILE_INPUTS[source["class_type"]]] = file


def give_captions(workflow: Workflow, given: set[tuple[str, str]]) -> None:
    """All prompts say what the pictures do not, and negative ones what the toys were trained with."""
    caption = next((caption for place, caption in CAPTIONS.items() if place in given), UNSEEN.caption)
    for name, text in (("negative", PRESET.negative_prompt), ("positive", caption)):
        for source in sources(workflow, name):
            if source["class_type"] == "WanFlowTextEncode":
                source["inputs"]["text"] = text
    host.say(f"The twin in the toy world: {caption}")


def sources(workflow: Workflow, name: str, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The nodes that are linked to the inputs of this name, of all kinds of nodes or of one."""
    for node in workflow.values():
        link = node["inputs"].get(name)
        if kind in (None, node["class_type"]) and is_link(link) and link[0] in workflow:
            yield workflow[link[0]]
