"""What a video or picture is, and the graph that it was made by, where it carries one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
from PIL import Image, UnidentifiedImageError

from ..errors import FileError
from ..video import PICTURE_SUFFIXES, VIDEO_SUFFIXES, read_graphs
from .hub import in_words
from .page import Fact, page

CLIP_SUFFIXES = tuple({*VIDEO_SUFFIXES, *PICTURE_SUFFIXES})
Graph = dict[str, dict[str, Any]]  # of the API: node id -> class_type and inputs

# What a page tells of a graph: a label, and the names that nodes of WanFlow and ComfyUI have for it.
SETTINGS = (
    ("model", ("model", "unet_name", "ckpt_name", "module", "files")),
    ("text encoder", ("text_encoder", "clip_name")),
    ("VAE", ("vae", "vae_name")),
    ("seed", ("seed", "noise_seed")),
    ("sampler", ("steps", "cfg", "shift", "scheduler", "sampler_name", "denoise")),
    ("size", ("width", "height", "num_frames", "length", "frame_rate")),
)


def clip_page(path: Path) -> str:
    """Raises FileError for files that are missing, or no videos or pictures."""
    graphs = read_graphs(path)
    facts = [("file", in_words(path.stat().st_size)), ("content", content(path))]
    graph = graphs.get("prompt")
    if graph is None:
        return page(f"{path} carries no workflow.", facts)
    editor = "drop the file on ComfyUI to get it back" if "workflow" in graphs else "for the API only"
    facts += [*graph_facts(graph), ("workflow", f"{len(graph)} nodes; {editor}")]
    return "\n".join([page(f"{path} was made by the workflow that it carries.", facts), "", *node_lines(graph)])


def content(path: Path) -> str:
    """Size, length and rate."""
    try:
        if path.suffix.lower() in PICTURE_SUFFIXES:
            return pictures(path)
        facts = next(imageio_ffmpeg.read_frames(path))
    except (OSError, RuntimeError, IndexError, UnidentifiedImageError) as error:
        raise FileError(f"{path} could not be read. It may be damaged, or not a video or picture at all.") from error
    width, height = facts["size"]
    frames = round(facts["duration"] * facts["fps"])
    return f"{width}x{height}, {frames} frames, {facts['fps']:g} a second, {facts['duration']:g} s, {facts['codec']}"


def pictures(path: Path) -> str:
    with Image.open(path) as image:
        frames, milliseconds = getattr(image, "n_frames", 1), 0
        for number in range(frames if frames > 1 else 0):
            image.seek(number)
            image.load()
            milliseconds += image.info.get("duration", 0)
        length = f", {frames} frames, {milliseconds / 1000:g} s" if frames > 1 else ""
        return f"{image.width}x{image.height}{length}, {image.format}"


def graph_facts(graph: Graph) -> Iterator[Fact]:
    """What most people want to know of how a video was made."""
    for label, names in SETTINGS:
        values = [(name, value) for name in names for value in entered(graph, name) if value not in ("", None)]
        if values:
            named = len(names) > 3 and label in ("sampler", "size")
            yield label, ", ".join(dict.fromkeys(f"{name} {value}" if named else str(value) for name, value in values))
    for node in graph.values():
        if name := literal(node, "lora_name"):
            yield "LoRA", f"{name}, strength {literal(node, 'strength') or literal(node, 'strength_model')}"
    for side in ("positive", "negative"):
        for node in graph.values():
            if text := text_behind(graph, node["inputs"].get(side)):
                yield side, " ".join(text.split())


def entered(graph: Graph, name: str) -> Iterable[Any]:
    return (value for node in graph.values() if (value := literal(node, name)) is not None)


def literal(node: dict[str, Any], name: str) -> Any:
    value = node.get("inputs", {}).get(name)
    return None if isinstance(value, list) else value


def text_behind(graph: Graph, link: Any, depth: int = 8) -> str:
    """The text that was entered in the node a link comes from, or in one of those before it."""
    if not (isinstance(link, list) and link and str(link[0]) in graph and depth):
        return ""
    inputs = graph[str(link[0])].get("inputs", {})
    if isinstance(inputs.get("text"), str):
        return inputs["text"]
    return next(filter(None, (text_behind(graph, value, depth - 1) for value in inputs.values())), "")


def node_lines(graph: Graph) -> Iterator[str]:
    """A line a node, with the values that were entered."""
    for node in graph.values():
        values = (f"{name} {value!r}" for name, value in node["inputs"].items() if not isinstance(value, list))
        yield f"  {node['class_type']}: {', '.join(values)}".rstrip(": ")
