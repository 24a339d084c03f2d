"""VACE: from the user's video, mask and pictures to the model's answer, against the reference and diffusers."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import torch.utils.checkpoint
from comfyui_wanflow.wan_core.adapters.injection import Canvas, inject
from comfyui_wanflow.wan_core.adapters.vace import VACECondition, fold_mask, vace_condition
from comfyui_wanflow.wan_core.errors import InputError, ModelError
from comfyui_wanflow.wan_core.loading.keymaps import published_names
from comfyui_wanflow.wan_core.model import WanModel
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.network import Network
from comfyui_wanflow.wan_core.models.slots import Run
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.models.vae import VideoVAE, normalised
from comfyui_wanflow.wan_core.offload.residency import Residency
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "data" / "golden" / "vace.safetensors"
SIZE = (3, 4, 6)  # T, h, w: 9 frames of 48x32 pixels
CANVAS = Canvas(1, *SIZE)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def means(pixels):
    """Stands in for the VAE: the mean colour of what lies under a latent pixel, times the channel's number."""
    first, rest = pixels[:, :, :1], pixels[:, :, 1:]
    grouped = torch.cat([first, rest.unflatten(2, (-1, 4)).mean(3)], dim=2).mean(1, keepdim=True)
    return torch.nn.functional.avg_pool3d(grouped, (1, 8, 8)) * torch.arange(1, 17).view(1, 16, 1, 1, 1)


# ---- what video, mask and pictures become -----------------------------------------------------------------------


def test_the_mask_parts_the_video():
    video, mask = torch.rand(9, 32, 48, 3), torch.zeros(9, 32, 48)
    mask[:, :16] = 1  # the upper half is made anew
    condition = vace_condition(video, mask, None, SIZE, means)
    whole, grey = normalised(means(video.movedim(-1, 0)[None] * 2 - 1)), normalised(torch.zeros(1, 16, *SIZE))
    torch.testing.assert_close(condition.changed[..., :2, :], whole[..., :2, :])
    torch.testing.assert_close(condition.changed[..., 2:, :], grey[..., 2:, :])
    torch.testing.assert_close(condition.kept[..., :2, :], grey[..., :2, :])
    torch.testing.assert_close(condition.kept[..., 2:, :], whole[..., 2:, :])
    assert (condition.mask[..., :2, :] == 1).all() and (condition.mask[..., 2:, :] == 0).all()


def test_without_video_all_is_grey_and_without_mask_all_is_made():
    condition = vace_condition(None, None, None, SIZE, means)
    grey = normalised(torch.zeros(1, 16, *SIZE))
    assert torch.equal(condition.kept, grey) and torch.equal(condition.changed, grey)
    assert condition.mask.shape == (1, 64, *SIZE) and (condition.mask == 1).all()
    assert condition.references is None


def test_soft_edges_share_the_video():
    condition = vace_condition(torch.ones(9, 32, 48, 3), torch.full((9, 32, 48), 0.25), None, SIZE, means)
    ones = means(torch.ones(1, 3, 9, 32, 48))
    torch.testing.assert_close(condition.kept, normalised(0.75 * ones))
    torch.testing.assert_close(condition.changed, normalised(0.25 * ones))
    assert (condition.mask == 0.25).all()


def test_the_mask_keeps_every_pixel_and_every_second_frame_of_a_group():
    mask = torch.zeros(9, 32, 48)
    mask[4, 8 * 2 + 3, 8 * 5 + 6] = 1
    folded = fold_mask(mask)
    assert folded.nonzero().tolist() == [[0, 8 * 3 + 6, 1, 2, 5]]  # latent frame 1 looks at frames 3, 4, 5: the middle
    assert not fold_mask(mask.roll(1, 0)).any()


def test_pictures_are_encoded_one_by_one_in_their_order():
    pictures = torch.stack([torch.full((32, 48, 3), colour) for colour in (0.0, 0.5, 1.0)])
    references = vace_condition(None, None, pictures, SIZE, means).references
    expected = [normalised(means(torch.full((1, 3, 1, 32, 48), colour))) for colour in (-1.0, 0.0, 1.0)]
    torch.testing.assert_close(references, torch.cat(expected, dim=2))


# ---- the recorded run of the reference --------------------------------------------------------------------------


@torch.inference_mode()
def test_the_answer_equals_the_reference_s():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}
        config, scalars = (json.loads(file.metadata()[key]) for key in ("config", "scalars"))
    trunk = DiT(DiTLayout(  # heads cannot be read from the shapes: the recorded models have heads of 24
        config["dim"], config["ffn_dim"], config["num_layers"], config["num_heads"], text_dim=config["text_dim"],
        frequency_dim=config["freq_dim"],
    ))  # fmt: skip
    trunk.load_state_dict({key[2:]: value for key, value in tensors.items() if key.startswith("w.")})
    vace = VACE(VACELayout(config["dim"], config["ffn_dim"], 2, config["num_heads"]))
    vace.load_state_dict({key[5:]: value for key, value in tensors.items() if key.startswith("vace.")})
    network = Network(trunk, vace)
    given = {key[3:]: value for key, value in tensors.items() if key.startswith("in.")}
    context = given["vace_context"].split([16, 16, 64], dim=1)
    injection = inject([VACECondition(*context, strength=scalars["vace_scale"])], network, CANVAS)
    got = network(given["latents"], given["timestep"], given["context"], injection)
    assert relative_error(got, tensors["out"]) < 1e-5
    plain = network(given["latents"], given["timestep"], given["context"], inject([], network, CANVAS))
    assert relative_error(plain, tensors["out"]) > 1e-2  # VACE may stay silent, and its hints count when it does not


# ---- whole runs against diffusers -------------------------------------------------------------------------------


class Euler(diffusers.FlowMatchEulerDiscreteScheduler):
    """At the noise levels of the published code, which diffusers' own spaces a little differently."""

    def set_timesteps(self, steps, device=None):
        super().set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)


@pytest.fixture(scope="module")
def twins():
    """diffusers' pipeline, and our model and VAE with the same small random weights."""
    torch.manual_seed(0)
    transformer = diffusers.WanVACETransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=24, freq_dim=32,
        ffn_dim=64, num_layers=4, vace_layers=[0, 2], vace_in_channels=96,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, parameter.shape[-1] ** -0.5)
    their_vae = diffusers.AutoencoderKLWan(base_dim=8).requires_grad_(False)
    pipeline = diffusers.WanVACEPipeline(
        tokenizer=None, text_encoder=None, vae=their_vae, transformer=transformer.eval(),
        scheduler=Euler(shift=5.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    state = {name: tensor for name, tensor in transformer.state_dict().items() if name != "rope.freqs"}
    weights = {name: state[stored] for name, stored in published_names(state).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    vace = VACE(VACELayout.from_shapes(shapes)).eval()
    layout = DiTLayout.from_shapes(shapes)
    trunk = DiT(layout).eval()
    for module in (trunk, vace):
        module.load_state_dict({name: weights.pop(name) for name in list(module.state_dict())})
    assert not weights
    model = WanModel(
        module=Network(trunk), name="small", device=torch.device("cpu"), compute_dtype=torch.float32,
        residency=Residency(trunk), layout=layout,
    ).with_module(vace)  # fmt: skip

    our_vae = VideoVAE(8).requires_grad_(False)
    state = their_vae.state_dict()
    our_vae.load_state_dict({name: state[stored] for name, stored in published_names(state).items()})
    return pipeline, model, our_vae


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_whole_runs_equal_diffusers(twins, pictures):
    pipeline, model, vae = twins
    generator = torch.Generator().manual_seed(7)
    video = torch.rand(5, 32, 48, 3, generator=generator)
    mask = (torch.rand(5, 32, 48, generator=generator) > 0.5).float()
    references = torch.rand(pictures, 32, 48, 3, generator=generator).mul(255).round() / 255
    texts = torch.randn(2, 1, 512, 24, generator=generator)
    settings = Settings(seed=3, steps=3, cfg=4.0, shift=5.0)

    size = (2, 4, 6)
    condition = vace_condition(video, mask, references if pictures else None, size, vae.encode, strength=0.7)
    empty = torch.zeros(1, 16, *size)
    got = sample(model, texts[0], texts[1], empty, settings, [condition])

    noise = torch.Generator().manual_seed(3)  # the canvas's first, then that of the frames in front
    latents = torch.randn(1, 16, *size, generator=noise)
    front = torch.randn(1, 16, pictures, *size[1:], generator=noise)
    images = [diffusers.image_processor.VaeImageProcessor.numpy_to_pil(x.numpy())[0] for x in references]
    expected = pipeline(
        prompt_embeds=texts[0], negative_prompt_embeds=texts[1], video=[video.movedim(-1, 1)],
        mask=[mask[:, None].expand(-1, 3, -1, -1)], reference_images=images[::-1] or None,  # diffusers reverses them
        conditioning_scale=0.7, height=32, width=48, num_frames=5, num_inference_steps=3, guidance_scale=4.0,
        latents=torch.cat([front, latents], dim=2), output_type="latent",
    ).frames  # fmt: skip
    assert relative_error(normalised(got), expected[:, :, pictures:]) < 1e-4


def test_merged_guidance_and_batches_keep_their_video(twins):
    _, model, vae = twins
    condition = vace_condition(torch.rand(5, 32, 48, 3), None, torch.rand(1, 32, 48, 3), (2, 4, 6), vae.encode)
    texts, canvas = torch.randn(2, 1, 9, 24), torch.zeros(2, 16, 2, 4, 6)
    apart = sample(model, texts[0], texts[1], canvas, Settings(seed=3, steps=2), [condition])
    merged = sample(model, texts[0], texts[1], canvas, Settings(seed=3, steps=2, cfg_merge=True), [condition])
    assert relative_error(merged, apart) < 1e-5
    assert relative_error(apart[1], apart[0]) > 0.1


# ---- which model takes it ---------------------------------------------------------------------------------------


def network(vace_layers=2):
    torch.manual_seed(0)
    trunk = DiT(DiTLayout(dim=128, ffn_dim=32, layers=4, heads=1, text_dim=16, frequency_dim=32))
    return Network(trunk, VACE(VACELayout(dim=128, ffn_dim=32, layers=vace_layers, heads=1)) if vace_layers else None)


def random_condition(references=0):
    pictures = torch.randn(1, 16, references, *SIZE[1:]) if references else None
    return VACECondition(torch.randn(1, 16, *SIZE), torch.randn(1, 16, *SIZE), torch.rand(1, 64, *SIZE), pictures)


@torch.inference_mode()
def test_two_conditions_add_their_hints_and_one_may_have_pictures():
    net, canvas = network(), Canvas(2, *SIZE)
    injection = inject([random_condition(), random_condition(references=2)], net, canvas)
    assert injection.prefix == 2
    x, text = torch.randn(2, 16, 5, *SIZE[1:]), torch.zeros(2, 8, 16)
    assert net(x, torch.tensor([500.0]), text, injection).shape == x.shape
    window = injection.frames(torch.arange(1, 3))
    assert net(x[:, :, :4], torch.tensor([500.0]), text, window).shape == (2, 16, 4, *SIZE[1:])


def test_vace_can_be_trained_while_the_trunk_rests():
    net = network()
    net.trunk.requires_grad_(False)
    injection = inject([random_condition(references=1)], net, CANVAS)
    x, text = torch.randn(1, 16, 4, *SIZE[1:]), torch.zeros(1, 8, 16)
    torch.nn.init.normal_(net.trunk.head.head.weight)  # fresh heads answer nothing
    net(x, torch.tensor([500.0]), text, injection, Run(around=checkpointed)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.vace.parameters())
    assert net.vace.vace_patch_embedding.weight.grad.any() and net.vace.vace_blocks[1].after_proj.weight.grad.any()
    assert not any(parameter.grad is not None for parameter in net.trunk.parameters())


def checkpointed(module, *arguments):
    return torch.utils.checkpoint.checkpoint(module, *arguments, use_reentrant=False)


def test_misfits_are_refused():
    with pytest.raises(ModelError, match="takes no VACE video, mask or reference image .*Add Wan Module, or remove"):
        inject([random_condition()], network(vace_layers=0), CANVAS)
    with pytest.raises(InputError, match="The VACE video was prepared for 48x32 with 9 frames"):
        inject([random_condition()], network(), Canvas(1, 3, 4, 8))
    with pytest.raises(InputError, match="Two conditions both set the frames in front"):
        inject([random_condition(1), random_condition(1)], network(), CANVAS)
