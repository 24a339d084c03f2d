"""How conditions add up, what fills the rest, and what the trunk makes of it."""

import dataclasses

import pytest
import torch
from comfyui_wanflow.wan_core.adapters.injection import Canvas, Injection, Rank, neutral, total
from comfyui_wanflow.wan_core.adapters.vace import VACEResiduals
from comfyui_wanflow.wan_core.errors import InputError, ModelError
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import CONCAT, DiTLayout
from comfyui_wanflow.wan_core.models.slots import Run
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout

TINY = DiTLayout(dim=256, ffn_dim=64, layers=3, heads=2, text_dim=16, frequency_dim=32)
CANVAS = Canvas(rows=1, frames=5, height=4, width=6)


def random_weights(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, parameter.shape[-1] ** -0.5)
    return module


def random_dit(**changes):
    return random_weights(DiT(dataclasses.replace(TINY, **changes)))


def frames(channels, count=CANVAS.frames, rows=1):
    return torch.randn(rows, channels, count, CANVAS.height, CANVAS.width)


def patches(count=CANVAS.frames, rows=1):
    return torch.randn(rows, TINY.dim, count, CANVAS.height // 2, CANVAS.width // 2)


def predict(dit, x, injection, seed=1):
    torch.manual_seed(seed)
    text = torch.randn(1, 6, TINY.text_dim).expand(x.shape[0], -1, -1)
    with torch.inference_mode():
        return dit(x, torch.full((1,), 500.0), text, injection)


# ---- sums -------------------------------------------------------------------------------------------------------


def test_a_sum_holds_what_each_condition_gave():
    parts = [
        Injection(concat={"control": frames(16)}),
        Injection(concat={"image": frames(16)}, context_prefix=torch.ones(1, 257, 4), context_rank=Rank.IMAGE),
        Injection(embed_add=patches()),
        Injection(prefix_tokens=patches(1)),
        Injection(time_add=torch.ones(1, 6, 4)),
        Injection(block_residuals=("first",)),
        Injection(block_residuals=("second",), prefix_frames=frames(16, 1)),
    ]
    summed = sum(parts, Injection())
    assert set(summed.concat) == {"control", "image"}
    assert summed.embed_add is parts[2].embed_add and summed.prefix_tokens is parts[3].prefix_tokens
    assert summed.time_add is parts[4].time_add and summed.prefix_frames is parts[6].prefix_frames
    assert summed.block_residuals == ("first", "second")
    assert summed.prefix == 1


@pytest.mark.parametrize(
    ("slot", "value", "words"),
    [
        ("concat", {"image": frames(16)}, "the image frames"),
        ("embed_add", patches(), "the camera"),
        ("prefix_tokens", patches(1), "the reference image"),
        ("context_prefix", torch.ones(1, 257, 4), "the image features"),
        ("time_add", torch.ones(1, 6, 4), "the motion speed"),
        ("prefix_frames", frames(16, 1), "the frames in front"),
    ],
)
def test_two_conditions_that_want_one_slot_are_refused(slot, value, words):
    injection = Injection(**{slot: value})
    with pytest.raises(InputError, match=f"both set {words}.*remove one"):
        injection + injection


def test_the_reference_image_is_looked_at_rather_than_the_first():
    image = Injection(context_prefix=torch.ones(1, 257, 4), context_rank=Rank.IMAGE)
    reference = Injection(context_prefix=torch.zeros(1, 257, 4), context_rank=Rank.REFERENCE)
    for summed in (image + reference, reference + image, Injection() + reference + image):
        assert summed.context_prefix is reference.context_prefix
        assert summed.context_rank == Rank.REFERENCE


# ---- complete injections ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_dim", list(CONCAT))
def test_neutral_is_complete_for_every_model(in_dim):
    dit = random_dit(in_dim=in_dim, image_tokens=in_dim != 16)
    assert predict(dit, frames(16), total([], neutral(dit, CANVAS))).shape == (1, 16, 5, 4, 6)


def test_neutral_gives_way():
    dit = random_dit(in_dim=48, image_tokens=True)
    control, tokens = frames(16), torch.randn(1, 257, TINY.dim)
    given = Injection(concat={"control": control}, context_prefix=tokens, context_rank=Rank.IMAGE)
    filled = total([given], neutral(dit, CANVAS))
    assert torch.equal(filled.concat["control"], control) and filled.context_prefix is tokens
    assert filled.concat["image"].abs().max() == 0


def test_frames_in_front_move_the_others_back():
    dit = random_dit(in_dim=32, image_tokens=True)
    image, camera = frames(16), patches()
    given = [Injection(concat={"image": image}), Injection(embed_add=camera), Injection(prefix_frames=frames(16, 2))]
    filled = total(given, neutral(dit, CANVAS))
    for slot, original in ((filled.concat["image"], image), (filled.embed_add, camera)):
        assert slot.shape[2] == 7
        assert slot[:, :, :2].abs().max() == 0 and torch.equal(slot[:, :, 2:], original)
    assert predict(dit, frames(16, 7), filled).shape[2] == 7


def test_a_window_cuts_frames_and_keeps_the_prefix():
    image, camera, context = frames(16), patches(), frames(96, 7)
    given = Injection(
        concat={"image": image}, embed_add=camera, prefix_frames=frames(16, 2), prefix_tokens=patches(1),
        block_residuals=(VACEResiduals(None, context, 1.0, 3, prefix=2),),
    )  # fmt: skip
    window = given.fill(Injection()).frames(torch.arange(1, 4))
    assert torch.equal(window.concat["image"][:, :, 2:], image[:, :, 1:4])
    assert torch.equal(window.embed_add[:, :, 2:], camera[:, :, 1:4])
    assert window.concat["image"].shape[2] == window.embed_add.shape[2] == 5
    assert window.prefix_frames is given.prefix_frames and window.prefix_tokens is given.prefix_tokens
    cut = window.block_residuals[0].context
    assert torch.equal(cut, torch.cat([context[:, :, :2], context[:, :, 3:6]], dim=2))


# ---- the trunk --------------------------------------------------------------------------------------------------


def test_every_slot_reaches_the_prediction():
    dit = random_dit(in_dim=32, image_tokens=True)
    x = frames(16)
    rest = neutral(dit, CANVAS)
    plain = predict(dit, x, rest)
    for given in (
        Injection(concat={"image": frames(16)}),
        Injection(embed_add=patches()),
        Injection(prefix_tokens=patches(2)),
        Injection(context_prefix=torch.randn(1, 30, TINY.dim)),
        Injection(time_add=torch.randn(1, 6, TINY.dim)),
    ):
        changed = predict(dit, x, given.fill(rest))
        assert changed.shape == plain.shape
        assert (changed - plain).norm() > 1e-3 * plain.norm()


def test_merged_guidance_is_a_batch_of_text_rows():
    """One row serves all; b rows are repeated as a whole, once for every branch."""
    dit = random_dit(in_dim=32, image_tokens=True)
    x = frames(16, rows=2)
    own = total(
        [Injection(concat={"image": frames(16, rows=2)}), Injection(embed_add=patches())],
        neutral(dit, dataclasses.replace(CANVAS, rows=2)),
    )
    apart = predict(dit, x, own)
    merged = predict(dit, torch.cat([x, x]), own)
    torch.testing.assert_close(merged, torch.cat([apart, apart]), rtol=1e-4, atol=1e-5)


def test_missing_inputs_are_named():
    with pytest.raises(ModelError, match="in_dim 36.*reads mask \\+ image.*given nothing"):
        predict(random_dit(in_dim=36, image_tokens=True), frames(16), Injection())
    with pytest.raises(ModelError, match="in_dim 16.*reads nothing.*given image"):
        predict(random_dit(), frames(16), Injection(concat={"image": frames(16)}))
    with pytest.raises(ModelError, match="looks at an image"):
        predict(random_dit(in_dim=32, image_tokens=True), frames(16), Injection(concat={"image": frames(16)}))
    with pytest.raises(ModelError, match="looks at no image.*given one"):
        predict(random_dit(), frames(16), Injection(context_prefix=torch.randn(1, 257, TINY.dim)))


# ---- VACE -------------------------------------------------------------------------------------------------------


def test_vace_hints_scale_and_skip_reference_frames():
    dit = random_dit()
    vace = random_weights(VACE(VACELayout(dim=TINY.dim, ffn_dim=TINY.ffn_dim, layers=2, heads=2)))
    x, context, reference = frames(16), frames(96), patches(1)

    def with_strength(strength, prefix_tokens=None):
        residuals = VACEResiduals(vace, context, strength, TINY.layers)
        return predict(dit, x, Injection(block_residuals=(residuals,), prefix_tokens=prefix_tokens))

    plain = predict(dit, x, Injection())
    torch.testing.assert_close(with_strength(0.0), plain)
    assert (with_strength(1.0) - plain).norm() > 1e-2 * plain.norm()
    assert with_strength(1.0, reference).shape == plain.shape  # zeros stand for the frame the trunk has in front
    batch = Injection(block_residuals=(VACEResiduals(vace, context, 1.0, TINY.layers),))
    torch.testing.assert_close(predict(dit, torch.cat([x, x]), batch)[1:], with_strength(1.0), rtol=1e-4, atol=1e-5)


def test_vace_runs_only_as_far_as_the_trunk_asks():
    """A cache that leaves the body out must not pay for hints, and each block goes through `around`."""
    dit = random_dit()
    vace = random_weights(VACE(VACELayout(dim=TINY.dim, ffn_dim=TINY.ffn_dim, layers=2, heads=2)))
    injection = Injection(block_residuals=(VACEResiduals(vace, frames(96), 1.0, TINY.layers),))
    seen = []

    def around(module, *args):
        seen.append(module)
        return module(*args)

    x, text = frames(16), torch.randn(1, 6, TINY.text_dim)
    with torch.inference_mode():
        dit(x, torch.tensor([500.0]), text, injection, Run(around=around))
        assert seen == [vace.vace_blocks[0], dit.blocks[0], dit.blocks[1], dit.blocks[2], vace.vace_blocks[1]]
        seen.clear()
        dit(x, torch.tensor([500.0]), text, injection, Run(around=around, body=lambda advance, tokens: tokens))
    assert seen == []
