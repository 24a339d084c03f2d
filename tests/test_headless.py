"""The runner, the standalone host, and the stand-ins for ComfyUI's own nodes."""

import json
import time

import fake_nodes
import numpy
import pytest
import safetensors.torch
import torch
from comfyui_wanflow.nodes.headless import core_nodes
from comfyui_wanflow.nodes.headless.runner import NodeError, Runner
from comfyui_wanflow.nodes.headless.validate import WorkflowError
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.nodes.host.schema import HiddenHolder
from comfyui_wanflow.nodes.host.standalone import Interrupted
from comfyui_wanflow.wan_core.errors import FileError, InputError
from PIL import Image


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("models", "input", "output"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(host, "models_dir", tmp_path / "models")
    monkeypatch.setattr(host, "input_directory", tmp_path / "input")
    monkeypatch.setattr(host, "output_directory", tmp_path / "output")
    monkeypatch.setattr(host, "quiet", True)
    monkeypatch.setattr(host, "interrupted", False)
    fake_nodes.RUNS.clear()
    return tmp_path


@pytest.fixture
def runner():
    return Runner([*fake_nodes.NODES, *core_nodes.NODES], host)


class TestRunner:
    def test_runs_in_order_under_inference_mode(self, runner, folders):
        result = runner.run(fake_nodes.workflow())
        assert fake_nodes.RUNS == ["FakeModel", "FakeSampler 2", "FakeDecode", "FakeSave"]
        assert [path.relative_to(folders).as_posix() for path in result.files] == [
            "output/fake/picture_00001_.png", "output/mode_00001_.txt"]
        assert result.files[1].read_text() == "True"

    def test_optional_inputs_reach_a_node_only_when_linked(self, runner):
        workflow = fake_nodes.workflow()
        workflow["6"] = {"class_type": "FakeSampler", "inputs": {**workflow["2"]["inputs"], "latent": ["2", 0]}}
        workflow["3"]["inputs"]["latent"] = ["6", 0]
        runner.run(workflow)
        assert fake_nodes.RUNS[:3] == ["FakeModel", "FakeSampler 2", "FakeSampler 6"]

    def test_unchanged_nodes_keep_their_results(self, runner):
        runner.run(fake_nodes.workflow())
        assert runner.run(fake_nodes.workflow()).ran == ["4", "5"]
        assert runner.run(fake_nodes.workflow(seed=8)).ran == ["2", "3", "4", "5"]

    def test_only_the_last_run_is_kept(self, runner):
        runner.run(fake_nodes.workflow())
        runner.run(fake_nodes.workflow(seed=8))
        assert len(runner.cache) == 5
        assert runner.run(fake_nodes.workflow()).ran == ["2", "3", "4", "5"]

    def test_a_node_that_failed_is_run_again_but_its_sources_are_not(self, runner):
        with pytest.raises(NodeError):
            runner.run(fake_nodes.workflow(steps=13))
        assert runner.run(fake_nodes.workflow(steps=12)).ran == ["2", "3", "4", "5"]

    def test_two_equal_nodes_run_once_unless_they_asked_for_their_id(self, runner):
        workflow = fake_nodes.workflow()
        workflow["6"] = workflow["1"]
        workflow["7"] = {"class_type": "FakeSampler", "inputs": {**workflow["2"]["inputs"], "model": ["6", 0]}}
        workflow["8"] = {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0], "filename_prefix": "x"}}
        runner.run(workflow)
        assert fake_nodes.RUNS.count("FakeModel") == 1
        assert {"FakeSampler 2", "FakeSampler 7"} < set(fake_nodes.RUNS)

    def test_a_changed_file_is_read_again(self, runner, folders):
        workflow = {
            "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "b"}},
        }
        for colour in ("red", "blue"):
            Image.new("RGB", (4, 4), colour).save(folders / "input" / "a.png")
            result = runner.run(workflow)
            assert result.ran == ["1", "2"]
            assert Image.open(result.files[0]).getpixel((0, 0)) == ((255, 0, 0) if colour == "red" else (0, 0, 255))
        assert runner.run(workflow).ran == ["2"]

    def test_a_failure_names_the_node_and_keeps_the_cause(self, runner):
        with pytest.raises(NodeError, match=r"Fake Sampler \(node 2\): 13 steps") as caught:
            runner.run(fake_nodes.workflow(steps=13))
        assert isinstance(caught.value.__cause__, InputError)

    def test_an_interrupt_stops_at_the_step(self, runner, monkeypatch):
        def update(progress, step, preview=None):
            progress.host.interrupted = step == 2
            progress.host.check_interrupted()

        monkeypatch.setattr("comfyui_wanflow.nodes.host.standalone.Progress.update", update)
        with pytest.raises(Interrupted):
            runner.run(fake_nodes.workflow(steps=9))
        assert fake_nodes.RUNS == ["FakeModel", "FakeSampler 2"]
        monkeypatch.undo()
        assert runner.run(fake_nodes.workflow(steps=9)).ran[0] == "2"

    def test_a_long_chain_does_not_recurse(self, runner):
        workflow = fake_nodes.workflow(steps=1)
        for id in range(10, 1500):
            inputs = {**workflow["2"]["inputs"], "latent": [str(id - 1) if id > 10 else "2", 0]}
            workflow[str(id)] = {"class_type": "FakeSampler", "inputs": inputs}
        workflow["3"]["inputs"]["latent"] = ["1499", 0]
        start = time.monotonic()
        assert len(runner.run(workflow).ran) == 1495
        assert time.monotonic() - start < 10


class TestHost:
    def test_model_files_are_listed_below_their_folders(self, folders):
        for name in ("unet/a.safetensors", "diffusion_models/wan/b.pth", "unet/c.gguf", "unet/readme.txt", "vae/c.pt"):
            (folders / "models" / name).parent.mkdir(parents=True, exist_ok=True)
            (folders / "models" / name).touch()
        assert host.model_files("diffusion_models") == ["a.safetensors", "c.gguf", "wan/b.pth"]
        assert host.find_model("diffusion_models", "wan/b.pth") == folders / "models/diffusion_models/wan/b.pth"
        assert host.model_files("loras") == []
        with pytest.raises(FileError, match="d.safetensors.*--models-dir"):
            host.find_model("vae", "d.safetensors")

    def test_names_are_counted_as_comfyui_counts(self, folders):
        first = host.output_path("video/clip", "mp4")
        assert (first.filename, first.subfolder) == ("clip_00001_.mp4", "video")
        assert first.path == folders.resolve() / "output" / "video" / "clip_00001_.mp4"
        for name in ("clip_00007_.png", "clip_2_00009_.mp4", "clips_00020_.mp4", "clip_x.mp4"):
            (first.folder / name).touch()
        assert host.output_path("video/clip", ".webm").filename == "clip_00008_.webm"
        assert host.output_path("%year%/a", "mp4").subfolder == time.strftime("%Y")

    @pytest.mark.parametrize("prefix", ["../a", "/tmp/a", "a/../../b"])
    def test_results_stay_in_the_output_folder(self, prefix):
        with pytest.raises(InputError, match="leads out of"):
            host.output_path(prefix, "mp4")

    def test_results_have_a_name(self, folders):
        with pytest.raises(InputError, match="prefix is empty"):
            host.output_path("", "mp4")

    def test_input_names_follow_comfyui(self, folders, monkeypatch):
        for place in ("input", "output"):
            (folders / place / "a [1].png").write_text(place)
        (folders / "here.png").touch()
        (host.temp_dir() / "t.png").touch()
        assert host.input_path("a [1].png").read_text() == "input"
        assert host.input_path("a [1].png [output]").read_text() == "output"
        assert host.input_path("t.png [temp]").parent == host.temp_dir()
        monkeypatch.chdir(folders)
        assert host.input_path("here.png").is_file()
        with pytest.raises(FileError, match="no file 'b.png'.*input"):
            host.input_path("b.png")

    def test_metadata_leaves_out_what_is_missing(self):
        assert host.metadata(HiddenHolder()) == {}
        assert host.metadata(HiddenHolder(prompt={"1": {}}, extra_pnginfo={"workflow": {"nodes": []}})) == {
            "prompt": {"1": {}}, "workflow": {"nodes": []}}

    def test_progress_is_one_line_in_a_log(self, monkeypatch, capsys):
        monkeypatch.setattr(host, "quiet", False)
        progress = host.progress(3)
        for step in (1, 2, 3):
            progress.update(step)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1 and "3/3" in printed.err


class TestCoreNodes:
    def test_save_image_stores_the_graph_and_cuts_like_comfyui(self, runner):
        workflow = fake_nodes.workflow()
        result = runner.run(workflow)
        with Image.open(result.files[0]) as image:
            assert json.loads(image.text["prompt"])["2"]["inputs"]["seed"] == 7
            pixels = numpy.array(image)
        expected = (255.0 * result.outputs["3"][0][0].numpy()).astype(numpy.uint8)
        assert (pixels == expected).all()
        assert result.ui["4"] == {"images": [{"filename": "picture_00001_.png", "subfolder": "fake", "type": "output"}]}

    def test_each_image_of_a_batch_has_its_number(self, runner, folders):
        node = runner.classes["SaveImage"]
        ui = node.execute(images=torch.zeros(3, 4, 6, 3), filename_prefix="a_%width%x%height%_%batch_num%").ui
        assert [entry["filename"] for entry in ui["images"]] == [f"a_6x4_{n}_00001_.png" for n in range(3)]
        ui = node.execute(images=torch.zeros(2, 4, 6, 3), filename_prefix="b").ui
        assert [entry["filename"] for entry in ui["images"]] == ["b_00001_.png", "b_00002_.png"]

    def test_preview_image_saves_to_the_temporary_folder(self, runner, folders):
        workflow = fake_nodes.workflow()
        workflow["4"] = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
        result = runner.run(workflow)
        (entry,) = result.ui["4"]["images"]
        assert entry["type"] == "temp" and (host.temp_dir() / entry["filename"]).is_file()
        assert len(result.files) == 1  # the text

    def test_load_image_gives_pixels_and_transparency(self, runner, folders):
        pixels = numpy.zeros((4, 6, 4), numpy.uint8)
        pixels[..., 0], pixels[..., 3] = 255, 51
        Image.fromarray(pixels).save(folders / "input" / "a.png")
        image, mask = runner.classes["LoadImage"].execute(image="a.png").args
        assert image.shape == (1, 4, 6, 3) and image.dtype == torch.float32
        assert image[0, 0, 0].tolist() == [1, 0, 0]
        assert mask.shape == (1, 4, 6) and torch.allclose(mask, torch.tensor(0.8))

    def test_load_image_without_transparency_and_with_frames(self, runner, folders):
        frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "green", "blue")]
        frames[0].save(folders / "input" / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
        image, mask = runner.classes["LoadImage"].execute(image="a.webp").args
        assert image.shape == (3, 4, 6, 3) and mask.shape == (3, 64, 64) and not mask.any()
        assert image[2, 0, 0].tolist() == [0, 0, 1]

    def test_load_image_mask_reads_a_channel(self, runner, folders):
        Image.new("RGBA", (6, 4), (255, 0, 102, 0)).save(folders / "input" / "a.png")
        masks = {name: runner.classes["LoadImageMask"].execute(image="a.png", channel=name).args[0]
                 for name in ("alpha", "red", "green", "blue")}
        assert {name: round(mask.mean().item(), 3) for name, mask in masks.items()} == {
            "alpha": 1.0, "red": 1.0, "green": 0.0, "blue": 0.4}
        assert masks["alpha"].shape == (1, 4, 6)

    def test_a_missing_image_is_reported_before_anything_runs(self, runner):
        workflow = fake_nodes.workflow()
        workflow["6"] = {"class_type": "LoadImage", "inputs": {"image": "none.png"}}
        workflow["4"]["inputs"]["images"] = ["6", 0]
        with pytest.raises(WorkflowError, match="no file 'none.png'"):
            runner.run(workflow)
        assert fake_nodes.RUNS == []

    def test_a_file_that_is_no_image_is_refused(self, runner, folders):
        (folders / "input" / "a.png").write_text("hello")
        with pytest.raises(FileError, match="is no image"):
            runner.classes["LoadImage"].execute(image="a.png")

    def test_latents_come_back_as_they_were(self, runner, folders):
        workflow = fake_nodes.workflow()
        workflow["5"] = {"class_type": "SaveLatent", "inputs": {"samples": ["2", 0], "filename_prefix": "latents/x"}}
        result = runner.run(workflow)
        path = folders / "output" / "latents" / "x_00001_.latent"
        assert path in result.files
        with safetensors.safe_open(path, "pt") as file:
            assert set(file.keys()) == {"latent_tensor", "latent_format_version_0"}
            assert json.loads(file.metadata()["prompt"])["1"]["class_type"] == "FakeModel"
        path.rename(folders / "input" / "x.latent")
        assert runner.infos()["LoadLatent"]["input"]["required"]["latent"][1]["options"] == ["x.latent"]
        (latent,) = runner.classes["LoadLatent"].execute(latent="x.latent").args
        assert torch.equal(latent["samples"], result.outputs["2"][0]["samples"])

    def test_old_latents_are_scaled(self, runner, folders):
        safetensors.torch.save_file({"latent_tensor": torch.ones(1)}, folders / "input" / "x.latent")
        (latent,) = runner.classes["LoadLatent"].execute(latent="x.latent").args
        assert latent["samples"].item() == pytest.approx(1 / 0.18215)

    def test_a_file_that_is_no_latent_is_refused(self, runner, folders):
        (folders / "input" / "x.latent").write_text("hello")
        with pytest.raises(FileError, match="Save Latent"):
            runner.classes["LoadLatent"].execute(latent="x.latent")

    def test_a_full_disk_leaves_no_half_file(self, runner, folders, monkeypatch):
        def save(image, path, **options):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("PIL.Image.Image.save", save)
        with pytest.raises(NodeError, match="no room left on the disk"):
            runner.run(fake_nodes.workflow())
        assert list((folders / "output" / "fake").iterdir()) == []

    @pytest.mark.parametrize("kind, value", [
        ("Int", 3), ("Float", 0.5), ("String", "a"), ("StringMultiline", "a\nb"), ("Boolean", True)])
    def test_primitives_pass_their_value_on(self, runner, kind, value):
        assert runner.classes[f"Primitive{kind}"].execute(value=value).args == (value,)

    def test_a_primitive_drives_an_input(self, runner):
        workflow = fake_nodes.workflow()
        workflow["6"] = {"class_type": "PrimitiveInt", "inputs": {"value": 13}}
        workflow["2"]["inputs"]["steps"] = ["6", 0]
        with pytest.raises(NodeError, match="13 steps"):
            runner.run(workflow)
