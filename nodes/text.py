"""Menu WanFlow/text: a prompt becomes CONDITIONING."""

from __future__ import annotations

from ..wan_core.models.tokenizer import MAX_TOKENS
from .host import host, io
from .wires import WanTextEncoder


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowTextEncode",
            display_name="Wan Prompt",
            category="WanFlow/text",
            description="Encodes a prompt. The report tells how many tokens it has, and what was cut if too many.",
            inputs=[
                WanTextEncoder.Input("text_encoder", tooltip="From Load Wan Text Encoder."),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the video shows (or must not show, for the negative input). May be empty.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="For positive or negative of a sampler."),
                io.String.Output(display_name="report", tooltip="The number of tokens, and the text that was cut."),
            ],
        )

    @classmethod
    def execute(cls, text_encoder, text):
        with host.attached(text_encoder, text_encoder.working_room(text)):
            encoded, lengths, cut = text_encoder.encode([text])  # (1, 512, 4096), zero after the real length
        if cut:
            host.say(cut)
        report = f"{lengths[0]} of {MAX_TOKENS} tokens. {cut}".strip()
        return io.NodeOutput([[encoded.to(host.intermediate_device()), {}]], report)


NODES = [TextEncode]
