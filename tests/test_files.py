"""Reading checkpoints: lazily, safely, in every layout seen in the wild; and the sentence for each broken file."""

import argparse
import json
import math
import os
import pickle
import struct
import sys

import pytest
import torch
from comfyui_wanflow.wan_core.errors import FileError
from comfyui_wanflow.wan_core.loading.checkpoint import open_checkpoint
from comfyui_wanflow.wan_core.loading.keymaps import published_names
from comfyui_wanflow.wan_core.loading.mapped import DTYPES
from comfyui_wanflow.wan_core.loading.shards import group
from safetensors.torch import save_file

WEIGHTS = {"patch.weight": torch.arange(6.0).reshape(2, 3), "patch.bias": torch.ones(2, dtype=torch.bfloat16)}
OTHER_BIAS = torch.zeros(2, dtype=torch.bfloat16)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole.safetensors"
    save_file(WEIGHTS, path, metadata={"format": "pt"})
    return path


def assert_holds_weights(checkpoint, weights=WEIGHTS):
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name, tensor in weights.items():
        assert checkpoint.dtype(name) == tensor.dtype
        torch.testing.assert_close(checkpoint.tensor(name), tensor, rtol=0, atol=0)


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


class TestSafetensors:
    def test_names_types_values_and_metadata(self, whole):
        checkpoint = open_checkpoint(whole)
        assert_holds_weights(checkpoint)
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.description == str(whole)

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    def test_every_type(self, tmp_path, dtype):
        tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
        save_file({"a": tensor, "none": tensor[:0].clone(), "scalar": tensor[0].clone()}, tmp_path / "a.safetensors")
        checkpoint = open_checkpoint(tmp_path / "a.safetensors")
        assert checkpoint.tensor("a").dtype == dtype
        assert checkpoint.tensor("a").float().tolist() == [0, 1, 1, 0]
        assert checkpoint.tensor("none").shape == (0,)
        assert checkpoint.tensor("scalar").shape == ()

    def test_unaligned_data_are_computed_with(self, tmp_path):
        matrix = torch.randn(65, 33)
        header = json.dumps({"a": {"dtype": "F32", "shape": [65, 33], "data_offsets": [0, 65 * 33 * 4]}}).encode()
        header += b" " * ((3 - len(header)) % 8)
        content = struct.pack("<Q", len(header)) + header + matrix.numpy().tobytes()
        (tmp_path / "a.safetensors").write_bytes(content)
        found = open_checkpoint(tmp_path / "a.safetensors").tensor("a")
        assert found.data_ptr() % 4
        torch.testing.assert_close(found @ found.T, matrix @ matrix.T)

    def test_writing_to_a_tensor_leaves_the_file_alone(self, whole):
        before = whole.read_bytes()
        open_checkpoint(whole).tensor("patch.weight").zero_()
        assert whole.read_bytes() == before

    def test_tensors_are_fit_for_training_inside_inference_mode(self, whole):
        with torch.inference_mode():
            tensor = open_checkpoint(whole).tensor("patch.weight")
        assert not tensor.is_inference()

    def test_a_renamed_pickle_is_read_by_its_content(self, tmp_path):
        torch.save(WEIGHTS, tmp_path / "renamed.safetensors")
        assert_holds_weights(open_checkpoint(tmp_path / "renamed.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestLaziness:
    @staticmethod
    def private_megabytes():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

    @staticmethod
    def mapped_ranges(path):
        with open("/proc/self/maps") as file:
            lines = [line.split() for line in file if line.rstrip().endswith(str(path))]
        return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]

    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_tensors_are_the_mapped_file(self, tmp_path, suffix):
        path = tmp_path / f"large.{suffix}"
        large = {f"layer.{i}": torch.full((1024, 1024), float(i)) for i in range(32)}  # 128 MB
        (save_file if suffix == "safetensors" else torch.save)(large, path)
        before = self.private_megabytes()
        checkpoint = open_checkpoint(path)
        tensors = [checkpoint.tensor(name) for name in checkpoint.shapes]
        assert sum(tensor.sum().item() for tensor in tensors) == sum(i * 1024 * 1024 for i in range(32))
        assert self.private_megabytes() - before < 16
        ranges = self.mapped_ranges(path)
        assert all(any(a <= tensor.data_ptr() < b for a, b in ranges) for tensor in tensors)

    def test_a_file_larger_than_the_memory_opens(self, tmp_path):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        rows = memory // 2**20 + 2048
        header = json.dumps(
            {"a": {"dtype": "U8", "shape": [rows, 2**20], "data_offsets": [0, rows * 2**20]}}
        ).encode()
        path = tmp_path / "huge.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + rows * 2**20)  # sparse: takes no room on the disk
        assert open_checkpoint(path).tensor("a")[-1].sum() == 0


class TestPickles:
    @pytest.mark.parametrize("new_format", [True, False])
    def test_both_formats(self, tmp_path, new_format):
        torch.save(WEIGHTS, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
        assert_holds_weights(open_checkpoint(tmp_path / "a.pth"))

    @pytest.mark.parametrize(
        "saved",
        [
            {"state_dict": WEIGHTS, "epoch": 3},
            {"model": WEIGHTS, "optimizer": {"state": {}}},
            {"model": {"state_dict": WEIGHTS}},
            {"generator": {"other": torch.zeros(1)}, "generator_ema": WEIGHTS},
            WEIGHTS | {"step": 5},
        ],
        ids=["state_dict", "model", "twice", "ema", "numbers beside"],
    )
    def test_what_training_programs_save(self, tmp_path, saved):
        torch.save(saved, tmp_path / "a.ckpt")
        assert_holds_weights(open_checkpoint(tmp_path / "a.ckpt"))

    @pytest.mark.parametrize("new_format", [True, False])
    def test_code_is_refused_and_not_run(self, tmp_path, new_format):
        trace = tmp_path / "trace"

        class Command:
            def __reduce__(self):
                return os.system, (f"touch {trace}",)

        torch.save(WEIGHTS | {"x": Command()}, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
        with pytest.raises(FileError, match=r"asks to run code \(posix.system\).* not run.*safetensors"):
            open_checkpoint(tmp_path / "a.pth")
        assert not trace.exists()

    @pytest.mark.parametrize("protocol", [4, 5])
    def test_a_bare_pickle_is_refused_and_not_run(self, tmp_path, protocol, recwarn):
        trace = tmp_path / "trace"

        class Command:
            def __reduce__(self):
                return os.system, (f"touch {trace}",)

        (tmp_path / "a.pth").write_bytes(pickle.dumps({"x": Command()}, protocol))
        with pytest.raises(FileError, match="may ask to run code.*not read.*safetensors"):
            open_checkpoint(tmp_path / "a.pth")
        assert not trace.exists() and not recwarn.list

    def test_a_harmless_object_is_refused_too(self, tmp_path):
        torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
        with pytest.raises(FileError, match="argparse.Namespace"):
            open_checkpoint(tmp_path / "a.pth")

    @pytest.mark.parametrize("new_format", [True, False])
    def test_truncated(self, tmp_path, new_format):
        path = tmp_path / "a.pth"
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=new_format)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(FileError, match="damaged or incomplete.*Download it again"):
            open_checkpoint(path)

    @pytest.mark.parametrize("saved", [torch.zeros(3), [torch.zeros(3)], {"epoch": 3}])
    def test_no_named_tensors(self, tmp_path, saved):
        torch.save(saved, tmp_path / "a.pth")
        with pytest.raises(FileError, match="holds no tensors by name"):
            open_checkpoint(tmp_path / "a.pth")


def header_of(row: object) -> bytes:
    text = json.dumps({"a": row}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


class TestBrokenFiles:
    @pytest.mark.parametrize(
        "content, sentence",
        [
            (b"", "is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer.*git lfs pull"),
            (b"<!DOCTYPE html><html>", "web page.*download link"),
            (b"\n  <html>", "web page"),
            (b'{"error": "Entry not found"}', "a JSON text"),
            (b"GGUF\x03\x00\x00\x00", "cannot be read as GGUF"),
            (bytes(1000), "does not begin with a safetensors header"),
            (struct.pack("<Q", 40) + b"{" + b"x" * 100, "header is not readable"),
            (header_of({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}), "header is not readable"),
            (header_of({"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}), "header is not readable"),
            (header_of({"dtype": "F32", "shape": [2]}), "header is not readable"),
            (header_of({"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}), "header is not readable"),
            (header_of(3), "header is not readable"),
            (header_of({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}), "as F4.*bf16 or fp16"),
            (header_of({"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}), "incomplete: it holds"),
        ],
    )
    def test_sentence(self, tmp_path, content, sentence):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(FileError, match=f"model.safetensors.*{sentence}"):
            open_checkpoint(path)

    @pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
    def test_truncated_anywhere(self, whole, kept):
        whole.write_bytes(whole.read_bytes()[: max(10, math.floor(whole.stat().st_size * kept))])
        with pytest.raises(FileError, match="incomplete: it holds .* bytes.*download it again"):
            open_checkpoint(whole)

    def test_other_files(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
        with pytest.raises(FileError, match="is not a checkpoint"):
            open_checkpoint(tmp_path / "a.png")

    def test_missing_folder_and_nothing(self, tmp_path):
        with pytest.raises(FileError, match="There is no file"):
            open_checkpoint(tmp_path / "a.safetensors")
        with pytest.raises(FileError, match="is a folder"):
            open_checkpoint(tmp_path)
        with pytest.raises(FileError, match="No checkpoint file was given"):
            open_checkpoint([])


class TestShards:
    @pytest.fixture
    def parts(self, tmp_path):
        paths = []
        for i, (name, tensor) in enumerate(WEIGHTS.items(), start=1):
            paths.append(tmp_path / f"model-{i:05d}-of-00002.safetensors")
            save_file({name: tensor}, paths[-1])
        write_index(tmp_path, {name: path.name for name, path in zip(WEIGHTS, paths, strict=True)})
        return paths

    def test_a_list_one_part_and_the_index_mean_the_same(self, parts):
        index = parts[0].parent / INDEX
        for given in (parts, parts[::-1], parts[1], str(parts[0]), [parts[0]], index):
            assert_holds_weights(open_checkpoint(given))
        assert open_checkpoint(parts).description == f"{parts[0]} and 1 more"

    def test_a_list_of_files_without_numbers(self, parts, tmp_path):
        plain = [part.rename(tmp_path / f"{name}.safetensors") for name, part in zip("ab", parts, strict=True)]
        assert_holds_weights(open_checkpoint(plain))

    @pytest.mark.parametrize("given", ["part", "index"])
    def test_a_missing_part_is_named(self, parts, given):
        parts[1].unlink()
        path = parts[0] if given == "part" else parts[0].parent / INDEX
        whole = "This checkpoint" if given == "part" else str(path)
        with pytest.raises(FileError, match=f"^{whole} has 2 parts, of which 1 is missing: {parts[1]}. Download"):
            open_checkpoint(path)

    @pytest.mark.parametrize("text", ["[]", "{}", "nonsense", '{"weight_map": 3}'])
    def test_a_broken_index(self, tmp_path, text):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(FileError, match="is not a checkpoint index"):
            open_checkpoint(tmp_path / INDEX)

    @pytest.fixture
    def task(self, tmp_path):
        """A folder beside a whole checkpoint, with a bias of its own and an index that takes the rest from there."""
        folder = tmp_path / "task"
        folder.mkdir()
        save_file(WEIGHTS, tmp_path / "model.safetensors")
        save_file({"patch.bias": OTHER_BIAS}, folder / "model.safetensors")
        write_index(folder, {"patch.weight": "../model.safetensors", "patch.bias": "model.safetensors"})
        return folder

    def test_an_index_shares_tensors_with_another_checkpoint(self, task):
        checkpoint = open_checkpoint(task / INDEX)
        assert_holds_weights(checkpoint, WEIGHTS | {"patch.bias": OTHER_BIAS})
        assert checkpoint.files == [task / "model.safetensors", task / "../model.safetensors"]

    def test_tensors_that_no_index_lists_are_not_of_the_checkpoint(self, task):
        write_index(task, {"patch.weight": "../model.safetensors"})
        assert_holds_weights(open_checkpoint(task / INDEX), {"patch.weight": WEIGHTS["patch.weight"]})

    def test_a_tensor_that_a_listed_file_lacks(self, task):
        save_file({"other": torch.zeros(1)}, task / "model.safetensors")
        with pytest.raises(FileError, match=f"{task / INDEX} says that {task}/model.safetensors holds .* 'patch.bias'"):
            open_checkpoint(task / INDEX)

    def test_a_listed_file_in_another_folder_that_is_missing(self, task):
        (task.parent / "model.safetensors").unlink()
        with pytest.raises(FileError, match=f"{task / INDEX} has 2 parts, of which 1 is missing: {task}/../model.safe"):
            open_checkpoint(task / INDEX)

    @pytest.mark.parametrize("place", ["/etc/a.safetensors", "C:\\a.safetensors", "\\\\server\\share\\a.safetensors"])
    def test_an_index_leads_to_no_fixed_place(self, task, place):
        write_index(task, {"patch.weight": place})
        with pytest.raises(FileError, match="lists .* which is a place on somebody's machine"):
            open_checkpoint(task / INDEX)

    def test_in_a_folder_an_index_stands_for_its_files(self, task, parts):
        assert group(task) == [[task / INDEX]]
        assert group(parts[0].parent) == [[parts[0].parent / "model.safetensors"], [parts[0].parent / INDEX]]

    def test_in_a_folder_an_index_of_other_files_hides_none(self, parts):
        folder = parts[0].parent
        for text in ("nonsense", json.dumps({"weight_map": {"patch.bias": "gone.safetensors"}})):
            (folder / INDEX).write_text(text)
            assert group(folder) == [parts, [folder / INDEX]]

    def test_two_models_are_not_parts_of_one(self, whole, tmp_path):
        copy = tmp_path / "copy.safetensors"
        copy.write_bytes(whole.read_bytes())
        with pytest.raises(FileError, match="two of them hold the tensor 'patch"):
            open_checkpoint([whole, copy])


class TestNames:
    @pytest.mark.parametrize(
        "prefix",
        ["", "model.diffusion_model.", "diffusion_model.", "module.", "model.", "pipe.dit.", "_forward_module.module.",
         "_orig_mod.", "module._fsdp_wrapped_module."],
    )  # fmt: skip
    def test_prefixes_are_taken_off(self, tmp_path, prefix):
        save_file({prefix + name: tensor for name, tensor in WEIGHTS.items()}, tmp_path / "a.safetensors")
        assert_holds_weights(open_checkpoint(tmp_path / "a.safetensors"))

    def test_wrappers_inside_a_name(self):
        assert list(published_names(["blocks.0._fsdp_wrapped_module.ffn.0.weight"])) == ["blocks.0.ffn.0.weight"]

    def test_a_prefix_that_not_all_weights_carry_stays(self):
        names = ["model.a.weight", "other.weight"]
        assert list(published_names(names)) == names

    def test_markers_do_not_hide_a_prefix(self):
        names = ["model.diffusion_model.head.modulation", "model_type.Wan2_1-FLF2V-14B-720P", "scaled_fp8"]
        assert list(published_names(names)) == ["head.modulation", *names[1:]]

    def test_diffusers_names(self):
        pairs = {
            "condition_embedder.time_proj.weight": "time_projection.1.weight",
            "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
            "condition_embedder.image_embedder.ff.net.0.proj.bias": "img_emb.proj.1.bias",
            "blocks.3.attn1.to_out.0.bias": "blocks.3.self_attn.o.bias",
            "blocks.3.attn2.add_k_proj.weight": "blocks.3.cross_attn.k_img.weight",
            "blocks.3.attn2.norm_added_k.weight": "blocks.3.cross_attn.norm_k_img.weight",
            "blocks.3.norm2.weight": "blocks.3.norm3.weight",
            "blocks.3.scale_shift_table": "blocks.3.modulation",
            "blocks.3.ffn.net.0.proj.weight": "blocks.3.ffn.0.weight",
            "scale_shift_table": "head.modulation",
            "proj_out.weight": "head.head.weight",
            "vace_blocks.0.proj_out.weight": "vace_blocks.0.after_proj.weight",
            "patch_embedding.weight": "patch_embedding.weight",
        }
        assert published_names(pairs) == {published: stored for stored, published in pairs.items()}

    def test_hugging_face_umt5_names(self):
        block = "encoder.block.7.layer"
        pairs = {
            "encoder.block.0.layer.0.SelfAttention.q.weight": "blocks.0.attn.q.weight",
            f"{block}.0.SelfAttention.relative_attention_bias.weight": "blocks.7.pos_embedding.embedding.weight",
            f"{block}.0.layer_norm.weight": "blocks.7.norm1.weight",
            f"{block}.1.layer_norm.weight": "blocks.7.norm2.weight",
            f"{block}.1.DenseReluDense.wi_0.weight": "blocks.7.ffn.gate.0.weight",
            f"{block}.1.DenseReluDense.wi_1.weight": "blocks.7.ffn.fc1.weight",
            f"{block}.1.DenseReluDense.wo.weight": "blocks.7.ffn.fc2.weight",
            "shared.weight": "token_embedding.weight",
            "encoder.final_layer_norm.weight": "norm.weight",
            "spiece_model": "spiece_model",
        }
        assert published_names(pairs) == {published: stored for stored, published in pairs.items()}
