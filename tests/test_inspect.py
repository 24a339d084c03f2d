"""`wanflow inspect` and its node: what a file is, in a page, for everything people have."""

import gguf
import numpy as np
import pytest
import torch
from comfyui_wanflow.nodes.headless.cli import main
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.nodes.report import Inspect
from comfyui_wanflow.wan_core.errors import FileError
from comfyui_wanflow.wan_core.loading.catalog import CATALOG
from comfyui_wanflow.wan_core.loading.inspect import inspect
from comfyui_wanflow.wan_core.loading.load import load_vae
from comfyui_wanflow.wan_core.loading.page import ranges
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.models.vae import VideoVAE
from comfyui_wanflow.wan_core.video import save_video
from PIL import Image
from safetensors.torch import save_file
from sparse import published_shapes, write_sparse

PUBLISHED = {
    "t2v-1.3b": ["Wan2.1-T2V-1.3B"],
    "t2v-14b": ["Wan2.1-T2V-14B"],
    "i2v-or-inp-14b": ["Wan2.1-I2V-14B-480P", "Wan2.1-I2V-14B-720P", "Wan2.1-Fun-14B-InP", "Wan2.1-Fun-V1.1-14B-InP"],
    "fun-inp-1.3b": ["Wan2.1-Fun-1.3B-InP", "Wan2.1-Fun-V1.1-1.3B-InP"],
    "fun-control-1.3b": ["Wan2.1-Fun-1.3B-Control"],
    "fun-control-14b": ["Wan2.1-Fun-14B-Control"],
    "flf2v-14b": ["Wan2.1-FLF2V-14B-720P"],
    "fun-v1.1-control-1.3b": ["Wan2.1-Fun-V1.1-1.3B-Control"],
    "fun-v1.1-control-14b": ["Wan2.1-Fun-V1.1-14B-Control"],
    "fun-v1.1-camera-1.3b": ["Wan2.1-Fun-V1.1-1.3B-Control-Camera"],
    "fun-v1.1-camera-14b": ["Wan2.1-Fun-V1.1-14B-Control-Camera"],
}
VACE = {
    "1.3b": ["VACE-Wan2.1-1.3B-Preview", "Wan2.1-VACE-1.3B"],
    "14b": ["Wan2.1-VACE-14B"],
}
GRAPHS = {
    "prompt": {
        "1": {"class_type": "WanFlowLoadModel", "inputs": {"model": "Wan2.1-T2V-1.3B"}},
        "2": {"class_type": "WanFlowTextEncode", "inputs": {"text": "a fox", "text_encoder": ["9", 0]}},
        "3": {"class_type": "WanFlowTextEncode", "inputs": {"text": "blurry"}},
        "4": {"class_type": "WanFlowApplyLora", "inputs": {"model": ["1", 0], "lora_name": "a.safetensors",
                                                           "strength": 0.5}},
        "5": {"class_type": "WanFlowSampler", "inputs": {"model": ["4", 0], "positive": ["2", 0], "negative": ["3", 0],
                                                         "seed": 7, "steps": 30, "cfg": 6.0}},
    },
    "workflow": {"nodes": [], "version": 0.4},
}  # fmt: skip


def facts(page):
    """Label -> text, of the first fact of that label."""
    found = {}
    for line in page.splitlines()[1:]:
        label, _, text = line.strip().partition("  ")
        found.setdefault(label, text.strip())
    return found


class TestModels:
    @pytest.mark.parametrize("row", PUBLISHED)
    def test_the_catalogue_rows_that_fit(self, tmp_path, row):
        page = inspect([write_sparse(tmp_path / "a.safetensors", published_shapes(row))])
        names = {model.name for model in CATALOG if f"{model.name} (" in facts(page)["published"]}
        assert names == set(PUBLISHED[row])
        assert ("only you can know" in page) == (len(names) > 1)

    @pytest.mark.parametrize("size", VACE)
    def test_vace_models_and_modules(self, tmp_path, size):
        module = published_shapes(f"vace-{size}-module")
        page = inspect([write_sparse(tmp_path / "a.safetensors", published_shapes(f"t2v-{size}") | module)])
        assert all(name in facts(page)["published"] for name in VACE[size])
        assert "VACE's video, mask and reference images" in facts(page)["takes"]
        page = inspect([write_sparse(tmp_path / "b.safetensors", module)])
        assert facts(page)["goes with"].startswith("Text to Video models of width")
        assert facts(page)["use"] == "load it with 'Add Wan Module'"

    def test_a_page_on_one(self, tmp_path):
        def dtype(name):
            return "F8_E4M3" if name.endswith("weight") and "blocks" in name and "norm" not in name else "BF16"

        shapes = {f"model.diffusion_model.{name}": shape for name, shape in published_shapes("flf2v-14b").items()}
        metadata = {"format": "pt", "modelspec.title": "mine", "recipe": "x" * 500}
        page = inspect([write_sparse(tmp_path / "a.safetensors", shapes, dtype, metadata)])
        found = facts(page)
        assert page.startswith(f"{tmp_path}/a.safetensors is a Wan 2.1 diffusion model (First-Last-Frame to Video")
        assert found["tensors"] == "1,304, 16.40 billion numbers"
        assert found["types"] == "float8_e4m3fn 98.5 %, bfloat16 1.5 %"
        assert found["quantised"] == "480 tensors float8_e4m3fn"
        assert found["names"] == "as published, each behind 'model.diffusion_model.'"
        assert found["network"] == "40 blocks, width 5120 (14B), 40 heads, feed-forward 13824"
        assert found["input"] == "36 channels: 16 latent + 4 mask + 16 image"
        assert found["takes"] == "text, a first and a last image, both looked at by CLIP"
        assert "says       modelspec.title: mine" in page and "x …" in page and "format: pt" not in page
        assert max(map(len, page.splitlines())) < 200

    def test_a_mark_of_another_program(self, tmp_path):
        shapes = published_shapes("t2v-1.3b") | {"model_type.Wan2_1-T2V-1.3B": (1,)}
        page = inspect([write_sparse(tmp_path / "a.safetensors", shapes)])
        assert facts(page)["mark"] == "the file calls itself Wan2_1-T2V-1.3B"

    def test_encoders_and_vaes(self, tmp_path):
        pages = {
            row: facts(inspect([write_sparse(tmp_path / f"{row}.safetensors", published_shapes(row), "BF16")]))
            for row in ("umt5-xxl-encoder", "vae-2.1", "clip-vit-h-visual")
        }
        assert pages["umt5-xxl-encoder"]["network"] == "24 layers, width 4096, 64 heads, 256,384 words"
        assert pages["umt5-xxl-encoder"]["tokenizer"].startswith("not in the file")
        assert pages["vae-2.1"]["network"].startswith("base width 96, 16 latent channels")
        assert pages["clip-vit-h-visual"]["network"] == "width 1280; Wan uses the first 31 layers"

    def test_a_pruned_vae(self, tmp_path):
        """lightx2v's, a quarter as wide: the widths are read from the tensors."""
        with torch.device("meta"):
            shapes = {name: tuple(t.shape) for name, t in VideoVAE(24).state_dict().items()}
        assert shapes["decoder.conv1.bias"] == (96,)
        page = inspect([write_sparse(tmp_path / "lightvaew2_1.safetensors", shapes)])
        assert "base width 24, 75% narrower than the published one" in facts(page)["network"]
        assert load_vae(tmp_path / "lightvaew2_1.safetensors").module.encoder.conv1.out_channels == 24

    def test_gguf(self, tmp_path):
        layout = DiTLayout(dim=256, ffn_dim=256, layers=1, heads=2, text_dim=256)
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "wan")
        for name, weight in DiT(layout).state_dict().items():
            numbers = weight.numpy().astype(np.float32)
            if numbers.ndim == 5:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", numbers.shape)
                numbers = numbers.reshape(numbers.shape[0], -1)
            if name.endswith("self_attn.q.weight"):
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = facts(inspect([tmp_path / "a.gguf"]))
        assert found["quantised"] == "1 tensors Q8_0"
        assert found["published"] == "no published model has this layout"
        assert found["says"] == "general.architecture: wan"

    def test_all_in_one(self, tmp_path):
        shapes = {f"model.diffusion_model.{name}": shape for name, shape in published_shapes("t2v-1.3b").items()}
        shapes |= {f"vae.{name}": shape for name, shape in published_shapes("vae-2.1").items()}
        page = inspect([write_sparse(tmp_path / "a.safetensors", shapes)])
        assert page.startswith(f"{tmp_path}/a.safetensors is an all-in-one checkpoint, with 2 models.\n\n")
        assert "Text to Video" in page and "a Wan 2.1 VAE" in page

    def test_shards_and_folders(self, tmp_path):
        shapes = list(published_shapes("t2v-1.3b").items())
        for i in (1, 2):
            write_sparse(tmp_path / f"a-0000{i}-of-00002.safetensors", dict(shapes[i - 1 :: 2]))
        page = inspect([tmp_path / "a-00001-of-00002.safetensors"])
        assert facts(page)["size"] == "5.68 GB in 2 files"
        (tmp_path / "vae").mkdir()
        write_sparse(tmp_path / "vae" / "b.safetensors", published_shapes("vae-2.1"))
        (tmp_path / "vae" / "c.safetensors").write_bytes(b"<html>")
        lines = inspect([tmp_path]).splitlines()
        assert len(lines) == 3
        assert "Text to Video" in lines[0] and "a Wan 2.1 VAE" in lines[1] and "a web page" in lines[2]


class TestWhatItIsNot:
    def test_relatives_are_named(self, tmp_path):
        shapes = published_shapes("t2v-14b") | {"patch_embedding.weight": (5120, 36, 1, 2, 2)}
        page = inspect([write_sparse(tmp_path / "a.safetensors", shapes)])
        assert page.startswith(f"{tmp_path}/a.safetensors: This is a Wan 2.2 A14B image model")
        assert "load it with" not in page

    def test_something_close(self, tmp_path):
        shapes = published_shapes("t2v-1.3b")
        del shapes["patch_embedding.weight"]
        page = inspect([write_sparse(tmp_path / "a.safetensors", shapes | {"extra.weight": (3, 4)})])
        assert "an unknown kind of file" in page
        assert facts(page)["close to"] == (
            "a diffusion model (T2V); lacks patch_embedding.weight; has besides extra.weight"
        )

    def test_something_else(self, tmp_path):
        save_file({"layer.1.weight": torch.zeros(3, 4), "layer.2.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
        found = facts(inspect([tmp_path / "a.safetensors"]))
        assert found["groups"] == "layer (2)"
        assert found["largest"] == "layer.1.weight [3, 4], layer.2.weight [2]"
        assert "close to" not in found

    @pytest.mark.parametrize("content, expected", [(b"", "is empty"), (b"hello", "is damaged"), (b"<!DOC", "web page")])
    def test_broken_files(self, tmp_path, content, expected):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(FileError, match=expected):
            inspect([tmp_path / "a.safetensors"])


class TestLoras:
    def save(self, path, names, rank=16, dim=1536, metadata=None, **extra):
        tensors = {f"{name}.lora_A.weight": torch.zeros(rank, dim) for name in names}
        tensors |= {f"{name}.lora_B.weight": torch.zeros(dim, rank) for name in names}
        save_file(tensors | extra, path, metadata)
        return facts(inspect([path]))

    def test_one_in_full(self, tmp_path):
        names = [f"diffusion_model.blocks.{i}.{part}.{x}" for i in range(30) for part in ("self_attn", "cross_attn")
                 for x in "qk"]  # fmt: skip
        found = self.save(tmp_path / "a.safetensors", names, metadata={"ss_base_model_version": "wan2.1"})
        assert found["kind"] == "low rank in 120 parts"
        assert found["rank"] == "16, alpha 16, worked in with factor 1"
        assert found["made for"] == "models of width 1536 (1.3B)"
        assert found["changes"] == "blocks 0 to 29: self_attn.q/k, cross_attn.q/k"
        assert found["written by"] == "ComfyUI, ai-toolkit, diffusion-pipe, or for it, by the names"
        assert found["says"] == "ss_base_model_version: wan2.1"
        assert found["use"] == "load it with 'Apply Wan LoRA'"

    def test_odd_ones(self, tmp_path):
        extra = {
            "lora_unet_blocks_3_cross_attn_k_img.lora_down.weight": torch.zeros(4, 5120),
            "lora_unet_blocks_3_cross_attn_k_img.lora_up.weight": torch.zeros(5120, 4),
            "lora_unet_blocks_3_cross_attn_k_img.alpha": torch.tensor(2.0),
            "lora_unet_head_head.diff_b": torch.zeros(64),
            "q_loras.down.weight": torch.zeros(4, 4),
        }
        found = self.save(tmp_path / "a.safetensors", [], **extra)
        assert found["kind"] == "low rank in 1 parts, whole differences in 1 parts"
        assert found["rank"] == "4, alpha 2, worked in with factor 0.5"
        assert found["made for"] == "models of width 5120 (14B), that look at an image"
        assert found["changes"] == "blocks 3: cross_attn.k_img; others: head.head.bias"
        assert "Stand-In" in found["left out"]
        assert found["written by"].startswith("kohya, musubi-tuner")

    def test_ranges(self):
        assert ranges([]) == ""
        assert ranges([5, 0, 2, 6, 7]) == "0, 2, 5 to 7"


class TestClips:
    @pytest.mark.parametrize("suffix", ["mp4", "webm", "webp", "png"])
    def test_how_it_was_made(self, tmp_path, suffix):
        clip = torch.rand(9 if suffix != "png" else 1, 32, 48, 3)
        (path,) = save_video(clip, tmp_path / f"a.{suffix}", 8, metadata=GRAPHS)
        page = inspect([path])
        found = facts(page)
        assert page.startswith(f"{path} was made by the workflow that it carries.")
        assert found["content"].startswith("48x32")
        assert suffix == "png" or "9 frames" in found["content"]
        assert (found["model"], found["seed"], found["sampler"]) == ("Wan2.1-T2V-1.3B", "7", "steps 30, cfg 6.0")
        assert (found["positive"], found["negative"]) == ("a fox", "blurry")
        assert found["LoRA"] == "a.safetensors, strength 0.5"
        assert found["workflow"] == "5 nodes; drop the file on ComfyUI to get it back"
        assert "  WanFlowSampler: seed 7, steps 30, cfg 6.0" in page.splitlines()

    def test_without(self, tmp_path):
        (path,) = save_video(torch.rand(9, 32, 48, 3), tmp_path / "a.mp4", 8)
        assert inspect([path]).startswith(f"{path} carries no workflow.")
        Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg")
        assert facts(inspect([tmp_path / "a.jpg"]))["content"] == "20x10, JPEG"

    @pytest.mark.parametrize("suffix", ["mp4", "webp", "png"])
    def test_broken(self, tmp_path, suffix):
        (tmp_path / f"a.{suffix}").write_bytes(b"nothing")
        with pytest.raises(FileError, match="could not be read"):
            inspect([tmp_path / f"a.{suffix}"])


class TestCommandAndNode:
    @pytest.fixture(autouse=True)
    def folders(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("models_dir", "input_directory", "output_directory"):
            monkeypatch.setattr(host, name, tmp_path / name)
        monkeypatch.setattr(host, "quiet", False)

    def test_the_bundled_model_by_its_name(self, capsys):
        assert main(["inspect", "WanTiny-T2V"]) == 0
        assert "Text to Video" in capsys.readouterr().out

    def test_names_in_the_hosts_folders(self, tmp_path, capsys):
        for place in ("models_dir/vae/mine", "output_directory/videos", "input_directory"):
            (tmp_path / place).mkdir(parents=True)
        write_sparse(tmp_path / "models_dir/vae/mine/a.safetensors", published_shapes("vae-2.1"))
        save_video(torch.rand(5, 32, 32, 3), tmp_path / "output_directory/videos/b.mp4")
        save_video(torch.rand(5, 32, 32, 3), tmp_path / "input_directory/c.mp4")
        assert main(["inspect", "mine/a.safetensors"]) == 0
        assert "a Wan 2.1 VAE" in capsys.readouterr().out
        for name in ("videos/b.mp4", "c.mp4"):
            assert main(["inspect", name]) == 0
            assert "carries no workflow" in capsys.readouterr().out

    def test_nothing_there(self, capsys):
        assert main(["inspect", "missing.safetensors"]) == 1
        assert "There is no file missing.safetensors" in capsys.readouterr().err
        assert main(["inspect", "Wan2.1-T2V-14B"]) == 1
        assert "Wan2.1-T2V-14B is not on this machine. Fetch it with" in capsys.readouterr().err

    def test_the_node_shows_and_gives_the_page(self, tmp_path, capsys):
        (path,) = save_video(torch.rand(5, 32, 32, 3), tmp_path / "a.mp4")
        output = Inspect.execute(f'"{path}"\n')
        assert output.args[0].startswith(f"{path} carries no workflow")
        assert output.ui == {"text": output.args} and output.args[0] in capsys.readouterr().err
        before = Inspect.fingerprint_inputs(str(path))
        save_video(torch.rand(9, 32, 32, 3), path)
        assert before != Inspect.fingerprint_inputs(str(path))
        with pytest.raises(FileError, match="No file was named"):
            Inspect.execute(" \n")
