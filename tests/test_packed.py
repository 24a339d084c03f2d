"""Weights that stay packed: fp8 with scales in every form, nvfp4, mxfp8, and GGUF's block types."""

import json

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from comfyui_wanflow.wan_core.errors import FileError
from comfyui_wanflow.wan_core.loading.checkpoint import open_checkpoint
from comfyui_wanflow.wan_core.loading.load import (
    add_module,
    load_image_encoder,
    load_model,
    load_text_encoder,
    load_vae,
)
from comfyui_wanflow.wan_core.models import ggml, packed
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.image_encoder import ImageEncoder, ImageEncoderLayout
from comfyui_wanflow.wan_core.models.layers import Embedding, Linear
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.packed import Packed, PackedEmbedding, PackedLinear, keep_packed
from comfyui_wanflow.wan_core.models.packings import E2M1, unpack_scaled
from comfyui_wanflow.wan_core.models.slots import Run
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.vace import VACE, VACELayout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

LAYOUT = DiTLayout(dim=128, ffn_dim=256, layers=1, heads=1, text_dim=32)
LAYER = "blocks.0.ffn.0"  # (256, 128)
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in DiT(LAYOUT).state_dict().items()
    }


def output_of(trunk):
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 4, 4), (1, 5, 32)))
    with torch.no_grad():
        return trunk(x, torch.tensor([500.0]), text, run=Run(torch.float32))


def loaded(tmp_path, tensors, metadata=None, **options):
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    return load_model(tmp_path / "a.safetensors", device="cpu", **options).trunk


def assert_computes_with(trunk, weights):
    """The trunk does what the plain one with these fp32 weights does."""
    plain = DiT(LAYOUT)
    plain.load_state_dict(weights)
    torch.testing.assert_close(output_of(trunk), output_of(plain), rtol=1e-5, atol=1e-5)


def scaled(weight, shape, dtype):
    """(stored, scale, the numbers that they mean), with one scale for each block that `shape` makes."""
    limit = torch.iinfo(torch.int8).max if dtype == torch.int8 else torch.finfo(dtype).max
    blocks = weight.reshape(*(shape[:2] if len(shape) > 1 else (1, 1)), -1)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / limit
    stored = (blocks / scale).round().to(dtype) if dtype == torch.int8 else (blocks / scale).to(dtype)
    return stored.reshape(weight.shape), scale.reshape(shape), (stored.float() * scale).reshape(weight.shape)


def note(**content):
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


class TestPlainFp8:
    """Cast without scales, some programs do it to every tensor: norms, biases, modulation, embeddings."""

    @pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2], ids=str)
    def test_a_diffusion_model(self, tmp_path, weights, dtype):
        narrow = {name: tensor.to(dtype) for name, tensor in weights.items()}
        trunk = loaded(tmp_path, narrow)
        assert {parameter.dtype for parameter in trunk.parameters()} == {dtype}
        assert_computes_with(trunk, {name: tensor.float() for name, tensor in narrow.items()})

    @pytest.mark.parametrize(
        "make, load, run",
        [
            (lambda: UMT5Encoder(UMT5Layout(9, 32, 8, 16, 2, 2)), load_text_encoder,
             lambda module: module(torch.tensor([[3, 4, 1]]), torch.ones(1, 3))),
            (lambda: VideoVAE(8), load_vae, lambda module: module.decode(torch.ones(1, 16, 2, 2, 2))),
            (lambda: ImageEncoder(ImageEncoderLayout(80, 32, 1, 2, 14, 28)), load_image_encoder,
             lambda module: module(torch.ones(1, 28, 28, 3))),
        ],
        ids=["text encoder", "VAE", "image encoder"],
    )  # fmt: skip
    def test_the_others(self, tmp_path, make, load, run):
        plain = make().eval()
        generator = torch.Generator().manual_seed(0)
        narrow = {name: (torch.randn(t.shape, generator=generator) * 0.1).to(FP8) for name, t in
                  plain.state_dict().items()}  # fmt: skip
        plain.load_state_dict({name: tensor.float() for name, tensor in narrow.items()})
        if load is load_image_encoder:  # the block after the last that is used
            narrow |= {n.replace(".1.", ".2."): t.clone() for n, t in narrow.items() if ".transformer.1." in n}
        save_file(narrow, tmp_path / "a.safetensors")
        if load is load_text_encoder:
            vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 3, "<unk>": 2}, unk_token="<unk>"))
            vocabulary.save(str(tmp_path / "tokenizer.json"))
        module = load(tmp_path / "a.safetensors", device="cpu").module
        assert {parameter.dtype for parameter in module.parameters()} == {FP8}
        with torch.no_grad():
            torch.testing.assert_close(run(module), run(plain), rtol=1e-5, atol=1e-5)


class TestScales:
    @pytest.mark.parametrize("shape", [(), (1,), (256, 1), (256, 4), (256, 4, 1)], ids=str)
    @pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8], ids=str)
    def test_one_scale_one_a_row_or_blocks(self, tmp_path, weights, shape, dtype):
        stored, scale, numbers = scaled(weights[f"{LAYER}.weight"], shape, dtype)
        trunk = loaded(tmp_path, weights | {f"{LAYER}.weight": stored, f"{LAYER}.scale_weight": scale})
        assert trunk.blocks[0].ffn[0].weight.dtype == dtype
        assert_computes_with(trunk, weights | {f"{LAYER}.weight": numbers})

    @pytest.mark.parametrize("form", ["tensor", "metadata"])
    @pytest.mark.parametrize("shape", [(), (256, 1)], ids=str)
    def test_rotated_int8(self, tmp_path, weights, form, shape):
        """ConvRot: before it is rounded, every 16 neighbours of a row are multiplied by a Hadamard matrix."""
        four = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
        turned = (weights[f"{LAYER}.weight"].reshape(256, 8, 16) @ torch.kron(four, four).T / 4).reshape(256, 128)
        stored, scale, numbers = scaled(turned, shape, torch.int8)
        meant = torch.linalg.solve(torch.kron(four, four).T / 4, numbers.reshape(-1, 16), left=False)
        options = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
        tensors = weights | {f"{LAYER}.weight": stored, f"{LAYER}.weight_scale": scale}
        metadata = None
        if form == "tensor":
            tensors[f"{LAYER}.comfy_quant"] = note(**options)
        else:
            layers = {f"model.diffusion_model.{LAYER}": options}
            metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
        trunk = loaded(tmp_path, {f"model.diffusion_model.{name}": t for name, t in tensors.items()}, metadata)
        assert_computes_with(trunk, weights | {f"{LAYER}.weight": meant.reshape(256, 128)})

    @pytest.mark.parametrize("form", ["old", "old with prefix", "tensor", "metadata"])
    def test_three_generations_of_files(self, tmp_path, weights, form):
        stored, scale, numbers = scaled(weights[f"{LAYER}.weight"], (), FP8)
        prefix = "model.diffusion_model." if form == "old with prefix" else ""
        old = form.startswith("old")
        extra = {"weight": stored, "scale_weight" if old else "weight_scale": scale,
                 "scale_input" if old else "input_scale": torch.ones(())}  # fmt: skip
        metadata = None
        if form == "tensor":
            extra["comfy_quant"] = note(format="float8_e4m3fn")
        if form == "metadata":
            notes = {"format_version": "1.0", "layers": {LAYER: {"format": "float8_e4m3fn"}}}
            metadata = {"_quantization_metadata": json.dumps(notes)}
        tensors = weights | {f"{LAYER}.{name}": tensor for name, tensor in extra.items()}
        tensors |= {"scaled_fp8": torch.zeros(2, dtype=FP8)} if old else {}
        trunk = loaded(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()}, metadata)
        assert_computes_with(trunk, weights | {f"{LAYER}.weight": numbers})

    def test_a_single_scale_is_not_rounded(self):
        """In bf16 a rounded scale would make a whole layer wrong by up to 0.4 %."""
        parts = {"weight": torch.full((1, 1), 2.0).to(FP8), "scale": torch.tensor(1.001953125)}
        assert unpack_scaled(parts, torch.bfloat16).item() == pytest.approx(2.0 * 1.001953125, rel=2**-8)
        exact = torch.tensor(1.0029296875)  # bf16 knows 1 and 1.0078125
        product = unpack_scaled({"weight": torch.full((1, 1), 1.5).to(FP8), "scale": exact}, torch.bfloat16)
        assert product.item() == (1.5 * exact).bfloat16().item()

    def test_layers_that_need_the_numbers_get_them(self, tmp_path, weights):
        name = "patch_embedding.weight"
        stored, scale, numbers = scaled(weights[name], (), FP8)
        trunk = loaded(tmp_path, weights | {name: stored, "patch_embedding.scale_weight": scale})
        assert trunk.patch_embedding.weight.dtype == torch.float32
        assert_computes_with(trunk, weights | {name: numbers})

    def test_weight_dtype_unpacks(self, tmp_path, weights):
        stored, scale, numbers = scaled(weights[f"{LAYER}.weight"], (256, 1), FP8)
        tensors = weights | {f"{LAYER}.weight": stored, f"{LAYER}.scale_weight": scale}
        trunk = loaded(tmp_path, tensors, weight_dtype="bf16")
        assert type(trunk.blocks[0].ffn[0]) is Linear
        torch.testing.assert_close(trunk.blocks[0].ffn[0].weight, numbers.bfloat16(), rtol=0, atol=0)

    def test_a_vace_module_beside_a_plain_model(self, tmp_path, weights):
        save_file(weights, tmp_path / "base.safetensors")
        generator = torch.Generator().manual_seed(0)
        shapes = VACE(VACELayout(128, 256, 1, 1)).state_dict().items()
        module = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in shapes}
        layer = "vace_blocks.0.ffn.0"
        stored, scale, numbers = scaled(module[f"{layer}.weight"], (256, 1), FP8)
        save_file(module | {f"{layer}.weight": stored, f"{layer}.scale_weight": scale}, tmp_path / "vace.safetensors")
        model = add_module(load_model(tmp_path / "base.safetensors"), tmp_path / "vace.safetensors")
        found = model.module.get_submodule("vace").vace_blocks[0].ffn[0]
        torch.testing.assert_close(found.numbers(torch.float32), numbers)

    @pytest.mark.parametrize(
        "extra, sentence",
        [
            ({"weight_scale": torch.ones(())} | {"comfy_quant": note(format="int3")}, r"cannot read \(int3\)"),
            ({"weight_scale": torch.ones(())} | {"comfy_quant": note(format="nvfp4", convrot=True)},
             r"cannot read \(nvfp4, rotated\)"),
            ({"weight_scale": torch.ones(()), "comfy_quant": note(format="int8_tensorwise", convrot=True)},
             r"cannot read \(rotated by 256 of 128 columns\)"),
            ({"scale_weight": torch.ones(7)}, r"'blocks.0.ffn.0.weight' is quantised.*\[256, 128\].*\[7\]"),
            ({"weight_scale": torch.ones(()), "comfy_quant": torch.tensor([65], dtype=torch.uint8)}, "damaged note"),
            ({"weight_scale": torch.ones(()), "comfy_quant": torch.tensor([49], dtype=torch.uint8)}, "damaged note"),
            ({"weight_scale": torch.ones(256, 8, dtype=torch.uint8)}, r"with scales uint8 \[256, 8\]"),
            ({"scale_weight": torch.ones(256, 0)}, r"with scales float32 \[256, 0\]"),
        ],
    )  # fmt: skip
    def test_what_is_not_known_is_refused(self, tmp_path, weights, extra, sentence):
        tensors = weights | {f"{LAYER}.{name}": tensor for name, tensor in extra.items()}
        with pytest.raises(FileError, match=sentence):
            loaded(tmp_path, tensors | {f"{LAYER}.weight": weights[f"{LAYER}.weight"].to(FP8)})


def in_tiles(scales):
    """cuBLAS's order of block scales, by the formula of its documentation; rows and columns are padded with zeros."""
    rows, columns = scales.shape
    down, across = -(-rows // 128), -(-columns // 4)
    tiled = torch.zeros(down * across * 512, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * across + column // 4
            tiled[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = scales[row, column]
    return tiled.reshape(down * 128, across * 4)


class TestMicroscaling:
    @pytest.mark.parametrize("as_bytes", [True, False])
    def test_nvfp4(self, tmp_path, weights, as_bytes):
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randint(0, 16, (256, 128), generator=generator, dtype=torch.uint8)
        blocks = (torch.rand(256, 8, generator=generator) + 0.5).to(FP8)
        scale = torch.tensor(0.02)
        tiles = in_tiles(blocks.view(torch.uint8))
        extra = {
            "weight": numbers[:, 0::2] << 4 | numbers[:, 1::2],
            "weight_scale": tiles if as_bytes else tiles.view(FP8),
            "weight_scale_2": scale,
            "comfy_quant": note(format="nvfp4"),
        }
        trunk = loaded(tmp_path, weights | {f"{LAYER}.{name}": tensor for name, tensor in extra.items()})
        assert trunk.blocks[0].ffn[0].weight.shape == (256, 64)
        meant = torch.tensor(E2M1)[numbers.int()].reshape(256, 8, 16) * blocks.float()[..., None] * scale
        assert_computes_with(trunk, weights | {f"{LAYER}.weight": meant.reshape(256, 128)})

    def test_mxfp8(self, tmp_path, weights):
        generator = torch.Generator().manual_seed(0)
        stored = weights[f"{LAYER}.weight"].to(FP8)
        exponents = torch.randint(125, 129, (256, 4), generator=generator, dtype=torch.uint8)
        extra = {"weight": stored, "weight_scale": in_tiles(exponents), "comfy_quant": note(format="mxfp8")}
        trunk = loaded(tmp_path, weights | {f"{LAYER}.{name}": tensor for name, tensor in extra.items()})
        meant = stored.float().reshape(256, 4, 32) * 2.0 ** (exponents.float() - 127)[..., None]
        assert_computes_with(trunk, weights | {f"{LAYER}.weight": meant.reshape(256, 128)})


class TestBlockTypes:
    @pytest.mark.parametrize("name", ggml.TYPES)
    def test_equal_to_the_package(self, name):
        packing, kind = ggml.TYPES[name], gguf.GGMLQuantizationType[name]
        assert gguf.GGML_QUANT_SIZES[kind] == (packing.numbers, packing.bytes)
        raw = np.random.default_rng(0).integers(0, 256, (4, 6 * packing.bytes), dtype=np.uint8)
        with np.errstate(invalid="ignore"):
            expected = gguf.quants.dequantize(raw, kind)
        found = packing({"weight": torch.from_numpy(raw)}, torch.float32)
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=0, equal_nan=True)
        assert packing({"weight": torch.from_numpy(raw)}, torch.bfloat16).dtype == torch.bfloat16


class TestLayers:
    PACKED = Packed((6, 64), {"weight": torch.randint(0, 60, (6, 68), dtype=torch.uint8)}, ggml.TYPES["Q8_0"])

    def test_a_linear_layer(self):
        module = nn.Sequential(Linear(64, 6))
        bias = module[0].bias
        assert keep_packed(module, "0.weight", self.PACKED)
        assert isinstance(module[0], PackedLinear) and isinstance(module[0], nn.Linear)
        assert (module[0].in_features, module[0].out_features) == (64, 6)
        x = torch.randn(3, 64, requires_grad=True)
        out = module(x)
        torch.testing.assert_close(out, x @ self.PACKED.numbers().T + bias)
        out.sum().backward()  # gradients pass through to what lies before
        torch.testing.assert_close(x.grad, self.PACKED.numbers().sum(0).expand(3, 64))
        assert module(x.detach().bfloat16()).dtype == torch.bfloat16

    def test_an_embedding_unpacks_the_rows_it_needs(self):
        module = nn.Sequential(Embedding(6, 64))
        assert keep_packed(module, "0.weight", self.PACKED)
        assert isinstance(module[0], PackedEmbedding)
        tokens = torch.tensor([[1, 5, 5]])
        torch.testing.assert_close(module(tokens), self.PACKED.numbers()[tokens])

    @pytest.mark.parametrize("piece", [1, 100, 136, 137, 408])
    def test_pieces_make_the_whole(self, monkeypatch, piece):
        """Rows are 68 bytes: 1, 1, 2, 2 and all 6 rows at a time."""
        whole = self.PACKED.unpack(self.PACKED.parts, torch.float32)
        monkeypatch.setattr(packed, "PIECE_ON_CPU", piece)
        torch.testing.assert_close(self.PACKED.numbers(), whole, rtol=0, atol=0)
        scales = {"weight": whole.to(FP8), "scale": torch.rand(6, 2)}
        blocks = Packed((6, 64), scales, unpack_scaled)
        torch.testing.assert_close(blocks.numbers(), unpack_scaled(scales, torch.float32), rtol=0, atol=0)

    @pytest.mark.parametrize("packing", ["plain", "with scales"])
    def test_tables_in_fp8_are_looked_up_as_bytes(self, packing):
        """Torch on CUDA before 2.7 and on some other machines cannot index 8-bit floats."""

        class LikeThem(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), options=None):
                if function.overloadpacket.__name__ in ("index", "index_select", "embedding"):
                    assert arguments[0].dtype != FP8
                return function(*arguments, **(options or {}))

        table = torch.randn(6, 64).to(FP8)
        module = nn.Sequential(Embedding(6, 64)).requires_grad_(False)
        module[0].weight.data = table
        if packing == "with scales":
            assert keep_packed(module, "0.weight", Packed((6, 64), {"weight": table, "scale": torch.tensor(2.0)},
                                                          unpack_scaled))  # fmt: skip
        tokens = torch.tensor([[1, 5, 5]])
        with LikeThem():
            found = module(tokens).float()
        torch.testing.assert_close(found, table[tokens].float() * (2 if packing == "with scales" else 1))

    def test_others_are_left_alone(self):
        module = nn.Sequential(nn.Conv1d(64, 6, 1))
        assert not keep_packed(module, "0.weight", self.PACKED)
        assert not keep_packed(module, "0.bias", self.PACKED)

    def test_a_checkpoint_tells_the_numbers(self, tmp_path):
        stored, scale, numbers = scaled(torch.randn(4, 8), (4, 1), FP8)
        save_file({"a.weight": stored, "a.weight_scale": scale}, tmp_path / "a.safetensors")
        checkpoint = open_checkpoint(tmp_path / "a.safetensors")
        assert checkpoint.shapes == {"a.weight": (4, 8)}
        assert checkpoint.storage("a.weight") == "float8_e4m3fn with scales"
        torch.testing.assert_close(checkpoint.tensor("a.weight"), numbers)
