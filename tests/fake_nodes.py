"""A small pack of nodes for the tests of the headless half: it counts runs, stops, fails and saves on request."""

import torch
from comfyui_wanflow.nodes.host import host, io
from comfyui_wanflow.wan_core.errors import InputError

RUNS = []  # node ids or names in the order in which they ran


class FakeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FakeModel",
            display_name="Load Fake Model",
            inputs=[io.Combo.Input("model", options=["tiny", "large"], default="tiny")],
            outputs=[io.Custom("WAN_MODEL").Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model):
        RUNS.append("FakeModel")
        return io.NodeOutput({"name": model})


class FakeSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FakeSampler",
            display_name="Fake Sampler",
            description="Makes noise.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Custom("WAN_MODEL").Input("model"),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, tooltip="Where the noise begins."),
                io.Int.Input("steps", default=4, min=1, max=100),
                io.Float.Input("cfg", default=5.0, min=0.0, max=30.0),
                io.Boolean.Input("merge", default=False),
                io.Latent.Input("latent", optional=True),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, model, seed, steps, cfg, merge, latent=None):
        RUNS.append(f"FakeSampler {cls.hidden.unique_id}")
        if steps == 13:
            raise InputError("13 steps bring bad luck. Use 12 or 14.")
        if steps == 66:
            raise RuntimeError("a mistake in the code")
        progress = host.progress(steps, cls.hidden.unique_id)
        for step in range(steps):
            progress.update(step + 1)
        noise = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        return io.NodeOutput({"samples": noise * cfg})


class FakeDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FakeDecode",
            display_name="Fake Decode",
            inputs=[io.Latent.Input("latent")],
            outputs=[io.Image.Output(display_name="images"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, latent):
        RUNS.append("FakeDecode")
        frames = latent["samples"][0, :3, 0].sigmoid().movedim(0, -1)[None]  # (1, h, w, 3)
        return io.NodeOutput(frames, f"{torch.is_inference_mode_enabled()}")


class FakeSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FakeSave",
            display_name="Save Fake Text",
            is_output_node=True,
            inputs=[io.String.Input("text", multiline=True), io.String.Input("filename_prefix", default="text")],
        )

    @classmethod
    def execute(cls, text, filename_prefix):
        RUNS.append("FakeSave")
        file = host.output_path(filename_prefix, "txt")
        file.path.write_text(text)
        return io.NodeOutput(ui={"files": [{"filename": file.filename, "subfolder": file.subfolder, "type": "output"}]})


NODES = [FakeModel, FakeSampler, FakeDecode, FakeSave]


def workflow(**sampler):
    """Model, sampler, decoder, and two outputs: an image and a text."""
    values = {"seed": 7, "steps": 2, "cfg": 1.0, "merge": False, **sampler}
    return {
        "1": {"class_type": "FakeModel", "inputs": {"model": "tiny"}},
        "2": {"class_type": "FakeSampler", "inputs": {"model": ["1", 0], **values}, "_meta": {"title": "The Sampler"}},
        "3": {"class_type": "FakeDecode", "inputs": {"latent": ["2", 0]}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "fake/picture"}},
        "5": {"class_type": "FakeSave", "inputs": {"text": ["3", 1], "filename_prefix": "mode"}},
    }
