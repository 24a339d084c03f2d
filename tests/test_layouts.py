"""The same weights in the layouts of other programs, written by these programs, compute the same here."""

import functools
import io
import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from comfyui_wanflow.wan_core.adapters.injection import Injection
from comfyui_wanflow.wan_core.errors import FileError
from comfyui_wanflow.wan_core.loading.checkpoint import Checkpoint, open_checkpoint
from comfyui_wanflow.wan_core.loading.load import load_image_encoder, load_model, load_text_encoder, load_vae
from comfyui_wanflow.wan_core.loading.mapped import Entry
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.packed import PackedEmbedding, PackedLinear
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
MANIFEST = json.loads((Path(__file__).parent / "data" / "wan21_key_manifest.json").read_text())


def seeded(module):
    """Random weights everywhere: fresh modules begin with zeros and ones in places."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    """A whole pipeline as Diffusers saves it, and its parts."""
    folder = tmp_path_factory.mktemp("pipeline")
    parts = {
        "transformer": WanTransformer3DModel(
            num_attention_heads=1, attention_head_dim=128, in_channels=36, out_channels=16, text_dim=32, freq_dim=32,
            ffn_dim=64, num_layers=2, image_dim=1280, added_kv_proj_dim=128, cross_attn_norm=True,
        ),
        "vae": AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=2),
        "text_encoder": UMT5EncoderModel(UMT5Config(
            vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, is_encoder_decoder=False,
        )),
        "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=160, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28,
            patch_size=14, projection_dim=16, hidden_act="gelu",
        )),
    }  # fmt: skip
    for name, part in parts.items():
        seeded(part).save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanImageToVideoPipeline"}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(pieces())
    return folder, parts


def made_by_diffusers(row):
    """The published models as Diffusers and Transformers build them, without memory."""
    wan = functools.partial(WanTransformer3DModel, attention_head_dim=128, text_dim=4096, freq_dim=256)
    small = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
    large = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
    image = {"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120}
    with torch.device("meta"):
        if row == "umt5-xxl-encoder":
            return UMT5EncoderModel(UMT5Config(
                vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            ))  # fmt: skip
        if row == "clip-vit-h-visual":
            return CLIPVisionModelWithProjection(CLIPVisionConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                image_size=224, patch_size=14, projection_dim=1024,
            ))  # fmt: skip
        return {
            "vae-2.1": AutoencoderKLWan,
            "t2v-1.3b": functools.partial(wan, **small),
            "t2v-14b": functools.partial(wan, **large),
            "i2v-or-inp-14b": functools.partial(wan, **large, **image),
            "flf2v-14b": functools.partial(wan, **large, **image, pos_embed_seq_len=514),
        }[row]()


def pieces(size=120, **options):
    """A small SentencePiece model with UMT5's special tokens."""
    out = io.BytesIO()
    words = "a red blue green circle square moves left right up down on grey background and stays ".split()
    lines = [" ".join(words[i % 17 :] + words[: i % 13]) for i in range(60)]
    lines += ["ﬁne Ｗ①de ｶﾞ tea-time café 圆形 red!"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=size, hard_vocab_limit=False, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, **options,
    )  # fmt: skip
    return out.getvalue()


class TestTrueSizes:
    @pytest.mark.parametrize(
        "row",
        ["t2v-1.3b", "t2v-14b", "i2v-or-inp-14b", "flf2v-14b", "vae-2.1", "umt5-xxl-encoder", "clip-vit-h-visual"],
    )
    def test_every_tensor_of_the_published_models(self, row):
        theirs = made_by_diffusers(row).state_dict().items()
        entries = {name: Entry(tuple(tensor.shape), tensor.dtype, None) for name, tensor in theirs}
        found = Checkpoint(entries, {}, [Path("theirs")]).shapes
        for name in ("visual_projection.weight", "vision_model.embeddings.position_ids"):  # not used by Wan
            found.pop(name, None)
        wanted = {
            name.replace("{N}", str(i)): tuple(shape)
            for name, (shape, count) in MANIFEST[row]["keys"].items()
            for i in range(count if "{N}" in name else 1)
        }
        wanted.pop("visual.head", None)
        assert found == wanted


class TestDiffusers:
    def test_the_transformer(self, diffusers_folder):
        folder, parts = diffusers_folder
        generator = torch.Generator().manual_seed(1)
        x, text, image = (
            torch.randn(shape, generator=generator) for shape in ((1, 36, 2, 4, 4), (1, 7, 32), (1, 257, 1280))
        )
        model = load_model(folder / "transformer", device="cpu")
        assert model.layout == DiTLayout(128, 64, 2, 1, in_dim=36, text_dim=32, frequency_dim=32, image_tokens=True)
        padded = torch.nn.functional.pad(text, (0, 0, 0, 505))
        with torch.no_grad():
            expected = parts["transformer"](x, torch.tensor([500.0]), padded, image).sample
            slots = Injection(
                concat={"mask": x[:, 16:20], "image": x[:, 20:]}, context_prefix=model.trunk.img_emb(image)
            )
            found = model.trunk(x[:, :16], torch.tensor([500.0]), text, slots)
        torch.testing.assert_close(found, expected, **CLOSE)

    def test_the_vae(self, diffusers_folder):
        folder, parts = diffusers_folder
        vae = load_vae(folder / "vae", device="cpu")
        latents = torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            video = parts["vae"].decode(latents).sample
            torch.testing.assert_close(vae.decode(latents), video, **CLOSE)
            torch.testing.assert_close(vae.encode(video), parts["vae"].encode(video).latent_dist.mean, **CLOSE)

    def test_the_whole_folder(self, diffusers_folder, tmp_path):
        folder, _ = diffusers_folder
        assert load_model(folder).layout.in_dim == 36
        assert load_vae(folder).module.decoder.conv1.weight.shape == (32, 16, 3, 3, 3)
        assert load_text_encoder(folder).encode(["red"])[1] == (2,)
        assert load_image_encoder(folder).module.layout.layers == 2
        (tmp_path / "model_index.json").write_text("{}")
        with pytest.raises(FileError, match="has no Wan 2.1 VAE: its vae is missing"):
            load_vae(tmp_path)

    def test_vace(self, tmp_path):
        theirs = seeded(WanVACETransformer3DModel(
            num_attention_heads=1, attention_head_dim=128, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2,
            vace_layers=[0], vace_in_channels=96, cross_attn_norm=True,
        ))  # fmt: skip
        theirs.save_pretrained(tmp_path)
        model = load_model(tmp_path, device="cpu")
        names = {name.removeprefix("vace.").removeprefix("trunk.") for name in model.module.state_dict()}
        assert len(names) == len(theirs.state_dict())
        ours = model.module.vace.vace_blocks[0].after_proj.weight
        assert torch.equal(ours, theirs.state_dict()["vace_blocks.0.proj_out.weight"])


class TestHuggingFace:
    def umt5(self, diffusers_folder, source, **options):
        """Load from `source` and compare with the library's own model."""
        encoder = load_text_encoder(source, device="cpu", **options)
        rows, (length,), _ = encoder.encode(["a red circle moves left"])
        ids = encoder.tokenizer(["a red circle moves left"]).ids
        with torch.no_grad():
            expected = diffusers_folder[1]["text_encoder"](ids).last_hidden_state
        torch.testing.assert_close(rows[:, :length], expected, **CLOSE)
        return encoder

    def test_umt5(self, diffusers_folder):
        self.umt5(diffusers_folder, diffusers_folder[0] / "text_encoder")

    @pytest.mark.parametrize("prefix", ["encoder.", ""])
    def test_umt5_with_its_tokenizer_inside(self, diffusers_folder, tmp_path, prefix):
        tensors = load_file(diffusers_folder[0] / "text_encoder" / "model.safetensors")
        tensors = {name.replace("encoder.", prefix, 1): tensor for name, tensor in tensors.items()}
        tensors["spiece_model"] = torch.tensor(list(pieces()), dtype=torch.uint8)
        save_file(tensors, tmp_path / "umt5.safetensors")
        self.umt5(diffusers_folder, tmp_path / "umt5.safetensors")

    def test_umt5_in_scaled_fp8(self, diffusers_folder, tmp_path):
        """As ComfyUI's umt5_xxl_fp8_e4m3fn_scaled: Hugging Face's names, scales, a marker and the tokenizer."""
        tensors = {"spiece_model": torch.tensor(list(pieces()), dtype=torch.uint8), "scaled_fp8": torch.zeros(2)}
        reference = seeded(UMT5EncoderModel(diffusers_folder[1]["text_encoder"].config))
        for name, tensor in load_file(diffusers_folder[0] / "text_encoder" / "model.safetensors").items():
            tensors[name] = tensor
            if tensor.ndim == 2 and "relative" not in name:
                scale = tensor.abs().max() / 448
                tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
                tensors[name.replace(".weight", ".scale_weight")] = scale
                tensor = tensors[name].float() * scale
            reference.state_dict()[name].copy_(tensor)
        save_file(tensors, tmp_path / "umt5.safetensors")
        encoder = self.umt5((None, {"text_encoder": reference}), tmp_path / "umt5.safetensors")
        assert isinstance(encoder.module.blocks[1].ffn.fc1, PackedLinear)
        assert isinstance(encoder.module.token_embedding, PackedEmbedding)

    def test_clip(self, diffusers_folder):
        folder, parts = diffusers_folder
        encoder = load_image_encoder(folder / "image_encoder", device="cpu")
        pictures = torch.rand(2, 28, 28, 3, generator=torch.Generator().manual_seed(1))
        prepared = encoder.module.prepared(pictures)
        with torch.no_grad():
            expected = parts["image_encoder"](prepared, output_hidden_states=True).hidden_states[-2]
            torch.testing.assert_close(encoder.module(pictures), expected, **CLOSE)

    def test_clip_without_a_prefix(self, diffusers_folder, tmp_path):
        checkpoint = open_checkpoint(diffusers_folder[0] / "image_encoder" / "model.safetensors")
        visual = [name for name in checkpoint.shapes if name.startswith("visual.")]
        assert len(visual) == len(checkpoint.shapes) - 1  # all but the projection
        tensors = {name.removeprefix("visual."): checkpoint.tensor(name).contiguous() for name in visual}
        save_file(tensors, tmp_path / "visual.safetensors")
        loaded = load_image_encoder(tmp_path / "visual.safetensors").module
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, checkpoint.tensor(name)), name


def write_gguf(path, architecture, tensors, kinds, fill=None):
    """Write tensors in the types that `kinds` names; `fill(writer)` adds metadata. Returns the numbers they mean."""
    writer = gguf.GGUFWriter(path, architecture)
    if fill:
        fill(writer)
    meant = {}
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[kinds.get(name, "F32")]
        data = gguf.quants.quantize(tensor.numpy(), kind)
        if tensor.ndim == 5 and kinds.get(name) != "F16":  # others write the five sides as they are
            data = data.reshape(-1, data.shape[-1])
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
        writer.add_tensor(name, data, raw_dtype=kind)
        numbers = gguf.quants.dequantize(data, kind) if kinds.get(name) else data
        meant[name] = torch.from_numpy(np.array(numbers)).float().reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


class TestGGUF:
    LAYOUT = DiTLayout(dim=128, ffn_dim=64, layers=2, heads=1, text_dim=32)

    @pytest.fixture
    def dit(self):
        generator = torch.Generator().manual_seed(0)
        return {
            name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in DiT(self.LAYOUT).state_dict().items()
        }

    @pytest.mark.parametrize(
        "kind, prefix", [("Q8_0", "model.diffusion_model."), ("Q5_1", ""), ("Q4_0", ""), ("BF16", ""), ("F16", "")]
    )
    def test_a_diffusion_model(self, tmp_path, dit, kind, prefix):
        kinds = {prefix + n: kind for n, t in dit.items() if t.ndim == 2}
        kinds[prefix + "patch_embedding.weight"] = "F16" if kind == "F16" else "F32"
        meant = write_gguf(tmp_path / "a.gguf", "wan", {prefix + n: t for n, t in dit.items()}, kinds)
        model = load_model(tmp_path / "a.gguf", device="cpu")
        assert model.layout == self.LAYOUT
        stored = open_checkpoint(tmp_path / "a.gguf").storage("blocks.0.ffn.0.weight")
        assert stored == {"BF16": "bfloat16", "F16": "float16"}.get(kind, kind)
        layer = model.trunk.blocks[0].self_attn.q
        assert isinstance(layer, PackedLinear) == kind.startswith("Q")
        assert model.total_bytes() < sum(t.nbytes for t in dit.values()) * (0.65 if kind != "Q8_0" else 0.5)
        plain = DiT(self.LAYOUT)
        plain.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in meant.items()})
        x, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 32)
        with model.attached() as trunk, torch.no_grad():
            expected = plain(x, torch.tensor([500.0]), text)
            torch.testing.assert_close(trunk(x, torch.tensor([500.0]), text), expected, **CLOSE)

    def test_a_text_encoder_with_its_vocabulary(self, tmp_path):
        layout = UMT5Layout(vocabulary=330, dim=32, attention_dim=32, ffn_dim=64, heads=2, layers=2)
        ours = {n: t * 0.1 for n, t in seeded(UMT5Encoder(layout)).state_dict().items()}
        names = {"token_embedding": "token_embd", "norm": "enc.output_norm"}
        for i in range(2):
            names |= {f"blocks.{i}.attn.{part}": f"enc.blk.{i}.attn_{part}" for part in "qkvo"}
            names |= {f"blocks.{i}.{a}": f"enc.blk.{i}.{b}" for a, b in (
                ("norm1", "attn_norm"), ("norm2", "ffn_norm"), ("pos_embedding.embedding", "attn_rel_b"),
                ("ffn.gate.0", "ffn_gate"), ("ffn.fc1", "ffn_up"), ("ffn.fc2", "ffn_down"),
            )}  # fmt: skip
        stored = {names[n.removesuffix(".weight")] + ".weight": t for n, t in ours.items()}
        library = sentencepiece.SentencePieceProcessor(model_proto=pieces(320, byte_fallback=True))
        meant = write_gguf(
            tmp_path / "umt5.gguf", "t5encoder", stored,
            {n: "Q8_0" for n, t in stored.items() if t.ndim == 2 and "rel_b" not in n}, vocabulary_of(library),
        )  # fmt: skip
        encoder = load_text_encoder(tmp_path / "umt5.gguf", device="cpu")
        assert encoder.module.layout == layout
        assert isinstance(encoder.module.token_embedding, PackedEmbedding)
        for text in ("a red circle moves left", "ﬁne Ｗ①de ｶﾞ  café 圆形!", "🙂 unknown ώ", "", "tea-time</s>"):
            assert encoder.tokenizer.vocabulary.encode(text) == library.encode(text)
        plain = UMT5Encoder(layout)
        plain.load_state_dict({n: meant[names[n.removesuffix(".weight")] + ".weight"] for n in ours})
        rows, (length,), _ = encoder.encode(["a red circle"])
        tokens = encoder.tokenizer(["a red circle"])
        with torch.no_grad():
            torch.testing.assert_close(rows[:, :length], plain(tokens.ids, tokens.mask), **CLOSE)

    def test_truncated(self, tmp_path, dit):
        write_gguf(tmp_path / "a.gguf", "wan", dit, {})
        content = (tmp_path / "a.gguf").read_bytes()
        for kept in (0.01, 0.5, 0.99):
            (tmp_path / "a.gguf").write_bytes(content[: int(len(content) * kept)])
            with pytest.raises(FileError, match="damaged or incomplete and cannot be read as GGUF. Download it again"):
                open_checkpoint(tmp_path / "a.gguf")

    def test_a_damaged_header_is_told_in_words(self, tmp_path):
        def fill(writer):
            writer.add_tokenizer_model("t5")
            writer.add_token_list(["a", "b"] * 9)
            writer.add_token_scores([0.5] * 18)
            writer.add_token_types([1] * 18)

        tensors = {"a.weight": torch.zeros(4, 64), "b.weight": torch.zeros(2, 2, 2, 2, 2)}
        write_gguf(tmp_path / "a.gguf", "wan", tensors, {"a.weight": "Q8_0"}, fill)
        content = (tmp_path / "a.gguf").read_bytes()
        random, refused = np.random.default_rng(0), 0
        for _ in range(300):
            damaged = bytearray(content)
            for place in random.integers(4, len(content) - 500, random.integers(1, 4)):
                damaged[place] = random.choice([0, 1, 8, 9, 255])
            (tmp_path / "a.gguf").write_bytes(damaged)
            try:
                checkpoint = open_checkpoint(tmp_path / "a.gguf")
                for name in checkpoint.shapes:
                    checkpoint.tensor(name)
            except FileError:  # and nothing else
                refused += 1
        assert refused > 100

    def test_types_that_are_not_read_are_named(self, tmp_path, dit):
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "wan")
        kind = gguf.GGMLQuantizationType.TQ2_0
        writer.add_tensor("blocks.0.ffn.0.weight", np.zeros((4, 66), np.uint8), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(FileError, match="'blocks.0.ffn.0.weight' as TQ2_0.*Take a file with another.*Q4_K"):
            open_checkpoint(tmp_path / "a.gguf")

    def test_without_the_package(self, tmp_path, dit, monkeypatch):
        write_gguf(tmp_path / "a.gguf", "wan", dit, {})
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(FileError, match="needs the package gguf: 'pip install gguf'"):
            open_checkpoint(tmp_path / "a.gguf")


def fields(message):
    """The fields of a protobuf message: number -> values, texts as bytes, floats as numbers."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            value = varint()
        elif key & 7 == 5:
            value, at = struct.unpack_from("<f", message, at)[0], at + 4
        else:
            length = varint()
            value, at = message[at : at + length], at + length
        found.setdefault(key >> 3, []).append(value)
    return found


def vocabulary_of(library):
    """Adds a SentencePiece model's tables to a GGUF file, as llama.cpp's converter does."""
    model = fields(library.serialized_model_proto())
    pieces, rules = [fields(piece) for piece in model[1]], fields(model[3][0])

    def fill(writer):
        writer.add_tokenizer_model("t5")
        writer.add_token_list([piece[1][0].decode() for piece in pieces])
        writer.add_token_scores([piece.get(2, [0.0])[0] for piece in pieces])
        writer.add_token_types([piece.get(3, [1])[0] for piece in pieces])
        writer.add_add_space_prefix(bool(rules.get(3, [1])[0]))
        writer.add_remove_extra_whitespaces(bool(rules.get(4, [1])[0]))
        writer.add_precompiled_charsmap(rules[2][0])

    return fill


class TestBundles:
    """ComfyUI's all-in-one checkpoints: several models in one file."""

    @pytest.fixture
    def bundle(self, diffusers_folder, tmp_path):
        folder, _ = diffusers_folder
        parts = {
            "model.diffusion_model.": open_checkpoint(folder / "transformer" / "diffusion_pytorch_model.safetensors"),
            "vae.": open_checkpoint(folder / "vae" / "diffusion_pytorch_model.safetensors"),
        }
        tensors = {prefix + name: part.tensor(name) for prefix, part in parts.items() for name in part.shapes}
        for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
            tensors["text_encoders.umt5xxl.transformer." + name] = tensor
        tensors["text_encoders.umt5xxl.logit_scale"] = torch.ones(())
        tensors["text_encoders.spiece_model"] = torch.tensor(list(pieces()), dtype=torch.uint8)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "all.safetensors")
        return tmp_path / "all.safetensors"

    def test_each_loader_takes_its_part(self, bundle):
        assert load_model(bundle).layout.in_dim == 36
        assert load_vae(bundle.parent).module.decoder.conv1.weight.shape == (32, 16, 3, 3, 3)
        assert load_text_encoder(bundle).encode(["red"])[1] == (2,)

    def test_what_it_lacks_is_said(self, bundle):
        with pytest.raises(FileError, match=r"is an all-in-one checkpoint \(a Wan 2.1 diffusion model, a UMT5.*'Load"):
            load_image_encoder(bundle)


class TestNeighbours:
    """Files of other models, which must be named instead of failing somewhere inside."""

    @pytest.mark.parametrize(
        "tensors, sentence",
        [
            # FLUX's text encoder in Hugging Face's names: a T5 has position biases in its first layer only
            ({"shared.weight": (9, 32), "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 32),
              "encoder.block.1.layer.0.SelfAttention.q.weight": (8, 32),
              "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2)},
             r"is a T5 text encoder \(2 layers, width 32\), not the UMT5"),
            ({"token_embd.weight": (9, 32), "blk.0.attn_q.weight": (8, 32), "blk.0.attn_norm.weight": (32,)},
             "is a language model or text encoder of another kind"),
            ({"conv2.weight": (16, 16, 1, 1, 1), "decoder.middle.0.residual.0.gamma": (8, 1, 1, 1),
              "decoder.head.2.weight": (12, 8, 3, 3, 3)}, "is a VAE that enlarges while it decodes"),
            ({"double_blocks.0.img_attn.qkv.weight": (3, 3)}, "not a Wan 2.1 model but FLUX"),
        ],
        ids=["T5", "language model", "upscaling VAE", "FLUX"],
    )  # fmt: skip
    def test_sentence(self, tmp_path, tensors, sentence):
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "a.safetensors")
        for load in (load_model, load_vae, load_text_encoder, load_image_encoder):
            with pytest.raises(FileError, match=sentence):
                load(tmp_path / "a.safetensors")
