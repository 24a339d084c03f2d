"""From files to engines: what a file is, where it is found, how it becomes a model, and every mix-up in words."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from comfyui_wanflow.wan_core.errors import FileError, InputError, ModelError
from comfyui_wanflow.wan_core.loading import catalog, download
from comfyui_wanflow.wan_core.loading.catalog import Source
from comfyui_wanflow.wan_core.loading.download import Library
from comfyui_wanflow.wan_core.loading.identify import KINDS, identify
from comfyui_wanflow.wan_core.loading.load import load_model, load_text_encoder, load_vae
from comfyui_wanflow.wan_core.model import WanModel, WanTextEncoder, WanVAE
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.slots import Run
from comfyui_wanflow.wan_core.models.text_encoder import UMT5Encoder, UMT5Layout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from published import layout_of
from safetensors.torch import save_file
from sparse import MANIFEST, published_shapes, write_sparse

DIT = DiTLayout(dim=128, ffn_dim=64, layers=2, heads=1, text_dim=32)
UMT5 = UMT5Layout(vocabulary=9, dim=32, attention_dim=8, ffn_dim=16, heads=2, layers=2)
PARTS = {"vace": "vace", "motion_controller": "speed"}  # beside the trunk, and the adapters that they are for
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "moves", "left"]


def random_weights(module):
    """A state dict without zeros, so that equal outputs mean equal weights."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in module.state_dict().items()}


@pytest.fixture(scope="module")
def weights():
    return {"dit": random_weights(DiT(DIT)), "text_encoder": random_weights(UMT5Encoder(UMT5)),
            "vae": random_weights(VideoVAE(8))}  # fmt: skip


@pytest.fixture
def files(tmp_path, weights):
    """One small checkpoint of each kind in one folder, and a tokenizer where the published files have it."""
    paths = {kind: tmp_path / f"tiny_{kind}.safetensors" for kind in weights}
    for kind, path in paths.items():
        save_file(weights[kind], path)
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    library.save(str(tmp_path / "google" / "umt5-xxl" / "tokenizer.json"))
    return paths


class TestIdentify:
    @pytest.mark.parametrize(
        "row, kind, summary",
        [
            ("t2v-1.3b", "dit", r"\(Text to Video, 30 layers, width 1536\)"),
            ("t2v-14b", "dit", r"\(Text to Video, 40 layers, width 5120\)"),
            ("i2v-or-inp-14b", "dit", r"\(Image to Video or Fun InP, 40 layers, width 5120\)"),
            ("fun-inp-1.3b", "dit", r"\(Image to Video or Fun InP, 30 layers"),
            ("fun-control-1.3b", "dit", r"\(Fun Control, 30 layers"),
            ("fun-control-14b", "dit", r"\(Fun Control, 40 layers"),
            ("flf2v-14b", "dit", r"\(First-Last-Frame to Video, 40 layers"),
            ("fun-v1.1-control-1.3b", "dit", r"\(Fun V1.1 Control, 30 layers"),
            ("fun-v1.1-control-14b", "dit", r"\(Fun V1.1 Control, 40 layers"),
            ("fun-v1.1-camera-1.3b", "dit", r"\(Fun Control-Camera, 30 layers"),
            ("fun-v1.1-camera-14b", "dit", r"\(Fun Control-Camera, 40 layers"),
            ("vace-1.3b-module", "vace_module", r"without its base model \(15 blocks, width 1536\)"),
            ("vace-14b-module", "vace_module", r"\(8 blocks, width 5120\)"),
            ("motion-controller-1.3b", "motion_controller", r"\(width 1536\)"),
            ("vae-2.1", "vae", r"\(base width 96\)"),
            ("umt5-xxl-encoder", "text_encoder", r"UMT5 text encoder \(24 layers, width 4096\)"),
            ("clip-vit-h-visual", "image_encoder", r"\(width 1280\)"),
        ],
    )
    def test_every_published_model_from_shapes_alone(self, row, kind, summary):
        found = identify(published_shapes(row))
        assert found.kind == kind
        assert re.search(summary, found.summary)

    def test_the_manifest_is_covered(self):
        marks = self.test_every_published_model_from_shapes_alone.pytestmark
        assert {case[0] for case in marks[0].args[1]} == MANIFEST.keys()

    def test_a_whole_vace_file(self):
        both = published_shapes("t2v-1.3b") | published_shapes("vace-1.3b-module")
        assert identify(both).family == "VACE"

    @pytest.mark.parametrize(
        "shapes, kind, summary",
        [
            ({"blocks.0.self_attn.q.lora_A.weight": (8, 128)}, "lora", "a LoRA"),
            ({"lora_unet_blocks_0_self_attn_q.lora_down.weight": (8, 128)}, "lora", "a LoRA"),
            ({"blocks.0.norm3.diff": (128,)}, "lora", "a LoRA"),
            ({"double_blocks.0.img_attn.qkv.weight": (1, 1)}, "unknown", "FLUX"),
            ({"text_model.embeddings.position_embedding.weight": (77, 768)}, "unknown", "CLIP text encoder"),
            ({"vision_model.embeddings.class_embedding": (1280,)}, "image_encoder", "width 1280"),
            ({"model.embed_tokens.weight": (9, 9), "lm_head.weight": (9, 9)}, "unknown", "language model"),
            ({"decoder.22.bias": (3,)}, "unknown", "tiny preview VAE"),
            ({"decoder.mid_block.resnets.0.conv1.weight": (9, 9, 3, 3)}, "unknown", "another model or program"),
            ({"a": (1,), "b": (2,)}, "unknown", r"2 tensors, among them 'a', 'b'"),
        ],
    )
    def test_other_files(self, shapes, kind, summary):
        found = identify(shapes)
        assert found.kind == kind
        assert summary in found.summary

    def test_t5_is_told_from_umt5(self):
        shapes = published_shapes("umt5-xxl-encoder")
        t5 = {name: s for name, s in shapes.items() if "pos_embedding" not in name or name.startswith("blocks.0.")}
        assert "a T5 text encoder (24 layers, width 4096), not the UMT5" in identify(t5).summary

    def test_the_vae_of_wan_22(self):
        shapes = published_shapes("vae-2.1") | {"conv2.weight": (48, 48, 1, 1, 1)}
        assert "VAE of Wan 2.2 (48" in identify(shapes).summary

    def test_wan_22_models_are_named(self):
        shapes = published_shapes("t2v-14b") | {"patch_embedding.weight": (5120, 36, 1, 2, 2)}
        found = identify(shapes)
        assert found.kind == "relative"
        assert "a Wan 2.2 A14B image model" in found.summary


class TestMixUps:
    LOADERS = {"dit": load_model, "text_encoder": load_text_encoder, "vae": load_vae}

    @pytest.mark.parametrize("wanted", LOADERS)
    @pytest.mark.parametrize("given", [*LOADERS])
    def test_one_engine_for_another(self, files, wanted, given):
        if wanted == given:
            assert self.LOADERS[wanted](files[given]).name == f"tiny_{given}"
            return
        with pytest.raises(FileError) as error:
            self.LOADERS[wanted](files[given])
        text = str(error.value)
        assert text.startswith(f"{files[given]} is {KINDS[given].noun} (")
        assert f"Load it with '{KINDS[given].node}'." in text
        assert f"'{KINDS[wanted].node}' needs {KINDS[wanted].noun}, such as {KINDS[wanted].example}." in text

    @pytest.mark.parametrize("wanted", LOADERS)
    @pytest.mark.parametrize(
        "tensors, found",
        [
            ({"blocks.0.self_attn.q.lora_A.weight": (8, 128)}, "is a LoRA"),
            ({"visual.cls_embedding": (1, 1, 1280)}, "is a CLIP image encoder"),
            ({"vace_patch_embedding.weight": (128, 96, 1, 2, 2)}, "is a VACE module without its base model"),
            ({"input_blocks.0.0.weight": (1, 1)}, "is not a Wan 2.1 model but Stable Diffusion"),
            ({"foo": (1,)}, "is an unknown kind of file"),
        ],
    )
    def test_files_for_no_loader(self, tmp_path, wanted, tensors, found):
        path = tmp_path / "a.safetensors"
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
        with pytest.raises(FileError, match=f"{found}.*'{KINDS[wanted].node}' needs"):
            self.LOADERS[wanted](path)

    def test_a_relative(self, tmp_path, weights):
        changed = {"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}
        save_file(weights["dit"] | changed, tmp_path / "a.safetensors")
        with pytest.raises(FileError, match="cannot be used. This is a Wan 2.2 A14B image model"):
            load_model(tmp_path / "a.safetensors")

    def test_half_a_vace_is_refused(self, tmp_path, weights):
        whole = weights["dit"] | {"vace_patch_embedding.weight": torch.zeros(128, 96, 1, 2, 2)}
        save_file(whole, tmp_path / "a.safetensors")
        with pytest.raises(ModelError, match="This VACE has no 'vace_blocks.0.ffn.0.weight'"):
            load_model(tmp_path / "a.safetensors")


class TestStrictness:
    def test_a_missing_tensor_is_named(self, tmp_path, weights):
        save_file({k: v for k, v in weights["dit"].items() if k != "blocks.1.ffn.2.bias"}, tmp_path / "a.safetensors")
        with pytest.raises(FileError, match="does not fit.*it lacks blocks.1.ffn.2.bias. Take an unmodified file"):
            load_model(tmp_path / "a.safetensors")

    def test_unexpected_tensors_are_named(self, tmp_path, weights):
        extra = {f"new.{i}": torch.zeros(1) for i in range(7)}
        save_file(weights["dit"] | extra, tmp_path / "a.safetensors")
        with pytest.raises(FileError, match=r"has the unknown new.0, new.1, new.2, new.3, new.4 and 2 more"):
            load_model(tmp_path / "a.safetensors")

    def test_misshapen_tensors_are_named(self, tmp_path, weights):
        save_file(weights["dit"] | {"blocks.1.ffn.0.weight": torch.zeros(65, 128)}, tmp_path / "a.safetensors")
        with pytest.raises(FileError, match="has other sizes in blocks.1.ffn.0.weight"):
            load_model(tmp_path / "a.safetensors")

    def test_markers_are_no_weights(self, tmp_path, weights):
        save_file(weights["dit"] | {"model_type.Wan2_1-T2V": torch.zeros(1)}, tmp_path / "a.safetensors")
        assert load_model(tmp_path / "a.safetensors").layout == DIT


class TestEngines:
    def test_a_model_computes_with_the_weights_of_its_file(self, files, weights):
        model = load_model(files["dit"], device="cpu")
        assert isinstance(model, WanModel)
        assert (model.layout, model.name, model.attention) == (DIT, "tiny_dit", "auto")
        reference = DiT(DIT)
        reference.load_state_dict(weights["dit"])
        x, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 32)
        with model.attached() as trunk, torch.no_grad():
            torch.testing.assert_close(
                trunk(x, torch.tensor([500.0]), text), reference(x, torch.tensor([500.0]), text), rtol=0, atol=0
            )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
    def test_narrow_weights_compute_in_fp32(self, tmp_path, weights, dtype):
        narrow = {k: v.to(dtype) if v.ndim > 1 and k.endswith("weight") else v for k, v in weights["dit"].items()}
        save_file(narrow, tmp_path / "a.safetensors")
        model = load_model(tmp_path / "a.safetensors", device="cpu")
        assert model.trunk.blocks[0].ffn[0].weight.dtype == dtype
        wide = DiT(DIT)
        wide.load_state_dict({name: tensor.float() for name, tensor in narrow.items()})
        arguments = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 32)
        with model.attached() as trunk, torch.no_grad():
            found = trunk(*arguments, run=Run(torch.float32))
            torch.testing.assert_close(found, wide(*arguments), rtol=1e-6, atol=1e-6)

    def test_prompts_become_padded_rows(self, files):
        encoder = load_text_encoder(files["text_encoder"], device="cpu")
        assert isinstance(encoder, WanTextEncoder)
        rows, lengths, report = encoder.encode(["a red circle", "a circle moves left"])
        assert rows.shape == (2, 512, 32)
        assert rows.dtype == torch.float32
        assert lengths == (4, 5)
        assert report == ""
        assert rows[0, :4].any(dim=1).all()
        assert not rows[0, 4:].any()

    def test_a_cut_prompt_is_reported(self, files):
        encoder = load_text_encoder(files["text_encoder"], device="cpu")
        rows, lengths, report = encoder.encode(["red " * 511 + "blue left"])
        assert rows.shape == (1, 512, 32)
        assert lengths == (512,)
        assert "514 tokens, the model reads 512: the last 2 were cut ('blue left')" in report

    def test_a_video_through_the_vae(self, files, weights):
        vae = load_vae(files["vae"], device="cpu")
        assert isinstance(vae, WanVAE)
        reference = VideoVAE(8)
        reference.load_state_dict(weights["vae"])
        pixels = torch.rand(1, 3, 5, 16, 16) * 2 - 1
        latents = vae.encode(pixels)
        assert latents.shape == (1, 16, 2, 2, 2)
        with torch.no_grad():
            torch.testing.assert_close(latents, reference.encode_whole(pixels), rtol=1e-4, atol=1e-5)
        assert vae.decode(latents, tiled=True, tile_size=(2, 2), tile_stride=(1, 1)).shape == pixels.shape

    @pytest.mark.parametrize(
        "name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
    )
    def test_weight_dtype_converts_the_matrices(self, files, name, dtype):
        trunk = load_model(files["dit"], weight_dtype=name, device="cpu").trunk
        assert trunk.blocks[0].ffn[0].weight.dtype == dtype
        assert trunk.patch_embedding.weight.dtype == dtype
        assert trunk.blocks[0].ffn[0].bias.dtype == torch.float32
        assert trunk.blocks[0].modulation.dtype == torch.float32
        assert trunk.blocks[0].norm3.weight.dtype == torch.float32

    def test_choices_are_checked(self, files):
        with pytest.raises(InputError, match="no weight_dtype 'int4'. Choose one of auto, fp32, bf16, fp16"):
            load_model(files["dit"], weight_dtype="int4")
        with pytest.raises(InputError, match="no attention backend 'magic'"):
            load_model(files["dit"], attention="magic")
        with pytest.raises(InputError, match="no attention backend 'magic'"):
            load_model(files["dit"]).with_attention("magic")

    def test_handles_are_frozen_and_share_weights(self, files):
        model = load_model(files["dit"])
        other = model.with_attention("sdpa")
        assert (model.attention, other.attention) == ("auto", "sdpa")
        assert other.trunk is model.trunk
        with pytest.raises(AttributeError):
            model.attention = "sdpa"

    def test_weights_loaded_in_inference_mode_can_be_trained(self, files):
        with torch.inference_mode():
            trunk = load_model(files["dit"]).trunk
        assert not any(parameter.is_inference() or parameter.requires_grad for parameter in trunk.parameters())
        trunk.requires_grad_(True)
        trunk(torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 32)).sum().backward()
        assert trunk.blocks[0].self_attn.q.weight.grad.any()

    @pytest.mark.parametrize("row", ["t2v-1.3b", "t2v-14b"])
    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_true_sizes_load_without_memory(self, tmp_path, row):
        """A 57 GB file becomes a model in a second: nothing is read before it is used."""
        path = write_sparse(tmp_path / "a.safetensors", published_shapes(row))

        def memory():
            return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024

        before = memory()
        model = load_model(path, device="cpu")
        assert memory() - before < 100  # megabytes
        assert model.total_bytes() == 4 * sum(map(math.prod, published_shapes(row).values()))
        assert not model.trunk.blocks[-1].ffn[0].bias.any()


    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_a_model_in_use_is_its_file(self, tmp_path):
        """Loaded and read to the last page, 60 MB of weights are 60 MB of the file and next to no memory of their own:
        the guard of what benchmarks/loading.py measures with 2 GB."""

        def megabytes(field):
            return int(next(x for x in open("/proc/self/status") if x.startswith(field)).split()[1]) / 1024

        with torch.device("meta"):
            weights = DiT(replace(DIT, dim=512, ffn_dim=2048, heads=4)).state_dict()
        path = write_sparse(tmp_path / "a.safetensors", {name: tuple(x.shape) for name, x in weights.items()})
        size = path.stat().st_size / 2**20
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before, own = megabytes("VmRSS"), megabytes("RssAnon")
        model = load_model(path, device="cpu")
        assert not any(parameter.view(-1)[::1024].sum() for parameter in model.trunk.parameters())  # of each page one
        assert 40 < size < 100
        assert megabytes("RssAnon") - own < 8
        assert megabytes("VmHWM") - before < 1.1 * size

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_a_converted_model_is_held_once(self, tmp_path):
        """While 60 MB of fp32 become 30 MB of fp16, the file's pages go as the copy grows."""

        def megabytes(field):
            return int(next(x for x in open("/proc/self/status") if x.startswith(field)).split()[1]) / 1024

        with torch.device("meta"):
            weights = DiT(replace(DIT, dim=512, ffn_dim=2048, heads=4)).state_dict()
        path = write_sparse(tmp_path / "a.safetensors", {name: tuple(x.shape) for name, x in weights.items()})
        size = path.stat().st_size / 2**20
        Path("/proc/self/clear_refs").write_text("5")
        before = megabytes("VmRSS")
        model = load_model(path, "fp16", device="cpu")
        assert megabytes("VmHWM") - before < 0.8 * size
        assert model.trunk.blocks[0].ffn[0].weight.dtype == torch.float16

    def test_a_whole_umt5(self, tmp_path, files, weights):
        """Encoder and decoder in Hugging Face's names: the decoder stays unread."""
        rules = {
            "token_embedding": "shared", "norm.": "encoder.final_layer_norm.", "blocks.": "encoder.block.",
            "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias", "attn": "layer.0.SelfAttention",
            "norm1": "layer.0.layer_norm", "norm2": "layer.1.layer_norm", "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
            "ffn.fc1": "layer.1.DenseReluDense.wi_1", "ffn.fc2": "layer.1.DenseReluDense.wo",
        }  # fmt: skip
        whole = {}
        for name, tensor in weights["text_encoder"].items():
            for ours, theirs in rules.items():
                if name.startswith(ours) or (f".{ours}." in name and not ours.endswith(".")):
                    name = name.replace(ours, theirs, 1)
            whole[name] = tensor
        whole |= {name.replace("encoder.", "decoder."): x.clone() for name, x in whole.items() if "encoder." in name}
        path = tmp_path / "google" / "whole.safetensors"
        save_file(whole | {"lm_head.weight": torch.zeros(9, 32)}, path)
        texts = ["a red circle"]
        wanted, found = (load_text_encoder(p).encode(texts)[0] for p in (files["text_encoder"], path))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


class TestSources:
    def test_the_fitting_file_of_a_folder(self, files):
        folder = files["dit"].parent
        assert load_model(folder).layout == DIT
        assert load_vae(str(folder)).name == "tiny_vae"
        assert load_text_encoder(folder).tokenizer.vocabulary.encode("red") == [4]

    def test_shards_and_texts_with_a_path_a_line(self, tmp_path, weights):
        names = list(weights["dit"])
        parts = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        for part, half in zip(parts, (names[:20], names[20:]), strict=True):
            save_file({name: weights["dit"][name] for name in half}, part)
        assert load_model(parts).layout == DIT
        assert load_model(f'"{parts[0]}"\n\n  {parts[1]}\n').layout == DIT

    def test_a_folder_with_several_or_none(self, files, tmp_path):
        save_file({"foo": torch.zeros(1)}, tmp_path / "foo.safetensors")
        (tmp_path / "copy.safetensors").write_bytes(files["vae"].read_bytes())
        with pytest.raises(FileError, match=r"holds 2 files that fit \(copy.safetensors, tiny_vae.safetensors\)"):
            load_vae(tmp_path)
        files["dit"].unlink()
        with pytest.raises(FileError, match="holds no Wan 2.1 diffusion model"):
            load_model(tmp_path)

    def test_a_broken_file_is_told_if_nothing_else_fits(self, files, tmp_path):
        files["dit"].write_bytes(files["dit"].read_bytes()[:5000])
        assert load_vae(tmp_path).name == "tiny_vae"
        with pytest.raises(FileError, match="tiny_dit.safetensors is incomplete"):
            load_model(tmp_path)

    def test_names_that_are_nothing(self):
        with pytest.raises(FileError, match="There is no file .*missing.safetensors"):
            load_model("some/missing.safetensors")
        with pytest.raises(FileError, match="'Wan2.1-T2V-14b' is no file.*nearest name is Wan2.1-T2V-14B"):
            load_model("Wan2.1-T2V-14b")
        with pytest.raises(FileError, match="No file was named. 'Load Wan VAE' needs a Wan 2.1 VAE"):
            load_vae("  \n")

    def test_a_bundled_model_by_its_name(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(download, "BUNDLED", tmp_path)
        for kind, path in files.items():
            path.rename(tmp_path / catalog.TINY[kind].pattern)
        assert load_model("WanTiny-T2V").preset == catalog.TOY
        assert load_model("WanTiny-T2V").name == "WanTiny-T2V"
        assert load_vae("WanTiny-T2V").name == "WanTiny-T2V"
        assert load_text_encoder("WanTiny-T2V").encode(["red"])[1] == (2,)
        (tmp_path / catalog.TINY["vae"].pattern).unlink()
        with pytest.raises(FileError, match="lacks the bundled Wan2.1_VAE.safetensors. Install it again"):
            load_vae("WanTiny-T2V")

    def test_an_encoder_without_a_tokenizer(self, files, tmp_path, monkeypatch):
        monkeypatch.setenv("WANFLOW_OFFLINE", "1")
        (tmp_path / "google" / "umt5-xxl" / "tokenizer.json").unlink()
        with pytest.raises(FileError, match=r"Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/ is not on this machine"):
            load_text_encoder(files["text_encoder"])

    def test_a_tokenizer_among_the_model_folders(self, files, tmp_path):
        alone = tmp_path / "alone" / "encoder.safetensors"
        alone.parent.mkdir()
        files["text_encoder"].rename(alone)
        home = tmp_path / "library" / "Wan-AI" / "Wan2.1-T2V-1.3B"
        home.mkdir(parents=True)
        (tmp_path / "google").rename(home / "google")
        assert load_text_encoder(alone, library=Library((tmp_path / "library",))).encode(["red"])[1] == (2,)


class TestPublished:
    def test_common_files_may_lie_directly_in_a_model_folder(self, tmp_path):
        library = Library((tmp_path,))
        (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"x")
        (tmp_path / "model.safetensors").write_bytes(b"x")
        assert download.find(Source("Org/M", "Wan2.1_VAE.pth"), library) == [tmp_path / "Wan2.1_VAE.pth"]
        assert download.find(Source("Org/M", "model.safetensors"), library) == []  # the name says nothing

    def test_a_model_id_as_source(self, weights, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folder = Path("models/Org/Some-Model")
        folder.mkdir(parents=True)
        save_file(weights["dit"], folder / "diffusion_pytorch_model.safetensors")
        assert load_model("Org/Some-Model:diffusion_pytorch_model*.safetensors").layout == DIT
        assert load_model("Org/Some-Model:").layout == DIT


    def test_a_tokenizer_by_name(self, files, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        home = tmp_path / "models" / "Org" / "Words"
        home.mkdir(parents=True)
        (tmp_path / "google").rename(home / "google")
        file = home / "google" / "umt5-xxl" / "tokenizer.json"
        for named in (str(file.parent), str(file), "Org/Words:google/*", "Org/Words:google/umt5-xxl/"):
            encoder = load_text_encoder(files["text_encoder"], tokenizer=named)
            assert encoder.tokenizer.vocabulary.encode("red") == [4]
        with pytest.raises(FileError, match="There is no tokenizer in nowhere"):
            load_text_encoder(files["text_encoder"], tokenizer="nowhere")


class TestCatalog:
    def test_nineteen_published_models_and_the_toys(self):
        assert len(catalog.PUBLISHED) == 19
        assert len(catalog.CATALOG) == len(catalog.BY_NAME) == 28
        assert catalog.CATALOG[0].name == "WanTiny-T2V"
        assert all({"dit", "text_encoder", "tokenizer", "vae"} <= row.files.keys() for row in catalog.CATALOG)

    def test_common_files_are_offered_once(self):
        assert catalog.names("text_encoder") == ["WanTiny-T2V", "Wan2.1-T2V-1.3B"]
        assert catalog.names("vae") == ["WanTiny-T2V", "Wan2.1-T2V-1.3B"]
        assert catalog.names("image_encoder") == ["Wan2.1-I2V-14B-480P", "WanTiny-I2V"]
        assert len(catalog.names("dit")) == 26  # speed control runs on the weights of T2V, the toy's too
        assert catalog.source_of("Wan2.1-VACE-14B", "vae").model_id == "Wan-AI/Wan2.1-T2V-1.3B"

    @pytest.mark.parametrize("row", catalog.TOYS, ids=lambda row: row.name)
    def test_a_toy_takes_what_its_row_says(self, row):
        model, wanted = load_model(row.name, device="cpu"), layout_of(row)
        assert (model.name, model.preset) == (row.name, row.preset)
        assert row.preset == (catalog.TOY if "speed" in row.adapters else catalog.TOLD_BY_MORE)
        for name in ("in_dim", "image_tokens", "image_positions", "reference", "camera_channels"):
            assert getattr(model.layout, name) == getattr(wanted, name)
        assert model.beside.keys() == {part for part, adapter in PARTS.items() if adapter in row.adapters}
        assert all(download.find(source) for source in row.files.values())

    def test_a_model_without_such_a_file(self):
        with pytest.raises(FileError, match="Wan2.1-T2V-14B has no image encoder"):
            catalog.source_of("Wan2.1-T2V-14B", "image_encoder")

    def test_sizes_can_be_made(self):
        for row in catalog.CATALOG:
            assert row.preset.width % 16 == row.preset.height % 16 == 0
            assert row.preset.num_frames % 4 == 1
