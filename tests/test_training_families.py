"""Every family trains on what it is given when it is used: the same conditions, tensor for tensor."""

import json
from dataclasses import fields, replace
from pathlib import Path

import families
import pytest
import torch
from comfyui_wanflow.nodes import node_classes
from comfyui_wanflow.wan_core.adapters.injection import Canvas, inject
from comfyui_wanflow.wan_core.adapters.vace import VACEResiduals
from comfyui_wanflow.wan_core.errors import InputError, ModelError
from comfyui_wanflow.wan_core.loading.load import add_module, load_model
from comfyui_wanflow.wan_core.sampling.loop import Settings as SamplingSettings
from comfyui_wanflow.wan_core.sampling.loop import sample
from comfyui_wanflow.wan_core.training.cache import Cache
from comfyui_wanflow.wan_core.training.clips import read_clip, read_picture
from comfyui_wanflow.wan_core.training.dataset import list_items
from comfyui_wanflow.wan_core.training.examples import batch, prepare
from comfyui_wanflow.wan_core.training.framing import Framing
from comfyui_wanflow.wan_core.training.inputs import columns
from comfyui_wanflow.wan_core.training.loop import Settings, train
from comfyui_wanflow.wan_core.training.objective import Objective
from comfyui_wanflow.wan_core.training.trainee import mixed, new_lora
from safetensors.torch import load_file
from toy_data import SIZE, load_encoders, write_data, write_encoders

NODES = {node.GET_SCHEMA().node_id.removeprefix("WanFlow"): node for node in node_classes()}
GOLDEN = Path(__file__).parent / "data" / "golden" / "scheduler.safetensors"
FRAMES = 5
LATENT = {"samples": torch.zeros(1, 16, 2, SIZE // 8, SIZE // 8)}
# Case: the family, its extra inputs, and the nodes that give the sampler the same.
CASES = {
    "T2V": ("T2V", (), ()),
    "I2V": ("I2V", ("input_image",), ("ImageToVideo",)),
    "InP": ("I2V", ("input_image", "end_image"), ("ImageToVideo",)),
    "FLF2V": ("FLF2V", ("input_image", "end_image"), ("ImageToVideo",)),
    "Control": ("Control", ("control_video",), ("ControlVideo",)),
    "Control, image": ("Control", ("control_video", "input_image"), ("ControlVideo", "ImageToVideo")),
    "Control, reference": ("Control V1.1", ("control_video", "reference_image"), ("ControlVideo", "ReferenceImage")),
    "Camera": ("Camera", ("input_image", "camera_control_direction", "camera_control_speed"),
               ("ImageToVideo", "Camera")),
    "VACE": ("VACE", ("vace_video", "vace_reference_image"), ("VACE",)),
    "VACE, mask": ("VACE", ("vace_video", "vace_video_mask"), ("VACE",)),
    "VACE, reference": ("VACE", ("vace_reference_image",), ("VACE",)),
    "speed": ("speed", ("motion_bucket_id",), ("MotionSpeed",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return load_encoders(write_encoders(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("cache"))


def examples_of(data, encoders, cache, inputs):
    items, problems = list_items(data, data / "all.json", beside=columns(inputs))
    examples, notes = prepare(items, Framing(FRAMES, SIZE, SIZE), encoders, cache, inputs)
    assert not problems and not notes and len(examples) == 2
    return examples


def conditions_of_nodes(names, inputs, data, encoders):
    """What the nodes make of row 0's files, as a user would load and connect them."""
    row = json.loads((data / "all.json").read_text())[0]

    def images(name):
        if name in ("input_image", "end_image"):
            clip = read_clip(data / row["video"], 16, 0, FRAMES)
            return None if name not in inputs else clip[:1] if name == "input_image" else clip[-1:]
        if name not in inputs:
            return None
        file = data / row[name]
        return read_picture(file) if file.suffix == ".png" else read_clip(file, 16, 0, FRAMES)

    mask = images("vace_video_mask")
    given = {
        "ImageToVideo": {"vae": encoders.vae, "fit": "cover", "start_image": images("input_image"),
                         "end_image": images("end_image"), "image_encoder": encoders.image_encoder},
        "ControlVideo": {"vae": encoders.vae, "fit": "cover", "extend": "hold",
                         "control_video": images("control_video")},
        "ReferenceImage": {"vae": encoders.vae, "fit": "cover", "image": images("reference_image"),
                           "image_encoder": encoders.image_encoder},
        "Camera": {"direction": row["camera_control_direction"], "speed": row["camera_control_speed"]},
        "VACE": {"vae": encoders.vae, "strength": 1.0, "fit": "cover", "extend": "hold", "mask_edges": "hard",
                 "video": images("vace_video"), "mask": None if mask is None else mask[..., 0],
                 "reference_image": images("vace_reference_image")},
        "MotionSpeed": {"motion_bucket_id": row["motion_bucket_id"]},
    }  # fmt: skip
    conditions = ()
    for name in names:
        latent = {} if name == "MotionSpeed" else {"latent": LATENT}
        conditions = NODES[name].execute(**given[name], **latent, conditions=conditions).args[0]
    return conditions


def given_to(trunk, call):
    """The arguments of the first call of the trunk."""
    seen = []
    hook = trunk.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    try:
        call()
    finally:
        hook.remove()
    return seen[0]


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def loss_of(model, example, settings=None):
    with torch.no_grad(), model.attached() as network:  # with gradients other kernels round differently
        return Objective(network, model, settings or Settings())(example, generators(len(example.latents)))


def assert_same(one, other, name=""):
    """Injections (or what is in them) of which every tensor is the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape and torch.equal(one, other), name
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key, value in one.items():
            assert_same(value, other[key], f"{name} {key}")
    elif isinstance(one, tuple):
        assert len(one) == len(other), name
        for mine, its in zip(one, other, strict=True):
            assert_same(mine, its, name)
    elif isinstance(one, VACEResiduals):
        assert_same(vars(one), vars(other), name)
    else:
        assert one == other, name


@pytest.mark.parametrize("case", CASES)
def test_the_trunk_is_given_the_same(data, encoders, cache, case):
    family, inputs, names = CASES[case]
    model = families.model(family)
    example = examples_of(data, encoders, cache, inputs)[0]
    conditions = conditions_of_nodes(names, inputs, data, encoders)
    prompt = json.loads((data / "all.json").read_text())[0]["prompt"]
    text, _, _ = encoders.text_encoder.encode([prompt])

    def infer():
        sample(model, text, None, LATENT["samples"], SamplingSettings(seed=0, steps=1, cfg=1), conditions)

    (x, _, text, injected, run), (own_x, _, own_text, own_injected, own_run) = (
        given_to(model.trunk, call) for call in (infer, lambda: loss_of(model, example))
    )
    assert x.shape == own_x.shape and run.compute_dtype == own_run.compute_dtype
    assert torch.equal(text[:, : own_text.shape[1]], own_text) and not text[:, own_text.shape[1] :].any()
    slots = [field.name for field in fields(injected)]
    assert_same(*({name: getattr(one, name) for name in slots} for one in (injected, own_injected)))
    if inputs:  # something is there to be equal
        empty = {"concat": {}, "context_rank": 0, "block_residuals": ()}
        assert any(getattr(injected, name) is not None and getattr(injected, name) != empty.get(name) for name in slots)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_its_clips_side_by_side(data, encoders, cache, case):
    """The loss of a batch is the mean of its clips', whatever they are conditioned by."""
    family, inputs, _ = CASES[case]
    model, examples = families.model(family), examples_of(data, encoders, cache, inputs)
    assert len(set(examples.groups)) == 1
    both = batch(list(examples))
    assert both.latents.shape == (2, 16, 2, 4, 4)
    with torch.no_grad(), model.attached() as network:
        objective = Objective(network, model, Settings())
        sigmas = torch.tensor([0.9, 0.4])
        apart = [objective.losses(examples[i], sigmas[i : i + 1], generators(1, seed=i)) for i in (0, 1)]
        torch.testing.assert_close(objective.losses(both, sigmas, generators(2)), torch.cat(apart), rtol=1e-4, atol=0)


# How each family's published script trains: the parts that are trained whole, and those with a LoRA.
WAYS = {
    "T2V": ("dit", "dit"), "FLF2V": ("dit", "dit"), "Control, reference": ("dit", "dit"), "Camera": ("dit", "dit"),
    "VACE, mask": ("vace", "vace"), "VACE": ("vace", "vace"), "speed": ("motion_controller", "dit"),
}  # fmt: skip


@pytest.mark.parametrize("case", WAYS)
@pytest.mark.parametrize("way", [0, 1], ids=["whole", "lora"])
def test_it_learns(data, encoders, cache, tmp_path, case, way):
    family, inputs, _ = CASES[case]
    model, examples = families.model(family), examples_of(data, encoders, cache, inputs)
    part = WAYS[case][way]
    trainee = mixed(model, [part], []) if way == 0 else mixed(model, [], [part], rank=4)
    before = sum(loss_of(trainee.model, example) for example in examples)
    train(trainee, examples, Settings(learning_rate=3e-3, num_epochs=6), tmp_path)
    assert sum(loss_of(trainee.model, example) for example in examples) < before


@pytest.mark.parametrize("parts", [["dit", "motion_controller"], ["motion_controller"]])
def test_a_controller_is_saved_in_a_file_of_its_own(data, encoders, cache, tmp_path, parts):
    model, examples = families.model("speed"), examples_of(data, encoders, cache, ("motion_bucket_id",))
    trainee = mixed(model, parts, [])
    train(trainee, examples, Settings(learning_rate=1e-3, max_train_steps=1), tmp_path)
    names = (
        ["step-1.motion_controller.safetensors", "step-1.safetensors"] if len(parts) == 2 else ["step-1.safetensors"]
    )
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == names
    base = load_model(tmp_path / "step-1.safetensors", device="cpu") if len(parts) == 2 else model
    again = add_module(base, tmp_path / names[0])
    for one, other in zip(trainee.model.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_loss_is_the_reference_s(data, encoders, cache):
    """The mean squared error against noise - clip, weighted as recorded from DiffSynth-Studio at this level."""
    model, golden = families.model("T2V"), load_file(GOLDEN)
    example = examples_of(data, encoders, cache, ())[0]
    seen = []
    hook = model.trunk.register_forward_hook(lambda module, given, answer: seen.append((given, answer)))
    loss = loss_of(model, example)
    hook.remove()
    (x, timestep, *_), velocity = seen[0]
    sigma = timestep / 1000
    noise = (x - (1 - sigma) * example.latents) / sigma
    (place,) = (golden["train_sigmas"] - sigma).abs().lt(1e-6).nonzero()
    expected = (velocity - (noise - example.latents)).square().mean() * golden["train_weights"][place]
    assert loss == pytest.approx(expected.item(), rel=1e-4) and noise.std() == pytest.approx(1, abs=0.1)


def test_references_are_learned_as_frames(data, encoders, cache):
    """VACE's reference stands in front of the clip: its noise is part of the loss, and its level is the clip's."""
    model = families.model("VACE")
    example = examples_of(data, encoders, cache, ("vace_reference_image",))[0]
    x, timestep, *_ = given_to(model.trunk, lambda: loss_of(model, example))
    assert x.shape[2] == 3  # a reference and two frames of the clip
    front, sigma = example.conditions[0].references, timestep / 1000
    noise = (x[:, :, :1] - (1 - sigma) * front) / sigma
    assert 0.8 < noise.std() < 1.2


def test_speed_reaches_the_model(data, encoders, cache):
    model = families.model("speed")
    slow, fast = examples_of(data, encoders, cache, ("motion_bucket_id",))
    added = []
    for example in (slow, fast):
        with torch.no_grad(), model.attached() as network:
            added.append(inject(example.conditions, network, Canvas(1, 2, 4, 4)).time_add)
    assert not torch.equal(*added)


def test_inputs_that_do_not_fit(data, encoders, cache, tmp_path):
    examples = examples_of(data, encoders, cache, ())
    with pytest.raises(ModelError, match="needs more than the text"):
        train(new_lora(families.model("I2V"), 2), examples, Settings(), tmp_path / "none")
    examples = examples_of(data, encoders, cache, ("control_video",))
    with pytest.raises(ModelError, match="takes no control video"):
        train(new_lora(families.model("I2V"), 2), examples, Settings(), tmp_path / "wrong")
    with pytest.raises(InputError, match="knows no gradients"):
        mixed(replace(families.model("T2V"), attention="sage"), [], ["dit"])
    with pytest.raises(InputError, match="no extra input 'control'"):
        examples_of(data, encoders, cache, ("control",))
