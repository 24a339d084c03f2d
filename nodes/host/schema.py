"""A stand-in for ComfyUI's `io` (`comfy_api.latest`): the part of its V3 schema that our nodes use, and no more.

Node modules write `io.Schema(...)`, `io.Int.Input(...)`; inside ComfyUI that is the real thing, elsewhere this file.
`GET_NODE_INFO_V1` gives what ComfyUI answers on `/object_info`. An argument that the oldest supported ComfyUI (0.3.64)
lacks, or that the headless runner does not honour (lazy inputs, lists of outputs), is a TypeError here, so that a test
notices before a user does. The names are ComfyUI's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Hidden(str, Enum):
    """What a node may ask the host for, besides its inputs."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


class UploadType(str, Enum):
    image = "image_upload"
    audio = "audio_upload"
    video = "video_upload"
    model = "file_upload"


class NumberDisplay(str, Enum):
    number = "number"
    slider = "slider"


class Input:
    """A socket. `options` maps an argument's name to its name in `/object_info`."""

    io_type: str
    options = {"display_name": "display_name", "tooltip": "tooltip"}
    always: dict[str, Any] = {}  # what ComfyUI sends even when it was not given

    def __init__(self, id: str, *, optional: bool = False, **arguments: Any):
        if unknown := sorted(arguments.keys() - self.options.keys()):
            raise TypeError(f"{self.io_type} input {id!r}: ComfyUI 0.3.64 does not know the argument {unknown[0]!r}.")
        self.id = id
        self.optional = optional
        self.arguments = arguments
        self.extra_dict: dict[str, Any] = {}

    def get_io_type(self) -> str:
        return self.io_type

    def as_dict(self) -> dict[str, Any]:
        given = {self.options[name]: value for name, value in self.arguments.items()}
        return {name: value for name, value in {**self.always, **given, **self.extra_dict}.items() if value is not None}


class WidgetInput(Input):
    """An input the user can type."""

    options = Input.options | {"default": "default", "socketless": "socketless", "force_input": "forceInput"}


class ComboInput(WidgetInput):
    options = WidgetInput.options | {"options": "options", "control_after_generate": "control_after_generate"}
    always = {"multiselect": False}

    def __init__(self, id: str, options: list[str], *, upload: UploadType | None = None, **arguments: Any):
        super().__init__(id, options=options, **arguments)
        self.upload = upload

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | ({self.upload.value: True} if self.upload else {})


class MultiTypeInput(Input):
    """A socket that takes several types."""

    def __init__(self, id: str, types: list[type], **arguments: Any):
        super().__init__(id, **arguments)
        self.types = types

    def get_io_type(self) -> str:
        return ",".join(dict.fromkeys(kind.io_type for kind in self.types))


@dataclass(kw_only=True)
class Output:
    """A result. Its `id` is left out on purpose: an input and an output of one id break the pack on 0.3.64."""

    display_name: str | None = None
    tooltip: str | None = None
    io_type = "*"


def Custom(io_type: str, input_class: type[Input] = Input, **options: str) -> type:  # noqa: N802, ComfyUI's name
    """A wire type with its `Input` and `Output`; `options` are the arguments only its input takes."""
    members = {"io_type": io_type}
    input_members = members | {"options": input_class.options | options}
    return type(io_type, (), {
        **members,
        "Input": type(f"{io_type}.Input", (input_class,), input_members),
        "Output": type(f"{io_type}.Output", (Output,), members),
    })


_NUMBER = {"min": "min", "max": "max", "step": "step", "display_mode": "display"}

Boolean = Custom("BOOLEAN", WidgetInput, label_on="label_on", label_off="label_off")
Int = Custom("INT", WidgetInput, control_after_generate="control_after_generate", **_NUMBER)
Float = Custom("FLOAT", WidgetInput, round="round", **_NUMBER)
String = Custom(
    "STRING", WidgetInput, multiline="multiline", placeholder="placeholder", dynamic_prompts="dynamicPrompts"
)
String.Input.always = {"multiline": False}
Combo = Custom("COMBO", ComboInput)
MultiType = Custom("COMFY_MULTITYPED_V3", MultiTypeInput)
AnyType = Custom("*")
Image = Custom("IMAGE")
Mask = Custom("MASK")
Latent = Custom("LATENT")
Conditioning = Custom("CONDITIONING")
Audio = Custom("AUDIO")
Video = Custom("VIDEO")
Vae = Custom("VAE")
Clip = Custom("CLIP")
ClipVision = Custom("CLIP_VISION")
ClipVisionOutput = Custom("CLIP_VISION_OUTPUT")
Model = Custom("MODEL")


@dataclass(kw_only=True)
class Schema:
    """What a node is: its names, inputs and outputs."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    not_idempotent: bool = False

    def __post_init__(self) -> None:
        ids = [socket.id for socket in self.inputs]
        if repeated := {id for id in ids if ids.count(id) > 1}:
            raise ValueError(f"{self.node_id}: input ids must be unique, but {sorted(repeated)} are not.")
        if self.is_output_node:  # as ComfyUI does: what saves a file may store the graph in it
            self.hidden = list(dict.fromkeys([*self.hidden, Hidden.prompt, Hidden.extra_pnginfo]))

    def input_info(self) -> dict[str, dict]:
        """`{"required" | "optional": {id: (type, options)}, "hidden": {name: (type,)}}`, as `/object_info` has it."""
        info: dict[str, dict] = {"required": {}}
        for socket in self.inputs:
            group = info.setdefault("optional" if socket.optional else "required", {})
            group[socket.id] = (socket.get_io_type(), socket.as_dict())
        if self.hidden:
            info["hidden"] = {hidden.name: (hidden.value,) for hidden in self.hidden}
        return info


class HiddenHolder:
    """A node's `cls.hidden`: what it asked for, None for what it did not."""

    def __init__(self, **values: Any):
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> None:
        return None


class ComfyNode(ABC):
    """A node: a class with a schema and an `execute`, never instantiated, without state."""

    RELATIVE_PYTHON_MODULE = None
    hidden = HiddenHolder()

    @classmethod
    @abstractmethod
    def define_schema(cls) -> Schema:
        """The node's schema. It is asked for several times a run: list no folder here without a cache."""

    @classmethod
    @abstractmethod
    def execute(cls, **inputs: Any) -> NodeOutput:
        """The node's work. Optional inputs that are not connected are not passed."""

    @classmethod
    def GET_SCHEMA(cls) -> Schema:  # noqa: N802, ComfyUI's name
        return cls.define_schema()

    @classmethod
    def GET_NODE_INFO_V1(cls) -> dict[str, Any]:  # noqa: N802, ComfyUI's name
        """The node's entry in `/object_info`."""
        schema = cls.define_schema()
        inputs = schema.input_info()
        return {
            "input": inputs,
            "input_order": {group: list(entries) for group, entries in inputs.items()},
            "output": [output.io_type for output in schema.outputs],
            "output_is_list": [False] * len(schema.outputs),
            "output_name": [output.display_name or output.io_type for output in schema.outputs],
            "output_tooltips": [output.tooltip or None for output in schema.outputs],
            "name": schema.node_id,
            "display_name": schema.display_name,
            "description": schema.description,
            "python_module": cls.RELATIVE_PYTHON_MODULE,
            "category": schema.category,
            "output_node": schema.is_output_node,
            "deprecated": schema.is_deprecated,
            "experimental": schema.is_experimental,
            "api_node": False,
        }


class NodeOutput:
    """What `execute` returns: the outputs in order, and `ui`, what the front end shows."""

    def __init__(self, *args: Any, ui: dict[str, Any] | None = None):
        self.args = args
        self.ui = ui


class ComfyExtension(ABC):
    """The pack, as ComfyUI's loader asks for it."""

    @abstractmethod
    async def get_node_list(self) -> list[type[ComfyNode]]:
        """Every node class of the pack."""
