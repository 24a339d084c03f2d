"""Training in the graph: what the nodes show and give, stopping and going on, and what is saved."""

import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from comfyui_wanflow.nodes import dataset as dataset_node
from comfyui_wanflow.nodes import grid as grid_node
from comfyui_wanflow.nodes import train as train_node
from comfyui_wanflow.nodes.dataset import Dataset
from comfyui_wanflow.nodes.grid import CheckpointGrid
from comfyui_wanflow.nodes.host import host, live
from comfyui_wanflow.nodes.host.schema import HiddenHolder
from comfyui_wanflow.nodes.host.standalone import Interrupted
from comfyui_wanflow.nodes.lora import SaveLora
from comfyui_wanflow.nodes.train import Train
from comfyui_wanflow.nodes.watch import Watch
from comfyui_wanflow.wan_core.errors import FileError, InputError
from comfyui_wanflow.wan_core.loading.load import load_model, load_text_encoder, load_vae
from comfyui_wanflow.wan_core.loading.lora_files import KEY_FORMATS, load_lora
from comfyui_wanflow.wan_core.models.dit import DiT
from comfyui_wanflow.wan_core.models.layout import DiTLayout
from comfyui_wanflow.wan_core.sampling.loop import Settings, sample
from comfyui_wanflow.wan_core.sheet import video_sheet
from comfyui_wanflow.wan_core.training import samples
from comfyui_wanflow.wan_core.training.cache import Cache
from comfyui_wanflow.wan_core.training.examples import Encoders, prepare
from comfyui_wanflow.wan_core.training.logs import read_losses
from comfyui_wanflow.wan_core.training.loss_chart import curve, loss_chart
from comfyui_wanflow.wan_core.training.results import results
from safetensors import safe_open
from toy_data import SCENES, SIZE, save_random, write_data, write_encoders

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = DiTLayout(dim=128, ffn_dim=64, layers=2, heads=1, text_dim=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return write_encoders(folder) | {"dit": save_random(DiT(LAYOUT), folder / "dit.safetensors")}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    (folder / "toy").mkdir()
    write_data(folder / "toy")
    (folder / "toy" / "broken.mp4").write_bytes(b"no video")
    rows = json.loads((folder / "toy" / "all.json").read_text())
    rows += [{"video": "broken.mp4", "prompt": "broken"}, {"video": "gone.mp4", "prompt": "gone"}]
    (folder / "toy" / "all.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Clips are encoded once for all tests."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def folders(clips, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_node, "CACHE", cache)
    monkeypatch.setattr(train_node, "CACHE", cache)
    monkeypatch.setattr(host, "input_directory", clips)
    monkeypatch.setattr(host, "output_directory", tmp_path)
    monkeypatch.setattr(host, "interrupted", False)


@pytest.fixture
def engines(files):
    return {
        "model": load_model(files["dit"], device="cpu"),
        "vae": load_vae(files["vae"], device="cpu"),
        "text_encoder": load_text_encoder(files["text"], device="cpu"),
    }


def defaults(node):
    sockets = [*node.GET_NODE_INFO_V1()["input"]["required"].items()]
    return {name: options["default"] for name, (_, options) in sockets if "default" in options}


def execute(node, **inputs):
    """As ComfyUI runs it: under inference mode, with what it asked of the host."""
    prepared = type(node.__name__, (node,), {"hidden": HiddenHolder(unique_id="7")})
    with torch.inference_mode():
        return prepared.execute(**{**defaults(node), **inputs})


def data(**inputs):
    inputs = {"folder": "toy", "metadata": "all.json", "size": f"{SIZE}x{SIZE}", "num_frames": 5, **inputs}
    return execute(Dataset, **inputs)


def train(engines, **inputs):
    usual = {"rank": 2, "epochs": 2, "learning_rate": 3e-3, "folder": "training/toy", "dataset": data().args[0]}
    return execute(Train, **engines, **{**usual, **inputs})


class TestData:
    def test_lists_shows_and_says_what_is_left_out(self, capsys):
        output = data()
        dataset, preview, report = output.args
        assert [item.prompt for item in dataset.items][:2] == [scene.caption for scene in SCENES]
        assert report.splitlines()[0] == "2 clips of 3 files." and report in capsys.readouterr().err
        assert "row 3" in report and "broken.mp4" in report and "gone.mp4" in report
        assert dataset.framing.num_frames == 5 and dataset.largest == (SIZE, SIZE)
        assert dataset.items[0].columns["control_video"]  # for whoever asks for it in Wan Train
        assert preview.shape[0] == 1 and preview.std() > 0.1
        (shown,) = output.ui["images"]
        assert (host.temp_dir() / shown["subfolder"] / shown["filename"]).is_file()

    def test_options(self):
        dataset = data(caption_prefix="toy, ", caption_dropout=0.1, repeat=3, size="original").args[0]
        assert dataset.items[0].prompt.startswith("toy, a red") and dataset.repeat == 3
        assert dataset.options["caption_dropout"] == 0.1 and dataset.framing.height is None

    def test_a_changed_caption_counts(self, tmp_path):
        (tmp_path / "here").mkdir()
        caption = tmp_path / "here" / "a.txt"
        caption.write_text("a")
        before = Dataset.fingerprint_inputs(folder=str(tmp_path / "here"), metadata="")
        assert before == Dataset.fingerprint_inputs(folder=str(tmp_path / "here"), metadata="")
        caption.write_text("a longer one")
        assert before != Dataset.fingerprint_inputs(folder=str(tmp_path / "here"), metadata="")

    def test_a_missing_folder_is_told_before_the_run(self, clips):
        assert Dataset.validate_inputs("toy") is True
        assert "no folder 'nowhere'" in Dataset.validate_inputs("nowhere") and str(clips) in Dataset.validate_inputs("")

    def test_nothing_to_train_on(self, tmp_path):
        dataset, preview, report = data(folder=str(tmp_path), metadata="").args
        assert not dataset.items and report.startswith("0 clips") and preview.ndim == 4


def video(model):
    text, latent = torch.ones(1, 3, LAYOUT.text_dim), torch.zeros(1, 16, 2, 4, 4)
    return sample(model, text, None, latent, Settings(seed=1, steps=2, cfg=1))


class TestTraining:
    def test_gives_a_lora_the_model_with_it_and_a_curve(self, engines, tmp_path, capsys):
        model = engines["model"]
        before = {name: tensor.clone() for name, tensor in model.trunk.state_dict().items()}
        output = train(engines)
        lora, trained, chart, folder = output.args
        assert lora.name == "toy" and len(lora.changes) == 20 and folder == str(tmp_path / "training" / "toy")
        assert torch.equal(video(trained), video(model.with_lora(lora)))
        assert (video(trained) - video(model)).abs().max() > 1e-4
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.trunk.state_dict().items())
        assert chart.shape[0] == 1 and chart.shape[3] == 3
        (state,) = output.ui["wanflow_training"]
        assert state["text"].startswith("step 4 of 4, loss") and not state["running"] and len(state["curve"]) == 4
        said = capsys.readouterr().err
        assert said.count("gone.mp4") == 1 and "epoch-1.safetensors" in said
        json.dumps(state, allow_nan=False)

    def test_samples_change_nothing(self, engines, tmp_path):
        train(engines, folder="plain")
        output = train(engines, folder="shown", sample_every=3, sample_prompt="a red circle")
        assert read_losses(tmp_path / "shown") == read_losses(tmp_path / "plain")
        steps = [sample["step"] for sample in output.ui["wanflow_training"][0]["samples"]]
        assert steps == [3, 4]  # every third step, and the last
        for shown in output.ui["wanflow_training"][0]["samples"]:
            assert (tmp_path / shown["subfolder"] / shown["filename"]).is_file()

    def test_what_a_sample_is_made_from_takes_room(self, engines, tmp_path, monkeypatch):
        watch, asked = Watch(None, tmp_path), []
        monkeypatch.setattr(host, "make_room", lambda engine, room: asked.append(room))
        monkeypatch.setattr(samples.Sample, "latents", lambda self, *_: torch.zeros(self.shape))
        for conditions in ((), (types.SimpleNamespace(in_front=30, embedded=0),)):
            made = samples.Sample(torch.zeros(0), torch.zeros(0), conditions, (1, 16, 1, 8, 8), Settings(0))
            watch.show_samples(made, engines["vae"], every=1)
            watch.sample(engines["model"], 1)
        alone, _, beside, _ = asked  # the model's and the VAE's, twice
        assert beside > alone

    def test_samples_of_an_image_model_begin_with_the_clip_s_own_picture(self, engines, tmp_path, monkeypatch):
        layout = dataclasses.replace(LAYOUT, in_dim=36, image_tokens=True)
        model = load_model(save_random(DiT(layout), tmp_path / "image.safetensors"), device="cpu")
        given = []
        monkeypatch.setattr(samples, "sample", lambda *inputs: given.append(inputs) or torch.zeros(1, 16, 2, 4, 4))
        train({**engines, "model": model}, extra_inputs="input_image", epochs=1, sample_every=1)
        (_, text, _, latent, _, (condition,), *_), *_ = given
        example = prepare_first(engines)
        assert torch.equal(text, example.text) and latent.shape == example.latents.shape
        assert torch.equal(condition.latents, example.conditions[0].latents)

    def test_goes_on_as_if_it_had_not_been_stopped(self, engines, tmp_path, monkeypatch):
        whole = train(engines, folder="whole").args[0]
        with monkeypatch.context() as patch:
            patch.setattr(host, "check_interrupted", stop_after(3, tmp_path / "stopped"))
            with pytest.raises(Interrupted):
                train(engines, folder="stopped")
        steps, file = results(tmp_path / "stopped")[-1]
        assert steps == 3 and len(load_lora(file).changes) == 20
        output = train(engines, folder="stopped")
        assert read_losses(tmp_path / "stopped") == read_losses(tmp_path / "whole")
        assert len(output.ui["wanflow_training"][0]["curve"]) == 4  # those before the stop too
        for name, change in output.args[0].changes.items():
            assert torch.equal(change.up, whole.changes[name].up), name

    def test_finished_early_the_graph_goes_on(self, engines, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            asked = iter([False, False, True])  # before the first step, after it, after the second
            patch.setattr(host, "finish_asked", lambda node: next(asked))
            lora, *_ = train(engines).args
        assert results(tmp_path / "training/toy")[-1][0] == 2 and lora.changes
        train(engines)
        assert len(read_losses(tmp_path / "training/toy")) == 4

    def test_files_of_an_earlier_training_are_not_taken_for_its_own(self, engines, tmp_path):
        first = train(engines, epochs=3).args[0]
        (tmp_path / "training/toy/training.pt").unlink()  # what the sentence says that begins anew
        second = train(engines, epochs=1, train_seed=1).args[0]
        name = next(iter(first.changes))
        assert not torch.equal(first.changes[name].down, second.changes[name].down)
        saved = load_lora(tmp_path / "training/toy/epoch-0.safetensors")
        assert torch.equal(second.changes[name].down, saved.changes[name].down)

    def test_another_training_needs_another_folder(self, engines):
        train(engines, epochs=1)
        with pytest.raises(InputError, match="other settings"):
            train(engines, epochs=1, learning_rate=1e-3)

    def test_the_whole_model(self, engines, tmp_path):
        lora, trained, *_ = train(engines, mode="full", learning_rate=1e-3).args
        assert lora is None and (video(trained) - video(engines["model"])).abs().max() > 1e-4
        loaded = load_model(results(tmp_path / "training/toy")[-1][1], device="cpu")
        torch.testing.assert_close(video(loaded), video(trained), rtol=1e-5, atol=1e-5)
        with pytest.raises(InputError, match="mode full"):
            execute(SaveLora, lora=lora)

    def test_dora_from_a_lora_on_held_out_clips(self, engines, tmp_path):
        first, *_ = train(engines, mode="dora", folder="first", epochs=1, held_out=data().args[0]).args
        assert (tmp_path / "first" / "validation.csv").read_text().count("\n") == 6
        second, *_ = train(engines, mode="dora", folder="second", learning_rate=1e-8, start_lora=first).args
        name = next(iter(first.changes))
        torch.testing.assert_close(second.changes[name].change.up, first.changes[name].change.up, atol=1e-6, rtol=0)

    def test_choices_that_are_none(self, engines):
        for wrong in ({"mode": "best"}, {"memory": "none"}, {"optimizer": "x"}, {"parts": "vae"}, {"folder": "../out"},
                      {"targets": "qq"}):  # fmt: skip
            with pytest.raises(InputError):
                train({**engines, "vae": None}, **wrong)  # before anything is encoded

    def test_what_is_missing_from_the_table_is_told(self, engines, files):
        with pytest.raises(InputError, match="There is no extra input 'picture'"):
            train(engines, extra_inputs="picture")


def prepare_first(engines):
    """The first example as the node prepares it."""
    dataset, encoders = data().args[0], Encoders(engines["vae"], engines["text_encoder"])
    return prepare(dataset.items, dataset.framing, encoders, Cache(Path(train_node.CACHE)), ["input_image"])[0][0]


def stop_after(steps, folder):
    def check():
        if len(read_losses(folder)) == steps:
            raise Interrupted

    return check


class TestSaving:
    @pytest.mark.parametrize("key_format", KEY_FORMATS)
    def test_every_format(self, engines, tmp_path, key_format):
        lora, trained, *_ = train(engines, epochs=1).args
        output = execute(SaveLora, lora=lora, filename_prefix="loras/mine", key_format=key_format)
        assert output.args == (str(tmp_path / "loras/mine_00001_.safetensors"),)
        assert "mine_00001_.safetensors" in host.model_files("loras")  # as in ComfyUI
        again = load_lora(host.find_model("loras", "mine_00001_.safetensors"))
        torch.testing.assert_close(video(engines["model"].with_lora(again)), video(trained), rtol=1e-5, atol=1e-5)
        with safe_open(output.args[0], "pt") as stored:
            metadata = stored.metadata()
        assert json.loads(metadata["ss_tag_frequency"])["captions"][SCENES[0].caption] == 1
        assert json.loads(metadata["training"])["learning_rate"] == 3e-3 and metadata["steps"] == "2"
        assert metadata["ss_base_model_version"] == "dit" and metadata["modelspec.title"] == "toy"
        assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "2"


class TestGrid:
    def grid(self, engines, **inputs):
        text = [[torch.ones(1, 3, LAYOUT.text_dim), {}]]
        latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
        usual = {"model": engines["model"], "vae": engines["vae"], "positive": text, "latent": latent, "cfg": 1.0,
                 "steps": 1}  # fmt: skip
        return execute(CheckpointGrid, **{**usual, **inputs}).args[0]

    def test_a_row_for_each_checkpoint_and_strength(self, engines):
        folder = train(engines).args[3]
        first = execute(SaveLora, lora=load_lora(results(host.output_dir() / "training/toy")[0][1])).args[0]
        small = self.grid(engines, loras=f"{folder}\n{first}", seeds="1, 2")
        strong = self.grid(engines, loras="training/toy", strengths="0.5, 1", seeds="1, 2", without=False)
        assert small.shape[0] == 5 and small.shape == strong.shape  # 1 + 2 + 1 rows, 2 * 2 rows
        row, one, other = small[:, 28 : 28 + SIZE], slice(160, 160 + SIZE), slice(164 + SIZE, 164 + 2 * SIZE)
        assert (row[:, :, one] - row[:, :, other]).any()

    def test_conditions_take_room(self, engines, monkeypatch):
        folder, asked = train(engines).args[3], []
        monkeypatch.setattr(host, "make_room", lambda engine, room: asked.append(room))
        monkeypatch.setattr(grid_node, "sample", lambda model, positive, negative, samples, *_: samples)
        for conditions in ((), (types.SimpleNamespace(in_front=30, embedded=0),)):
            self.grid(engines, loras=folder, conditions=conditions)
        alone, beside = asked[: len(asked) // 2], asked[len(asked) // 2 :]
        assert beside[0] > alone[0]  # the model's
        assert beside[1] == alone[1]  # the VAE's

    @pytest.mark.parametrize("inputs, sentence", [
        ({"loras": ""}, "loras is empty"),
        ({"loras": "training"}, "No training has saved anything"),
        ({"loras": "x.safetensors"}, "no file 'x.safetensors'"),
        ({"loras": "a", "seeds": "one"}, "seeds is 'one'"),
        ({"loras": "a", "strengths": " "}, "strengths is empty"),
    ])  # fmt: skip
    def test_what_is_wrong(self, engines, tmp_path, inputs, sentence):
        (tmp_path / "training").mkdir()
        with pytest.raises((InputError, FileError), match=sentence):
            self.grid(engines, **inputs)


class TestPictures:
    def test_the_curve_is_thinned_and_ends_with_the_last_step(self):
        losses = [1 / (step + 1) for step in range(1000)]
        points = curve(losses, 100)
        assert len(points) == 100 and points[-1][0] == 1000
        assert [loss for _, loss, _ in points] == sorted((loss for _, loss, _ in points), reverse=True)
        assert curve([]) == [] and curve([2.0]) == [(1, 2.0, 2.0)]

    @pytest.mark.parametrize("losses", [[], [0.5], [0.5] * 40, [0.1, 900.0, 0.1]])
    def test_any_losses_are_drawn(self, losses):
        chart = loss_chart(losses)
        assert chart.shape == (1, 432, 768, 3) and 0 <= chart.min() and chart.max() <= 1 and chart.std() > 0

    def test_a_sheet_keeps_its_videos(self):
        videos = [[torch.rand(3, 20, 32, 3), torch.rand(3, 20, 32, 3)]]
        sheet = video_sheet(videos, ["a row"], ["one", "two"], 64, label=100)
        for left, video in zip((100, 136), videos[0], strict=True):
            assert torch.equal(sheet[:, 28:48, left : left + 32], video)
        assert video_sheet(videos, ["a row"], ["", ""], 10).shape[1] == 10


class TestPage:
    """What goes to the page in the browser, and comes from it."""

    def test_both_sides_use_the_same_names(self, engines):
        script = (ROOT / "web" / "training.js").read_text()
        source = (ROOT / "nodes" / "host" / "live.py").read_text()
        assert '"wanflow.training"' in script and '"wanflow.training"' in source
        assert "/wanflow/finish/${" in script and '"/wanflow/finish/{node}"' in source
        assert f'"{Train.GET_SCHEMA().node_id}"' in script and "wanflow_training" in script
        (state,) = train(engines, epochs=1).ui["wanflow_training"]
        assert set(re.findall(r"state\.(\w+)", script)) <= set(state)

    def test_states_go_to_the_page_that_queued(self, monkeypatch):
        sent = []
        server = types.SimpleNamespace(client_id="me", send_sync=lambda *message: sent.append(message))
        module = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
        monkeypatch.setitem(sys.modules, "server", module)
        live.show("5", {"text": "half"})
        assert sent == [("wanflow.training", {"node": "5", "text": "half"}, "me")]

    def test_the_button_counts_once(self):
        live._asked.add("5")
        assert not live.finish_asked("6") and live.finish_asked("5") and not live.finish_asked("5")

    def test_without_a_server_nothing_happens(self):
        live.show("5", {})
