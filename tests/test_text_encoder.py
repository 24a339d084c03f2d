"""UMT5 against transformers, against a recorded run of the reference, and at its true size without weights."""

import json
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.wan_core.errors import ModelError
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout, position_buckets
from safetensors.torch import load_file
from transformers import UMT5Config, UMT5EncoderModel

DATA = Path(__file__).parent / "data"
TINY = UMT5Layout(vocabulary=50, dim=48, attention_dim=32, ffn_dim=40, heads=2, layers=3)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def random_encoder(layout, seed=0):
    torch.manual_seed(seed)
    encoder = UMT5Encoder(layout)
    for parameter in encoder.parameters():  # norms too, so that a forgotten weight shows
        torch.nn.init.normal_(parameter, mean=0.0, std=0.3)
    return encoder.eval()


def transformers_twin(encoder):
    """The same weights in transformers' UMT5."""
    layout = encoder.layout
    twin = UMT5EncoderModel(
        UMT5Config(
            vocab_size=layout.vocabulary,
            d_model=layout.dim,
            d_kv=layout.attention_dim // layout.heads,
            d_ff=layout.ffn_dim,
            num_layers=layout.layers,
            num_heads=layout.heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
    )
    names = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    inside = {
        "attn": "layer.0.SelfAttention", "norm1": "layer.0.layer_norm", "norm2": "layer.1.layer_norm",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0", "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
    }  # fmt: skip
    state = {}
    for name, tensor in encoder.state_dict().items():
        if name not in names:
            for ours, theirs in inside.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            name = "encoder.block" + name.removeprefix("blocks")
        state[names.get(name, name)] = tensor
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    twin.load_state_dict(state)
    return twin.eval()


@torch.no_grad()
def test_equals_transformers():
    encoder = random_encoder(TINY)
    tokens = torch.randint(0, TINY.vocabulary, (2, 300))  # long enough for the last position bucket
    mask = torch.ones_like(tokens)
    mask[1, 170:] = 0
    expected = transformers_twin(encoder)(tokens, attention_mask=mask).last_hidden_state * mask[..., None]
    assert relative_error(encoder(tokens, mask), expected) <= 1e-5


@torch.no_grad()
def test_equals_the_recorded_reference():
    golden = load_file(DATA / "golden" / "t5.safetensors")
    state = {name.removeprefix("w."): tensor.float() for name, tensor in golden.items() if name.startswith("w.")}
    layout = UMT5Layout.from_shapes({name: tuple(tensor.shape) for name, tensor in state.items()})
    assert layout == UMT5Layout(100, dim=32, attention_dim=32, ffn_dim=48, heads=4, layers=2)
    encoder = UMT5Encoder(layout)
    encoder.load_state_dict(state)
    mask = golden["in.mask"]
    assert relative_error(encoder(golden["in.ids"], mask), golden["out"] * mask[..., None]) <= 1e-5


@torch.no_grad()
def test_padding_changes_nothing_and_is_zero():
    encoder = random_encoder(TINY)
    tokens = torch.randint(0, TINY.vocabulary, (1, 12))
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, 7:] = 0
    padded = encoder(tokens, mask)
    assert relative_error(padded[:, :7], encoder(tokens[:, :7], mask[:, :7])) <= 1e-6
    assert padded[:, 7:].count_nonzero() == 0


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_storage_computes_in_float32(stored):
    encoder = random_encoder(TINY).to(stored)
    wide = UMT5Encoder(TINY)
    wide.load_state_dict({name: tensor.float() for name, tensor in encoder.state_dict().items()})
    tokens = torch.randint(0, TINY.vocabulary, (1, 9))
    out = encoder(tokens, torch.ones_like(tokens))
    assert out.dtype == torch.float32
    assert relative_error(out, wide(tokens, torch.ones_like(tokens))) <= 1e-6
    assert encoder(tokens, torch.ones_like(tokens), torch.bfloat16).dtype == torch.bfloat16


def test_every_parameter_learns():
    encoder = random_encoder(TINY)
    tokens = torch.randint(0, TINY.vocabulary, (2, 20))
    encoder(tokens, torch.ones_like(tokens)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


def test_buckets_by_hand():
    row = position_buckets(200, 32, torch.device("cpu"))
    assert row[10, 10] == 0 and row[10, 9] == 1 and row[10, 11] == 17  # the same, one back, one ahead
    assert row[0, 7] == 23 and row[0, 8] == 24  # the last exact one, the first logarithmic one
    assert row[199, 0] == 15 and row[0, 199] == 31  # far


def published_shapes(name):
    """The tensors of a published file, from the manifest's `blocks.{N}.…` rows: [shape, count]."""
    rows = json.loads((DATA / "wan21_key_manifest.json").read_text())[name]["keys"]
    return {
        key.replace("{N}", str(block)): tuple(shape)
        for key, (shape, count) in rows.items()
        for block in range(count)
    }  # fmt: skip


def test_the_published_encoder_builds_with_exactly_its_keys():
    shapes = published_shapes("umt5-xxl-encoder")
    layout = UMT5Layout.from_shapes(shapes)
    assert layout == UMT5Layout()
    with torch.device("meta"):
        encoder = UMT5Encoder(layout)
    assert {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()} == shapes


def test_another_kind_of_file_is_refused_in_words():
    with pytest.raises(ModelError, match="not a UMT5 text encoder.*token_embedding"):
        UMT5Layout.from_shapes({"patch_embedding.weight": (1536, 16, 1, 2, 2)})
