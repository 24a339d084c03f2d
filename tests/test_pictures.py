"""Start and end images, control videos and references: their tensors, the model's answers to them, and refusals."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_wanflow.nodes.condition import ControlVideo, ImageToVideo, ReferenceImage
from comfyui_wanflow.wan_core.adapters.control import ControlCondition, control_condition
from comfyui_wanflow.wan_core.adapters.image import ImageCondition, image_condition, known_frames
from comfyui_wanflow.wan_core.adapters.injection import Canvas, inject, neutral
from comfyui_wanflow.wan_core.adapters.reference import ReferenceCondition, reference_condition
from comfyui_wanflow.wan_core.errors import InputError, ModelError
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.vae import LATENT_MEAN, LATENT_STD
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "data" / "golden"
SIZE = (3, 4, 6)  # T, h, w of the recorded runs: 9 frames of 48x32 pixels
CANVAS = Canvas(1, *SIZE)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


# ---- what the pictures become -----------------------------------------------------------------------------------


def echo(pixels):
    """Stands in for the VAE's encoder: raw latents that name the mean colour of the frames they are made of."""
    first, rest = pixels[:, :, :1], pixels[:, :, 1:]
    groups = torch.stack([first.mean(), *rest.unflatten(2, (-1, 4)).mean((0, 1, 3, 4, 5))])
    height, width = pixels.shape[3] // 8, pixels.shape[4] // 8
    return groups[None, None, :, None, None].expand(1, 16, -1, height, width)


def raw(latents):
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    return latents * std + mean


def picture(colour, count=1):
    return torch.full((count, 32, 48, 3), colour)


def look(pictures):
    return pictures.mean().expand(1, 257, 1280)


def test_start_and_end_stand_in_a_grey_clip():
    condition = image_condition(picture(1.0), picture(0.0), SIZE, echo, look)
    frames = raw(condition.latents)
    torch.testing.assert_close(frames[0, 0, :, 0, 0], torch.tensor([1.0, 0.0, -0.25]))  # white, grey, 3 grey + black
    known = condition.known[0, :, :, 0, 0].T  # a row of four frames for each latent frame
    assert known.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert condition.known.shape == (1, 4, *SIZE)
    assert (condition.start == 1).all() and (condition.end == 0).all()


@pytest.mark.parametrize(
    "first, last, expected",
    [
        (1, 0, [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]),
        (0, 1, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]),
        (3, 2, [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]),
        (9, 0, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_known_frames(first, last, expected):
    assert known_frames(first, last, 9)[0, :, :, 0, 0].T.tolist() == expected


def test_no_picture_and_too_many():
    nothing = image_condition(None, None, SIZE, echo, look)
    assert not nothing.latents.any() and not nothing.known.any() and nothing.start is nothing.end is None
    with pytest.raises(InputError, match=r"8 \+ 2 frames, but the video only 9"):
        image_condition(picture(1.0, 8), picture(0.0, 2), SIZE, echo)


def test_control_and_reference_are_encoded():
    torch.testing.assert_close(raw(control_condition(picture(1.0, 9), echo).latents), torch.ones(1, 16, *SIZE))
    reference = reference_condition(picture(0.5), echo, look)
    torch.testing.assert_close(raw(reference.latents), torch.zeros(1, 16, 1, 4, 6), atol=1e-6, rtol=0)
    assert (reference.features == 0.5).all()


# ---- recorded runs of the reference -----------------------------------------------------------------------------


def golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key).float() for key in file.keys()}, json.loads(file.metadata()["config"])


def golden_network(name):
    tensors, config = golden(name)
    weights = {key[2:]: value for key, value in tensors.items() if key.startswith("w.")}
    with safe_open(GOLDEN / "img_emb_shared.safetensors", "pt") as file:
        weights |= {key: file.get_tensor(key).float() for key in file.keys()}
    trunk = DiT(DiTLayout(  # heads cannot be read from the shapes: the recorded models have heads of 24
        config["dim"], config["ffn_dim"], config["num_layers"], config["num_heads"], config["in_dim"],
        text_dim=config["text_dim"], frequency_dim=config["freq_dim"], image_tokens=True,
        image_positions=0, reference="ref_conv.weight" in weights,
    ))  # fmt: skip
    trunk.load_state_dict(weights)
    given = {key[3:]: value for key, value in tensors.items() if key.startswith("in.")}
    if "image_tokens" in given:  # in place of the large features that were made into them
        features = given["clip_feature"] = torch.randn(1, given["image_tokens"].shape[1], 1280)
        tokens = given["image_tokens"]
        trunk.img_emb.forward = lambda x: tokens if torch.equal(x, features) else torch.zeros(1, x.shape[1], 48)
    return Network(trunk), given, tensors["out"]


def answer(network, given, conditions):
    with torch.inference_mode():
        injection = inject(conditions, network, CANVAS)
        return network(given["latents"], given["timestep"], given["context"], injection)


def test_image_to_video_equals_the_reference():
    network, given, expected = golden_network("i2v")
    mask, latents = given["y"].split([4, 16], dim=1)
    condition = ImageCondition(latents, mask, given["clip_feature"])
    assert relative_error(answer(network, given, [condition]), expected) < 1e-5


def test_first_and_last_frame_equal_the_reference():
    network, given, expected = golden_network("flf2v_correct_split514")
    network.trunk.layout = dataclasses.replace(network.trunk.layout, image_positions=514)
    start, end = given["clip_feature"].chunk(2, dim=1)
    mask, latents = given["y"].split([4, 16], dim=1)
    assert relative_error(answer(network, given, [ImageCondition(latents, mask, start, end)]), expected) < 1e-5
    swapped = answer(network, given, [ImageCondition(latents, mask, end, start)])
    assert relative_error(swapped, expected) > 1e-3


def test_control_equals_the_reference():
    network, given, expected = golden_network("fun_control")
    control, latents = given["y"].split(16, dim=1)
    image = ImageCondition(latents, torch.ones(1, 4, *SIZE), given["clip_feature"])
    for conditions in ([ControlCondition(control), image], [image, ControlCondition(control)]):
        assert relative_error(answer(network, given, conditions), expected) < 1e-5


def test_reference_image_equals_the_reference_and_goes_before_the_start_image():
    network, given, expected = golden_network("fun_control_ref")
    control, latents = given["y"].split(16, dim=1)
    conditions = [
        ReferenceCondition(given["reference_latents"], given["clip_feature"]),
        ControlCondition(control),
        ImageCondition(latents, torch.ones(1, 4, *SIZE), torch.randn(1, 257, 1280)),
    ]
    assert relative_error(answer(network, given, conditions), expected) < 1e-5


# ---- which model takes what -------------------------------------------------------------------------------------

FAMILIES = {
    "t2v": {},
    "i2v": {"in_dim": 36, "image_tokens": True},
    "flf2v": {"in_dim": 36, "image_tokens": True, "image_positions": 514},
    "control": {"in_dim": 48, "image_tokens": True},
    "v1.1": {"in_dim": 48, "image_tokens": True, "reference": True},
    "camera": {"in_dim": 32, "image_tokens": True, "camera_channels": 24},
}


def network(family):
    torch.manual_seed(0)
    layout = DiTLayout(dim=128, ffn_dim=32, layers=1, heads=1, text_dim=16, frequency_dim=32, **FAMILIES[family])
    return Network(DiT(layout))


def image(start=1.0, end=None):
    pictures = [None if colour is None else picture(colour) for colour in (start, end)]
    return image_condition(*pictures, SIZE, echo, look)


CONTROL = ControlCondition(torch.randn(1, 16, *SIZE))
REFERENCE = ReferenceCondition(torch.randn(1, 16, 1, 4, 6), torch.randn(1, 257, 1280))


@pytest.mark.parametrize("family, conditions, tokens", [
    ("i2v", [image()], 257),
    ("i2v", [image(end=0.0)], 257),
    ("i2v", [image(None, None)], 257),
    ("flf2v", [image()], 257),
    ("flf2v", [image(end=0.0)], 514),
    ("flf2v", [image(None, 0.0)], 514),
    ("control", [CONTROL], 257),
    ("control", [CONTROL, image(end=0.0)], 257),
    ("control", [image()], 257),
    ("v1.1", [CONTROL, REFERENCE], 257),
    ("v1.1", [CONTROL, REFERENCE, image()], 257),
    ("camera", [image()], 257),
])  # fmt: skip
@torch.inference_mode()
def test_combinations_that_work(family, conditions, tokens):
    net = network(family)
    injection = inject(conditions, net, Canvas(2, *SIZE))
    assert injection.context_prefix.shape == (1, tokens, 128)
    x, text = torch.randn(2, 16, *SIZE), torch.zeros(2, 8, 16)
    assert net(x, torch.tensor([500.0]), text, injection).shape == x.shape


@pytest.mark.parametrize("family, conditions, sentence", [
    ("t2v", [image()], "takes no first or last image .it is a Text to Video model, in_dim 16.. Load an Image to Video"),
    ("t2v", [CONTROL], "takes no control video .*Load a Fun Control model or .* control LoRA, or remove"),
    ("i2v", [CONTROL], "it is an Image to Video or Fun InP model, in_dim 36"),
    ("control", [CONTROL, REFERENCE], "takes no reference image .*Load a Fun V1.1 Control model"),
    ("camera", [image(end=0.0)], "begins with one picture and takes no other"),
    ("i2v", [], "needs more than the text.*Connect Wan First / Last Image; without any picture"),
    ("v1.1", [REFERENCE], "Connect Wan Control Video or Wan First / Last Image"),
    ("i2v", [image(), image()], "Two conditions both set"),
    ("control", [CONTROL, CONTROL], "Two conditions both set the control frames"),
    ("v1.1", [CONTROL, REFERENCE, REFERENCE], "Two conditions both set"),
])  # fmt: skip
def test_combinations_that_are_refused(family, conditions, sentence):
    with pytest.raises((ModelError, InputError), match=sentence):
        inject(conditions, network(family), CANVAS)


@torch.inference_mode()
def test_a_vace_model_is_sent_to_its_own_node():
    net = network("t2v")
    net.vace = torch.nn.Identity()
    with pytest.raises(ModelError, match=r"it is a VACE model, in_dim 16.*Give it to Wan VACE in place of Wan Control"):
        inject([CONTROL], net, CANVAS)


def test_conditions_of_another_size_are_refused():
    other = Canvas(1, 5, 8, 8)
    sentence = "was prepared for 48x32 with 9 frames, but the video that is made needs 64x64 with 17 frames"
    for family, condition in (("i2v", image()), ("control", CONTROL)):
        with pytest.raises(InputError, match=sentence):
            inject([condition], network(family), other)
    with pytest.raises(InputError, match="The reference image was prepared for 48x32 with 1 frame,"):
        inject([REFERENCE], network("v1.1"), other)


@torch.inference_mode()
def test_a_camera_model_sees_the_first_frame_and_zeros():
    net = network("camera")
    frames = inject([image()], net, CANVAS).concat["image"]
    torch.testing.assert_close(raw(frames)[:, :, :1], torch.ones(1, 16, 1, 4, 6))
    assert not frames[:, :, 1:].any()
    assert not inject([image(None, None)], net, CANVAS).concat["image"].any()


@torch.inference_mode()
def test_what_is_not_given_is_neutral():
    net = network("control")
    fallback = neutral(net.trunk, CANVAS)
    with_control = inject([CONTROL], net, CANVAS)
    assert torch.equal(with_control.concat["image"], fallback.concat["image"])
    assert torch.equal(with_control.context_prefix, fallback.context_prefix)
    unseen = image_condition(picture(1.0), None, SIZE, echo)  # no image encoder
    assert torch.equal(inject([unseen], net, CANVAS).context_prefix, fallback.context_prefix)


# ---- the nodes --------------------------------------------------------------------------------------------------


class Engine:
    """Stands in for our VAE and image encoder."""

    def attached(self, device=None):
        return nullcontext(self)

    def working_room(self):
        return 0


class EchoVAE(Engine):
    encode = staticmethod(echo)

    def encoding_room(self, picture):
        return 0


class EchoEncoder(Engine):
    encode = staticmethod(look)


class CoreVAE:
    """As ComfyUI's: frames (F, H, W, 3) in 0..1 in, raw latents out."""

    first_stage_model = None

    def working_room(self):
        return 0

    def encode(self, images):
        return echo(images.movedim(-1, 0)[None] * 2 - 1)


class CoreClipVision:
    """As ComfyUI's; `width` 1280 is ViT-H."""

    def __init__(self, width=1280):
        self.width = width

    def encode_image(self, image, crop=True):
        assert crop is False
        return SimpleNamespace(penultimate_hidden_states=image.mean().expand(1, 257, self.width))


LATENT = {"samples": torch.zeros(1, 16, *SIZE)}


def conditions_of(node, **inputs):
    return node.execute(latent=LATENT, fit="cover", **inputs).args[0]


@pytest.mark.parametrize("vae, image_encoder", [(EchoVAE(), EchoEncoder()), (CoreVAE(), CoreClipVision())])
def test_nodes_make_and_chain_conditions(vae, image_encoder, capsys):
    engines = {"vae": vae, "image_encoder": image_encoder}
    first = conditions_of(ImageToVideo, start_image=picture(1.0), end_image=picture(0.0), **engines)
    torch.testing.assert_close(raw(first[0].latents)[0, 0, :, 0, 0], torch.tensor([1.0, 0.0, -0.25]))
    assert (first[0].start == 1).all() and (first[0].end == 0).all()
    second = conditions_of(ControlVideo, vae=vae, control_video=picture(1.0, 9), extend="hold", conditions=first)
    third = conditions_of(ReferenceImage, image=picture(1.0), conditions=second, **engines)
    assert [type(one) for one in third] == [ImageCondition, ControlCondition, ReferenceCondition]
    assert len(first) == 1 and third[0] is first[0]  # a new chain: the one given is as it was
    assert capsys.readouterr().err == ""


def test_nodes_fit_anything_and_say_so(capsys):
    colours = torch.rand(2, 20, 20, 4)
    conditions_of(ImageToVideo, vae=EchoVAE(), start_image=colours, image_encoder=EchoEncoder())
    assert "start_image: The images of 20x20 were fitted to 48x32 (cover)." in capsys.readouterr().err
    grey = torch.cat([picture(0.0, 2), picture(1.0)])[..., :1]
    (looped,) = conditions_of(ControlVideo, vae=EchoVAE(), control_video=grey, extend="loop")
    assert "control_video: The 3 frames are repeated to fill 9." in capsys.readouterr().err
    frames = raw(looped.latents)[0, 0, :, 0, 0]  # black; black white black black; white black black white
    torch.testing.assert_close(frames, torch.tensor([-1.0, -0.5, 0.0]))
    conditions_of(ReferenceImage, vae=EchoVAE(), image=picture(1.0, 2), image_encoder=EchoEncoder())
    assert "of 2 pictures the first one is used" in capsys.readouterr().err
    conditions_of(ImageToVideo, vae=EchoVAE(), start_image=picture(1.0))
    assert "has no image_encoder" in capsys.readouterr().err
    conditions_of(ImageToVideo, vae=EchoVAE())
    assert capsys.readouterr().err == ""


def test_nodes_refuse_other_encoders():
    with pytest.raises(InputError, match="1024.*needs those of CLIP ViT-H"):
        conditions_of(ImageToVideo, vae=EchoVAE(), start_image=picture(1.0), image_encoder=CoreClipVision(1024))
