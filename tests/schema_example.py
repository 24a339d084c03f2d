"""A node that uses all of the V3 schema that WanFlow may use, for whichever `io` it is given.

tests/data/schema_example.json is what ComfyUI 0.3.64's own `io` makes of it.
"""


def example_node(io):
    class Example(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            steps = io.Int.Input(
                "steps", display_name="Steps", tooltip="How many.", default=50, min=1, max=1000, step=1,
                display_mode=io.NumberDisplay.slider,
            )
            steps.extra_dict["advanced"] = True
            return io.Schema(
                node_id="Example",
                display_name="An Example",
                category="WanFlow/test",
                description="Uses everything.",
                is_output_node=True,
                is_deprecated=True,
                is_experimental=True,
                not_idempotent=True,
                hidden=[io.Hidden.unique_id],
                inputs=[
                    io.Custom("WAN_MODEL").Input("model", tooltip="A model."),
                    io.MultiType.Input("vae", types=[io.Custom("WAN_VAE"), io.Vae], tooltip="Either."),
                    steps,
                    io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
                    io.Float.Input("cfg", default=5.0, min=0.0, max=30.0, step=0.1, round=0.01),
                    io.String.Input("name", default="x"),
                    io.String.Input("text", multiline=True, placeholder="a cat", dynamic_prompts=True),
                    io.Boolean.Input("tiled", default=False, label_on="yes", label_off="no"),
                    io.Combo.Input("scheduler", options=["euler", "unipc"], default="euler"),
                    io.Combo.Input("video", options=[], upload=io.UploadType.video),
                    io.AnyType.Input("any"),
                    io.Image.Input("image", optional=True),
                    io.Mask.Input("mask", optional=True, tooltip="White is changed."),
                    io.Float.Input("strength", optional=True, default=1.0, force_input=True, socketless=False),
                ],
                outputs=[
                    io.Latent.Output(display_name="latent", tooltip="The result."),
                    io.Conditioning.Output(display_name="positive"),
                    io.Custom("WAN_CONDITIONS").Output(),
                    io.Image.Output(display_name="images"),
                ],
            )

        @classmethod
        def execute(cls, **inputs):
            return io.NodeOutput()

    return Example
