"""Menu WanFlow/training: the training itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..wan_core.errors import InputError
from ..wan_core.loading.lora_files import load_lora
from ..wan_core.training.cache import Cache
from ..wan_core.training.examples import Encoders, Examples, prepare
from ..wan_core.training.flow import SAMPLINGS as TIMESTEPS
from ..wan_core.training.flow import WEIGHTINGS
from ..wan_core.training.logs import read_losses
from ..wan_core.training.loop import Settings, train
from ..wan_core.training.loss_chart import loss_chart
from ..wan_core.training.memory import training_memory
from ..wan_core.training.optimizers import OPTIMIZERS
from ..wan_core.training.rates import SCHEDULES
from ..wan_core.training.results import captioned, latest
from ..wan_core.training.samples import sample_like
from ..wan_core.training.trainee import KINDS, LORA_TARGETS, Trainee, mixed
from .dataset import CACHE, TrainingData
from .host import host, io
from .watch import Finished, Watch
from .wires import WanDataset, WanImageEncoder, WanLora, WanModel, WanTextEncoder, WanVAE, names

MEMORY = {  # choice -> Settings
    "fastest": {"gradient_checkpointing": False},
    "less memory": {},
    "least memory": {"offload_activations": True},
}


def rare(socket: Any) -> Any:
    """The input, but front ends that can show it only when asked to."""
    socket.extra_dict["advanced"] = True
    return socket


def what_to_train() -> list:
    return [
        io.String.Input(
            "folder",
            default="training/my_lora",
            tooltip="Name below the output folder, for all that is saved. Under the same name a stopped training goes "
            "on; other settings or clips need another name.",
        ),
        io.Combo.Input(
            "mode",
            options=[*KINDS, "full"],
            default="lora",
            tooltip="lora: a small file of changes. dora: one that learns the size of weights apart from their "
            "direction. full: all weights, which needs much more memory.",
        ),
        io.String.Input(
            "parts",
            default="dit",
            tooltip="What is trained, with commas: dit (the diffusion model), vace, motion_controller.",
        ),
        io.Int.Input("rank", default=32, min=1, max=4096, tooltip="Of the LoRA: a higher one can learn more."),
        rare(
            io.Float.Input(
                "alpha",
                default=0.0,
                min=0.0,
                max=4096.0,
                step=1.0,
                round=0.001,
                tooltip="The LoRA counts alpha / rank while it is trained, and when it is used. 0: as rank.",
            )
        ),
        io.String.Input(
            "targets",
            default=",".join(LORA_TARGETS),
            tooltip="Layers that the LoRA changes, with commas: names, ends of names, or patterns (blocks.1?.*attn.q).",
        ),
    ]


def how_long() -> list:
    many = {"min": 0, "max": 10_000_000}
    return [
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=1e-8,
            max=1.0,
            step=1e-5,
            round=1e-10,
            tooltip="How large the steps are. Usual: 0.0001 for a LoRA, 0.00001 for all weights.",
        ),
        io.Int.Input(
            "epochs", default=10, min=1, max=1_000_000, tooltip="How often all clips are gone through; each is saved."
        ),
        io.Int.Input("max_steps", default=0, **many, tooltip="End after so many steps at the latest. 0: no limit."),
        io.Int.Input("batch_size", default=1, min=1, max=1024, tooltip="Clips of one size at once."),
        # not "seed", which front ends draw anew after each run: then a stopped training could not go on
        io.Int.Input("train_seed", default=0, min=0, max=0xFFFFFFFF, tooltip="The same seed trains the same."),
        io.String.Input(
            "extra_inputs",
            default="",
            tooltip="What the model takes beside text, with commas: input_image and end_image come from the clip, "
            "others such as control_video from the table's columns.",
        ),
        io.Combo.Input(
            "memory",
            options=list(MEMORY),
            default="less memory",
            tooltip="less memory computes each block twice; least memory keeps what is between in main memory too.",
        ),
        io.Int.Input("save_every", default=0, **many, tooltip="Save every so many steps too, not only after epochs."),
        io.Int.Input(
            "sample_every",
            default=0,
            **many,
            tooltip="Make a video every so many steps and at the end, to see how far it is. 0: none.",
        ),
        io.String.Input(
            "sample_prompt",
            default="",
            multiline=True,
            tooltip="What these videos show. Empty: the caption of the first clip.",
        ),
    ]


def fine_points() -> list:
    many, share = {"min": 0, "max": 10_000_000}, {"min": 0.0, "step": 0.001, "round": 0.000001}
    inputs = [
        io.String.Input(
            "also_full", default="", tooltip="Parts that are trained whole beside the LoRA, such as motion_controller."
        ),
        io.Int.Input(
            "accumulation", default=1, min=1, max=1024, tooltip="Batches to a step: a larger batch in the same memory."
        ),
        io.Combo.Input(
            "optimizer", options=list(OPTIMIZERS), default="adamw", tooltip="All but adamw and muon need their package."
        ),
        io.Combo.Input(
            "schedule", options=list(SCHEDULES), default="constant", tooltip="How the rate goes after the warm-up."
        ),
        io.Int.Input("warmup_steps", default=0, **many, tooltip="Steps over which the rate rises."),
        io.Float.Input(
            "weight_decay", default=0.01, max=10.0, **share, tooltip="How strongly weights are drawn towards 0."
        ),
        io.Float.Input(
            "ema_decay", default=0.0, max=1.0, **share, tooltip="Save an average: 0.99 of about 100 steps. 0: the last."
        ),
        io.Float.Input(
            "max_grad_norm", default=1.0, max=1000.0, **share, tooltip="Longer gradients are cut to this. 0: none are."
        ),
        io.Float.Input(
            "lora_plus", default=1.0, max=1000.0, **share, tooltip="How much faster its second factor learns: 16."
        ),
        io.Combo.Input(
            "timesteps", options=list(TIMESTEPS), default="shifted", tooltip="Which noise levels are trained most."
        ),
        io.Combo.Input(
            "weighting", options=list(WEIGHTINGS), default="bell", tooltip="bell: levels in the middle count most."
        ),
        io.Float.Input(
            "shift",
            default=5.0,
            min=0.01,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Of shifted timesteps: higher trains noisier levels. WanTiny: 3.",
        ),
    ]
    return [rare(socket) for socket in inputs]


class Train(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WanFlowTrain",
            display_name="Wan Train",
            category="WanFlow/training",
            description="Trains a LoRA or a whole model on your clips, and shows how it goes. Stopped and queued "
            "again, it goes on where it was.",
            is_output_node=True,
            inputs=[
                WanModel.Input("model", tooltip="What to train, from Load Wan Model. It stays as it is."),
                WanVAE.Input("vae", tooltip="From Load Wan VAE."),
                WanTextEncoder.Input("text_encoder", tooltip="From Load Wan Text Encoder."),
                WanDataset.Input("dataset", tooltip="From Wan Training Data."),
                *what_to_train(),
                *how_long(),
                *fine_points(),
                WanImageEncoder.Input("image_encoder", optional=True, tooltip="For models that look at their image."),
                WanDataset.Input("held_out", optional=True, tooltip="Clips to measure the loss on, never trained."),
                WanLora.Input("start_lora", optional=True, tooltip="Begin with this LoRA, of the same rank."),
            ],
            outputs=[
                WanLora.Output(display_name="lora", tooltip="For Save Wan LoRA, Apply Wan LoRA. Mode full has none."),
                WanModel.Output(display_name="model", tooltip="The model as trained, for Wan Sampler."),
                io.Image.Output(display_name="loss", tooltip="The loss of all steps as a curve."),
                io.String.Output(display_name="folder", tooltip="Where it was saved, for Wan Checkpoint Grid."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, vae, text_encoder, dataset, folder, mode, parts, rank, alpha, targets, learning_rate, epochs,
        max_steps, batch_size, train_seed, extra_inputs, memory, save_every, sample_every, sample_prompt, also_full,
        accumulation, optimizer, schedule, warmup_steps, weight_decay, ema_decay, max_grad_norm, lora_plus, timesteps,
        weighting, shift, image_encoder=None, held_out=None, start_lora=None,
    ):  # fmt: skip
        if memory not in MEMORY:
            raise InputError(f"There is no memory '{memory}'. Choose one of {', '.join(MEMORY)}.")
        settings = Settings(
            learning_rate=learning_rate, num_epochs=epochs, max_train_steps=max_steps or None, batch_size=batch_size,
            gradient_accumulation_steps=accumulation, repeat=dataset.repeat, seed=train_seed, optimizer=optimizer,
            save_steps=save_every or None, sample_steps=sample_every or None, lr_scheduler=schedule,
            warmup_steps=warmup_steps, weight_decay=weight_decay, ema_decay=ema_decay, max_grad_norm=max_grad_norm,
            lora_plus_ratio=lora_plus, timestep_sampling=timesteps, timestep_weighting=weighting, shift=shift,
            **MEMORY[memory],
        )  # fmt: skip
        place = host.output_folder(folder)
        watch = Watch(cls.hidden.unique_id, place)
        changes = {"rank": rank, "alpha": alpha or None, "targets": names(targets), "start": start_lora}
        trainee = new_trainee(model, mode, names(parts), names(also_full), {**changes, "seed": train_seed})
        trainee = captioned(trainee, (item.prompt for item in dataset.items))
        encoders = Encoders(vae, text_encoder, image_encoder)
        examples = prepared(dataset, encoders, names(extra_inputs), watch)
        unseen = prepared(held_out, encoders, names(extra_inputs), watch) if held_out else ()
        if sample_every:
            sample = sample_like(examples[0], model, text_encoder, sample_prompt, train_seed)
            watch.show_samples(sample, vae, sample_every)
        room = training_memory(trainee, examples.shapes, settings)
        host.say(str(room))
        try:
            with host.attached(trainee.model, room.room):
                train(trainee, examples, settings, place, watch.step, unseen, watch.sample if sample_every else None)
        except Finished:
            host.say("The training was finished early, as asked. Queued with more epochs or steps, it goes on.")
        return finished(trainee, model, mode, place, watch)


def prepared(dataset: TrainingData, encoders: Encoders, extra_inputs: list[str], watch: Watch) -> Examples:
    """The clips of a dataset encoded; what is wrong with some is said, if it was not before."""
    vae, cache = encoders.vae, Cache(host.output_dir() / CACHE)
    with host.attached(vae, vae.encoding_room(dataset.largest)):
        examples, notes = prepare(
            dataset.items, dataset.framing, encoders, cache, extra_inputs, watch.prepared, **dataset.options
        )
    for note in notes:
        if note not in dataset.said:
            host.say(note)
    return examples


def new_trainee(model: Any, mode: str, parts: list[str], also_full: list[str], changes: dict[str, Any]) -> Trainee:
    """`changes`: what a LoRA is made with."""
    if mode == "full":
        return mixed(model, parts, [])
    if mode not in KINDS:
        raise InputError(f"There is no mode '{mode}'. Choose one of {', '.join(KINDS)}, full.")
    return mixed(model, also_full, parts, kind=mode, **changes)


def finished(trainee: Trainee, model: Any, mode: str, place: Path, watch: Watch) -> io.NodeOutput:
    """What the node gives: the last that was saved."""
    losses = read_losses(place)
    file = latest(place, len(losses))
    lora, result = None, trainee.model
    if mode in KINDS:
        lora = replace(load_lora(file), name=place.name)
        result = replace(result, loras=(*model.loras, (lora, 1.0)))
    host.say(f"{len(losses)} steps are done; the last is saved as {file}.")
    chart = loss_chart(losses).to(host.intermediate_device())
    return io.NodeOutput(lora, result, chart, str(place), ui={"wanflow_training": [watch.state(ended=True)]})


NODES = [Train]
