"""The DiT against diffusers, against recorded runs of the reference, and at its true sizes without weights."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.adapters.vace import VACEResiduals
from comfyui_wanflow.wan_core.errors import ModelError
from comfyui_wanflow.wan_core.models import blocks
from comfyui_wanflow.wan_core.models import dit as dit_module
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.embedders import MotionController
from comfyui_wanflow.wan_core.models.layout import CONCAT, DiTLayout
from comfyui_wanflow.wan_core.models.rope import rope_table
from comfyui_wanflow.wan_core.models.slots import Run, Slots
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

DATA = Path(__file__).parent / "data"
MANIFEST = json.loads((DATA / "wan21_key_manifest.json").read_text())
TINY = DiTLayout(dim=256, ffn_dim=96, layers=2, heads=2, text_dim=24, frequency_dim=32)
IMAGE = dataclasses.replace(TINY, in_dim=36, image_tokens=True)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def random_dit(layout, seed=0):
    """Every parameter random, norms and biases too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    dit = DiT(layout)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, parameter.shape[-1] ** -0.5)
    return dit


def inputs(layout, batch=1, rows=512, real_rows=9, seed=1):
    """Latents, timesteps, and text that is zero after its real rows."""
    torch.manual_seed(seed)
    text = torch.zeros(batch, rows, layout.text_dim)
    text[:, :real_rows] = torch.randn(batch, real_rows, layout.text_dim)
    return torch.randn(batch, 16, 3, 6, 8), torch.linspace(900, 100, batch), text


# ---- recorded runs of the reference -----------------------------------------------------------------------------


def golden(name):
    """Tensors (stored in bf16, used in fp32) without their prefixes: {"w": {...}, "in": {...}, ...}, and the layout."""
    groups = {}
    with safe_open(DATA / "golden" / f"{name}.safetensors", "pt") as file:
        for key in file.keys():
            prefix, _, rest = key.partition(".")
            groups.setdefault(prefix, {})[rest] = file.get_tensor(key).float()
        metadata = {key: value for key, value in (file.metadata() or {}).items() if key in ("config", "scalars")}
    config = json.loads(metadata.get("config", "{}"))
    return groups, config, json.loads(metadata.get("scalars", "{}"))


def golden_layout(config, weights):
    return DiTLayout(  # heads cannot be read from the shapes: the recorded models have heads of 24
        dim=config["dim"], ffn_dim=config["ffn_dim"], layers=config["num_layers"], heads=config["num_heads"],
        in_dim=config["in_dim"], text_dim=config["text_dim"], frequency_dim=config["freq_dim"],
        image_tokens=config["has_image_input"], reference="ref_conv.weight" in weights,
        camera_channels=24 if "control_adapter.conv.weight" in weights else 0,
    )  # fmt: skip


def golden_slots(dit, groups):
    """The recorded inputs, brought to the slots by the model's own small networks."""
    given, slots = groups["in"], {}
    if "y" in given:
        wanted = CONCAT[dit.layout.in_dim]
        slots["concat"] = dict(zip(wanted, given["y"].split(list(wanted.values()), dim=1), strict=True))
    if "clip_feature" in given:
        slots["context_prefix"] = dit.img_emb(given["clip_feature"])
    if "image_tokens" in given:
        slots["context_prefix"] = given["image_tokens"]
    if "reference_latents" in given:
        slots["prefix_tokens"] = dit.ref_conv(given["reference_latents"][:, :, 0])[:, :, None]
    if "control_camera_latents_input" in given:
        slots["embed_add"] = dit.control_adapter(given["control_camera_latents_input"])
    if "motion_bucket_id" in given:
        controller = MotionController(dit.layout.frequency_dim, dit.layout.dim)
        controller.load_state_dict(groups["motion_controller"])
        slots["time_add"] = controller(given["motion_bucket_id"])
    return slots


GOLDEN = ["t2v", "i2v", "flf2v_correct_split514", "fun_control", "fun_control_ref", "fun_camera", "motion", "vace"]


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_recorded_reference(name):
    groups, config, scalars = golden(name)
    dit = DiT(golden_layout(config, groups["w"]))
    weights = groups["w"]
    if dit.layout.image_tokens:
        weights = weights | {f"img_emb.{key}": value for key, value in golden("img_emb_shared")[0]["img_emb"].items()}
    dit.load_state_dict(weights)
    with torch.inference_mode():
        slots = golden_slots(dit, groups)
        if "vace" in groups:
            layout = VACELayout.from_shapes({key: value.shape for key, value in groups["vace"].items()})
            vace = VACE(dataclasses.replace(layout, heads=2))
            vace.load_state_dict(groups["vace"])
            residuals = VACEResiduals(vace, groups["in"]["vace_context"], scalars["vace_scale"], dit.layout.layers)
            slots["block_residuals"] = (residuals,)
        given = groups["in"]
        got = dit(given["latents"], given["timestep"], given["context"], Slots(**slots))
    assert relative_error(got, groups["out"][""]) < 1e-5


# ---- diffusers --------------------------------------------------------------------------------------------------

TO_DIFFUSERS = [
    ("head.modulation", "scale_shift_table"), ("head.head", "proj_out"), ("modulation", "scale_shift_table"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_add_k_proj", "norm_added_k"),
    ("self_attn.", "attn1."), ("cross_attn.", "attn2."), (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."),
    (".o.", ".to_out.0."), (".ffn.0.", ".ffn.net.0.proj."), (".ffn.2.", ".ffn.net.2."), (".norm3.", ".norm2."),
]  # fmt: skip


def diffusers_name(name):
    for ours, theirs in TO_DIFFUSERS:
        name = name.replace(ours, theirs)
    return name


def diffusers_twin(dit):
    """The same weights in diffusers' transformer."""
    layout = dit.layout
    twin = WanTransformer3DModel(
        num_attention_heads=layout.heads, attention_head_dim=layout.dim // layout.heads, in_channels=layout.in_dim,
        out_channels=16, text_dim=layout.text_dim, freq_dim=layout.frequency_dim, ffn_dim=layout.ffn_dim,
        num_layers=layout.layers, image_dim=1280 if layout.image_tokens else None,
        added_kv_proj_dim=layout.dim if layout.image_tokens else None,
        pos_embed_seq_len=layout.image_positions or None,
    )  # fmt: skip
    twin.load_state_dict({diffusers_name(name): value for name, value in dit.state_dict().items()})
    return twin


def test_text_to_video_and_its_gradients_equal_diffusers():
    dit = random_dit(TINY)
    twin = diffusers_twin(dit)
    x, timestep, text = inputs(TINY, batch=2)
    got, expected = dit(x, timestep, text), twin(x, timestep, text, return_dict=False)[0]
    assert relative_error(got, expected) < 1e-5
    (got * x).sum().backward()
    (expected * x).sum().backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in dit.named_parameters():
        gradient = theirs[diffusers_name(name)].grad
        assert gradient.norm() > 0, name
        # the bias of a key moves every score alike, so its true gradient is (almost) nothing but rounding
        assert (parameter.grad - gradient).norm() < 1e-4 * gradient.norm() + 1e-3, name


@pytest.mark.parametrize(("layout", "tokens"), [(IMAGE, 257), (dataclasses.replace(IMAGE, image_positions=514), 514)])
def test_image_models_equal_diffusers(layout, tokens):
    dit = random_dit(layout)
    x, timestep, text = inputs(layout)
    mask, image = torch.randn(1, 4, 3, 6, 8), torch.randn(1, 16, 3, 6, 8)
    features = torch.randn(1, tokens, 1280)
    with torch.inference_mode():
        slots = Slots(concat={"image": image, "mask": mask}, context_prefix=dit.img_emb(features))
        got = dit(x, timestep, text, slots)
        pairs = features.reshape(-1, 257, 1280)  # diffusers takes the first and the last image as two rows
        beside = torch.cat([x, mask, image], dim=1)
        expected = diffusers_twin(dit)(beside, timestep, text, encoder_hidden_states_image=pairs, return_dict=False)[0]
    assert relative_error(got, expected) < 1e-5


# ---- the true sizes ---------------------------------------------------------------------------------------------


def manifest_shapes(row):
    """The manifest writes `blocks.{N}.…` once, with the number of blocks."""
    shapes = {}
    for key, (shape, count) in MANIFEST[row]["keys"].items():
        for n in range(count):
            shapes[key.replace("{N}", str(n))] = tuple(shape)
    return shapes


@pytest.mark.parametrize("row", [row for row in MANIFEST if "patch_embedding.weight" in MANIFEST[row]["keys"]])
def test_published_models_are_built_from_their_shapes(row):
    shapes, config = manifest_shapes(row), MANIFEST[row]["config"]
    layout = DiTLayout.from_shapes(shapes)
    assert layout == DiTLayout(
        dim=config["dim"], ffn_dim=config["ffn_dim"], layers=config["num_layers"], heads=config["num_heads"],
        in_dim=config["in_dim"], image_tokens=config["has_image_input"],
        image_positions=514 if config.get("has_image_pos_emb") else 0, reference=config.get("has_ref_conv", False),
        camera_channels=config.get("in_dim_control_adapter", 0),
    )  # fmt: skip
    with torch.device("meta"):
        dit = DiT(layout)
    assert {key: tuple(value.shape) for key, value in dit.state_dict().items()} == shapes


@pytest.mark.parametrize("row", ["vace-1.3b-module", "vace-14b-module"])
def test_published_vace_is_built_from_its_shapes(row):
    shapes = manifest_shapes(row)
    with torch.device("meta"):
        vace = VACE(VACELayout.from_shapes(shapes))
    assert {key: tuple(value.shape) for key, value in vace.state_dict().items()} == shapes
    layers = {"vace-1.3b-module": 30, "vace-14b-module": 40}[row]
    assert list(vace.places(layers)) == {30: list(range(0, 30, 2)), 40: list(range(0, 40, 5))}[layers]


def test_published_motion_controller_is_built():
    with torch.device("meta"):
        controller = MotionController(256, 1536)
    shapes = {key: tuple(value.shape) for key, value in controller.state_dict().items()}
    assert shapes == manifest_shapes("motion-controller-1.3b")


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"patch_embedding.weight": (5120, 36, 1, 2, 2)}, "Wan 2.2 A14B"),
        ({"patch_embedding.weight": (3072, 48, 1, 2, 2), "head.head.weight": (192, 3072)}, "Wan 2.2 TI2V-5B"),
        ({"patch_embedding.weight": (5120, 52, 1, 2, 2)}, "Wan 2.2 Fun"),
        ({"audio_injector.injector.0.q.weight": (5120, 5120)}, "Wan 2.2 S2V"),
        ({"face_adapter.fuser.0.weight": (5120, 5120)}, "Wan 2.2 Animate"),
        ({"audio_proj.proj1.weight": (512, 5120)}, "MultiTalk"),
        ({"patch_embedding.weight": (5120, 20, 1, 2, 2)}, "20 input channels"),
        ({"patch_embedding.weight": (96, 16, 1, 2, 2)}, "width 96"),
        ({"head.head.weight": None}, "no 'head.head.weight'"),
    ],
)
def test_other_families_are_refused_by_name(changes, family):
    shapes = manifest_shapes("t2v-14b") | changes
    with pytest.raises(ModelError, match=family):
        DiTLayout.from_shapes({key: shape for key, shape in shapes.items() if shape})


# ---- types, batches, hooks --------------------------------------------------------------------------------------


def test_the_width_of_image_features_is_read_from_the_tensors():
    layout = DiTLayout(dim=128, ffn_dim=64, layers=1, heads=1, in_dim=36, image_tokens=True, image_features=80)
    dit = DiT(layout)
    assert DiTLayout.from_shapes({name: tuple(x.shape) for name, x in dit.state_dict().items()}) == layout
    assert dit.img_emb(torch.zeros(1, 257, 80)).shape == (1, 257, 128)
    with pytest.raises(ModelError, match="1280 wide, but this model looks at 80"):
        dit.img_emb(torch.zeros(1, 257, 1280))


def test_weights_stored_narrow_compute_wide():
    dit = random_dit(IMAGE).bfloat16()
    x, timestep, text = inputs(IMAGE)
    slots = Slots(
        concat={"mask": torch.randn(1, 4, 3, 6, 8), "image": torch.randn(1, 16, 3, 6, 8)},
        context_prefix=dit.img_emb(torch.randn(1, 257, 1280)),
    )
    with torch.inference_mode():
        narrow = dit(x, timestep, text, slots)
        wide = dit.float()(x, timestep, text, slots)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, wide, rtol=0, atol=0)


def test_computes_in_bf16_when_told():
    dit = random_dit(TINY)
    x, timestep, text = inputs(TINY, batch=2)
    with torch.inference_mode():
        exact = dit(x, timestep, text)
        got = dit(x, timestep, text, run=Run(compute_dtype=torch.bfloat16))
    assert got.dtype == torch.float32
    assert 1e-4 < relative_error(got, exact) < 3e-2


def test_rows_of_a_batch_do_not_mix():
    dit = random_dit(TINY)
    x, timestep, text = inputs(TINY, batch=3)
    text[1, 4:] = 0  # one prompt shorter than the others
    with torch.inference_mode():
        together = dit(x, timestep, text)
        for i in range(3):
            alone = dit(x[i : i + 1], timestep[i : i + 1], text[i : i + 1])
            assert relative_error(together[i : i + 1], alone) < 1e-5
        one_time = dit(x, timestep[:1], text)
        assert relative_error(one_time, dit(x, timestep[:1].expand(3), text)) < 1e-6


@pytest.mark.parametrize(("rows", "real_rows"), [(512, 9), (512, 0), (512, 512), (9, 9), (20, 9), (600, 550)])
def test_equal_padding_rows_are_attended_as_one(monkeypatch, rows, real_rows):
    """Every padding row by itself, as the published models do it, gives the same video and the same gradients."""
    dit = random_dit(TINY)
    x, timestep, text = inputs(TINY, batch=2, rows=rows, real_rows=real_rows)
    text[1, real_rows // 2 :] = 0

    def result():
        dit.zero_grad()
        out = dit(x, timestep, text)
        (out * x).sum().backward()
        return out, [parameter.grad.clone() for parameter in dit.parameters()]

    short, short_gradients = result()
    padded = torch.nn.functional.pad(text, (0, 0, 0, max(0, 512 - rows)))
    monkeypatch.setattr(dit_module, "pad_text", lambda text: (padded, None))
    plain, plain_gradients = result()
    assert relative_error(short, plain) < 1e-5
    for got, expected in zip(short_gradients, plain_gradients, strict=True):
        assert (got - expected).norm() < 1e-4 * expected.norm() + 1e-3


def test_checkpointing_goes_around_every_block():
    dit = random_dit(TINY)
    x, timestep, text = inputs(TINY)
    seen = []

    def around(module, *args):
        seen.append(module)
        return checkpoint(module, *args, use_reentrant=False)

    dit(x, timestep, text).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in dit.parameters()]
    dit.zero_grad()
    dit(x, timestep, text, run=Run(around=around)).square().mean().backward()
    assert seen == list(dit.blocks)
    for parameter, gradient in zip(dit.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("layout", [TINY, dataclasses.replace(TINY, in_dim=36, image_tokens=True)])
def test_work_in_pieces_gives_the_same(monkeypatch, layout):
    """Without autograd results are written over inputs, and layers, norms and rotations take some tokens at a time."""
    dit = random_dit(layout)
    x, timestep, text = inputs(layout, batch=2)
    originals = x.clone(), text.clone()
    slots = Slots()
    if layout.image_tokens:
        beside = {"mask": torch.randn(2, 4, *x.shape[2:]), "image": torch.randn(2, 16, *x.shape[2:])}
        slots = Slots(concat=beside, context_prefix=torch.randn(2, 5, layout.dim))
    expected = dit(x, timestep, text, slots)
    with torch.inference_mode():
        whole = dit(x, timestep, text, slots)
        monkeypatch.setattr(blocks, "ROPE_TOKENS", 5)
        assert torch.equal(dit(x, timestep, text, slots), whole)
        monkeypatch.setattr(blocks, "PRODUCT_TOKENS", 7)
        pieces = dit(x, timestep, text, slots)
    assert torch.equal(x, originals[0]) and torch.equal(text, originals[1])
    assert relative_error(pieces, whole) < 1e-5
    assert relative_error(whole, expected) < 1e-5


@pytest.mark.parametrize("image_tokens", [False, True])
def test_what_follows_from_the_text_alone_is_worked_out_once(image_tokens):
    layout = dataclasses.replace(TINY, image_tokens=image_tokens)
    if image_tokens:
        layout = dataclasses.replace(layout, in_dim=36)
    dit, calls = random_dit(layout), []
    for block in dit.blocks:
        for name in ("k", "v") + (("k_img", "v_img") if image_tokens else ()):
            getattr(block.cross_attn, name).register_forward_hook(lambda *_: calls.append(1))
    x, timestep, text = inputs(layout)
    slots = Slots()
    if image_tokens:
        beside = {"mask": torch.randn(1, 4, *x.shape[2:]), "image": torch.randn(1, 16, *x.shape[2:])}
        slots = Slots(concat=beside, context_prefix=torch.randn(1, 5, layout.dim))
    with torch.inference_mode():
        expected = [dit(noisy, timestep, text, slots) for noisy in (x, x + 1)]
        plain, kept = len(calls), {}
        for noisy, answer in zip((x, x + 1), expected, strict=True):
            assert torch.equal(dit(noisy, timestep, text, slots, Run(kept=kept)), answer)
    assert len(calls) == plain + plain // 2


def test_a_cache_may_replace_the_body():
    dit = random_dit(TINY)
    x, timestep, text = inputs(TINY)
    change = []

    def remember(advance, tokens):
        before = tokens.clone()
        after = advance(tokens)  # writes over what it is given
        change.append(after - before)
        return after

    with torch.inference_mode():
        full = dit(x, timestep, text, run=Run(body=remember))
        reused = dit(x, timestep, text, run=Run(body=lambda advance, tokens: tokens + change[0]))
    assert relative_error(reused, full) < 1e-5


def test_training_after_inference_on_the_same_grid():
    """The position tables are kept between calls, and ComfyUI's calls run in inference mode."""
    dit = random_dit(TINY)
    x, timestep, text = inputs(TINY)
    rope_table.cache_clear()
    with torch.inference_mode():
        dit(x, timestep, text)
    dit(x, timestep, text).sum().backward()


def test_fresh_weights_are_ready_for_training():
    torch.manual_seed(0)
    dit = DiT(TINY)
    x, timestep, text = inputs(TINY)
    assert dit(x, timestep, text).abs().max() == 0  # the head starts at nothing, the rest does not
    assert all(block.ffn[0].weight.std() > 0 and block.modulation.std() > 0 for block in dit.blocks)
    assert torch.isfinite(torch.cat([p.flatten() for p in dit.parameters()])).all()
