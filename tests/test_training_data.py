"""What is trained on: reading data sets, cutting clips, telling what cannot be used, and caching what was encoded."""

import json
import os
from dataclasses import replace

import pytest
import torch
from comfyui_wanflow.wan_core.errors import FileError, InputError
from comfyui_wanflow.wan_core.loading.load import load_vae
from comfyui_wanflow.wan_core.training.ahead import ahead
from comfyui_wanflow.wan_core.training.cache import Cache
from comfyui_wanflow.wan_core.training.clips import Library, read_clip
from comfyui_wanflow.wan_core.training.dataset import Item, list_items
from comfyui_wanflow.wan_core.training.examples import prepare
from comfyui_wanflow.wan_core.training.framing import Cut, Framing, bucket
from comfyui_wanflow.wan_core.training.inputs import INPUTS, columns, read_footage
from comfyui_wanflow.wan_core.training.survey import survey
from comfyui_wanflow.wan_core.video import save_video
from PIL import Image
from toy_data import SCENES, SIZE, load_encoders, render, write_data, write_encoders

FRAMING = Framing(num_frames=5, height=SIZE, width=SIZE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_files(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("models"))


@pytest.fixture
def encoders(encoder_files):
    return load_encoders(encoder_files)


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path / "library.json")


def items_of(data, *inputs):
    items, problems = list_items(data, data / "all.json", beside=columns(inputs))
    assert not problems
    return items


class TestListing:
    @pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
    def test_tables(self, data, tmp_path, suffix):
        rows = [
            {"video": "clip0.mp4", "prompt": "one, with a comma"},
            {"image": "reference0.png", "prompt": "two"},
            {"video": "gone.mp4", "prompt": "three"},
            {"prompt": "four"},
            {"video": "clip0.mp4"},
        ]
        table = tmp_path / f"metadata.{suffix}"
        csv = 'video,image,prompt\nclip0.mp4,,"one, with a comma"\n,reference0.png,two\ngone.mp4,,three\n,,four\n'
        texts = {"csv": csv, "json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows))}
        table.write_text(texts[suffix])
        items, problems = list_items(data, table)
        assert [(item.prompt, item.file.name) for item in items] == [
            ("one, with a comma", "clip0.mp4"), ("two", "reference0.png")]  # fmt: skip
        assert "row 3" in problems[0] and "gone.mp4" in problems[0] and "row 4" in problems[1]
        assert suffix == "csv" or "no prompt" in problems[2]
        assert not list_items(data, table, ["other"])[0]

    def test_a_folder(self, tmp_path):
        for name in ("a", "b"):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / "a.txt").write_text("one\n")
        items, problems = list_items(tmp_path, data_file_keys=["picture"], caption_prefix="toy, ")
        assert [item.prompt for item in items] == ["toy, one"]
        assert problems == ["b.png is left out: there is no caption b.txt beside it."]

    def test_other_columns(self, data, tmp_path):
        keys = ["video", "control_video", "vace_reference_image"]
        inputs = ("control_video", "vace_reference_image", "motion_bucket_id")
        row = {"video": "clip0.mp4", "prompt": "a", "control_video": "grey0.mp4", "motion_bucket_id": 3, "other": 1}
        row["vace_reference_image"] = ["reference0.png", "reference1.png"]
        (tmp_path / "a.json").write_text(json.dumps([row, row | {"control_video": "gone.mp4"}]))
        (item,), (problem,) = list_items(data, tmp_path / "a.json", keys, columns(inputs))
        assert item.file == data / "clip0.mp4" and item.columns["control_video"] == (data / "grey0.mp4",)
        assert item.columns["motion_bucket_id"] == 3 and len(item.columns) == 3
        assert len(item.columns["vace_reference_image"]) == 2 and "gone.mp4" in problem

    @pytest.mark.parametrize("name, text", [("a.txt", ""), ("a.json", "{"), ("a.json", "{}"), ("gone.csv", None)])
    def test_what_is_no_table(self, tmp_path, name, text):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(FileError):
            list_items(tmp_path, tmp_path / name)


class TestFraming:
    def test_sizes(self):
        assert Framing(5, 480, 832).size(100, 100) == (832, 480)
        assert Framing(5).size(1930, 1090) == (1264, 720) and Framing(5).size(100, 50) == (96, 48)

    @pytest.mark.parametrize("wrong", [{"height": 480}, {"num_frames": 80}, {"height": 10, "width": 16},
        {"frame_rate": -1}, {"sampling": "tail"}, {"samples": 0}, {"lengths": (8,)}, {"max_pixels": 9}])  # fmt: skip
    def test_what_cannot_be(self, wrong):
        with pytest.raises(InputError):
            Framing(**wrong)

    def test_buckets_have_the_area_and_nearly_the_shape(self):
        area = 480 * 832
        for width, height in ((832, 480), (480, 832), (512, 512), (1920, 1080), (1000, 250)):
            wide, high = bucket(width / height, area)
            assert wide % 32 == high % 32 == 0 and 0.88 * area < wide * high <= area
            assert wide / high == pytest.approx(width / height, rel=0.06)
        framing = Framing(5, 480, 832, buckets=True)
        assert framing.size(1280, 720) == framing.size(1270, 718) == (832, 480) != framing.size(720, 1280)

    def test_lengths(self):
        assert [Framing(17).length(frames) for frames in (1, 4, 16, 17, 40)] == [1, 1, 13, 17, 17]
        assert [Framing(17, lengths=(5, 9)).length(frames) for frames in (1, 4, 16, 17)] == [1, 0, 9, 17]

    def test_which_frames(self):
        def starts(frames=20, **how):
            return [cut.start for cut in Framing(5, **how).cuts(64, 64, frames)]

        assert starts() == [0] and starts(sampling="chunk") == [0, 5, 10, 15] and starts(sampling="uniform") == [7]
        assert starts(sampling="uniform", samples=4) == [0, 5, 10, 15]
        assert starts(sampling="chunk", frames=4) == [0, 1, 2, 3]
        assert starts(sampling="uniform", samples=3, frames=5) == [0]


class TestReading:
    def test_frame_rates(self, tmp_path):
        """A clip of 32 frames a second gives every other frame, or the first ones as the reference takes them."""
        grey = torch.linspace(0, 1, 18).view(-1, 1, 1, 1).expand(-1, 32, 32, 3)
        save_video(grey, tmp_path / "clip.mp4", 32, quality=10)
        resampled, as_they_come = (
            read_clip(tmp_path / "clip.mp4", rate, 0, 9, (32, 32)).mean((1, 2, 3)) for rate in (16, 0)
        )
        assert as_they_come[-1] == pytest.approx(8 / 17, abs=0.03)
        assert resampled[-1] == pytest.approx(16 / 17, abs=0.08)

    @pytest.mark.parametrize("suffix", ["mp4", "webp", "gif"])
    def test_a_piece_is_a_part_of_the_whole(self, tmp_path, library, suffix):
        file = tmp_path / f"clip.{suffix}"
        if suffix == "gif":
            pictures = [Image.new("RGB", (32, 32), (20 * i, 0, 0)) for i in range(12)]
            pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=40)
        else:
            save_video(torch.linspace(0, 1, 12).view(-1, 1, 1, 1).expand(-1, 32, 32, 3), file, 25, quality=10)
        for rate in (0, 16):
            facts = library.facts(file, rate)
            assert (facts.width, facts.height) == (32, 32) and facts.frames == (12 if rate == 0 else 8)
            assert library.facts(file, rate, 5).frames == 5 and library.facts(file, rate, 99).frames == facts.frames
            whole = read_clip(file, rate, 0, facts.frames)
            assert torch.equal(read_clip(file, rate, 3, 4), whole[3:7])
            with pytest.raises(FileError, match="ends after"):
                read_clip(file, rate, 3, facts.frames)

    def test_files_are_looked_at_once(self, data, library, monkeypatch):
        facts = library.facts(data / "clip0.mp4", 16)
        library.save()
        again = Library(library.file)
        monkeypatch.setattr("comfyui_wanflow.wan_core.training.clips.measure", None)
        assert again.facts(data / "clip0.mp4", 16) == facts and facts.frames == 9
        with pytest.raises(TypeError):
            again.facts(data / "clip0.mp4", 8)
        os.utime(data / "clip0.mp4")
        with pytest.raises(TypeError):
            again.facts(data / "clip0.mp4", 16)

    def test_masks_and_pictures(self, data, library):
        inputs = ("input_image", "end_image", "vace_video_mask", "vace_reference_image")
        items = items_of(data, *inputs)
        (piece, mirrored, *_), _ = survey(items, FRAMING, inputs, library, flip=True)
        footage, other = (read_footage(one, inputs) for one in (piece, mirrored))
        mask, reference = (footage.beside[name] for name in ("vace_video_mask", "vace_reference_image"))
        assert mask.shape == (5, SIZE, SIZE, 1) and mask.unique().tolist() == [0, 1] and mask[:, :, 20:].all()
        assert reference[0, 0, 0].tolist() == [1, 1, 1] and reference[0, 16, 16].tolist() != [1, 1, 1]
        assert torch.equal(footage.beside["input_image"], footage.clip[:1])
        assert torch.equal(footage.beside["end_image"], footage.clip[-1:])
        assert all(torch.equal(other.beside[name], seen.flip(2)) for name, seen in footage.beside.items())
        assert torch.equal(other.clip, footage.clip.flip(2))

    def test_a_column_goes_before_the_clip(self, data):
        item = Item("a", data / "clip0.mp4", "here", {"input_image": (data / "reference0.png",)})
        (piece,), _ = survey([item], FRAMING, ["input_image"], Library(data / "none.json"))
        assert read_footage(piece, ["input_image"]).beside["input_image"].mean((0, 1, 2))[2] < 0.1  # orange

    @pytest.mark.parametrize("workers", [0, 1, 3])
    def test_ahead(self, workers):
        assert list(ahead(lambda value: value * 2, range(7), workers)) == [0, 2, 4, 6, 8, 10, 12]


class TestSurvey:
    def test_all_that_is_wrong_is_told(self, data, library, tmp_path):
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        good = items_of(data, *INPUTS)[0]
        wide = tmp_path / "wide.mp4"
        save_video(torch.rand(9, 32, 64, 3), wide)

        def look(*inputs, framing=FRAMING, file=good.file, **changed):
            item = replace(good, file=file, columns={**good.columns, **changed}, place="row 7")
            pieces, notes = survey([item], framing, inputs, library)
            return len(pieces), " ".join(notes)

        assert look() == (1, "")
        assert look("control_video") == (1, "") and look("camera_control_direction") == (1, "")
        count, note = look(file=tmp_path / "broken.mp4")
        assert count == 0 and "row 7 is left out" in note and "could not be read" in note
        count, note = look(framing=Framing(17, SIZE, SIZE))
        assert count == 1 and "has 9 frames, fewer than 17; 9 are trained on" in note
        assert "fewer than the shortest" in look(framing=Framing(17, SIZE, SIZE, lengths=(13,)))[1]
        count, note = look("control_video", control_video=(good.columns["reference_image"][0],))
        assert count == 0 and "is a picture" in note
        count, note = look("control_video", control_video=(wide,))
        assert count == 1 and "its control_video 64x32" in note
        assert "enlarged to 64x64" in look(framing=Framing(5, 64, 64))[1]
        assert "motion_bucket_id is 'fast'" in look("motion_bucket_id", motion_bucket_id="fast")[1]
        assert "no direction 'Across'" in look("camera_control_direction", camera_control_direction="Across")[1]
        with pytest.raises(InputError, match="'control'"):
            look("control")

    def test_missing_inputs(self, data, library):
        bare = [Item("a", data / "clip0.mp4", "row 1")]
        pieces, notes = survey(bare, FRAMING, ["control_video"], library)
        assert not pieces and notes == ["row 1 is left out: it has no control_video."]
        pieces, notes = survey(bare, FRAMING, ["vace_video", "vace_reference_image"], library)
        assert not pieces and notes == ["row 1 is left out: it has no vace_video and no vace_reference_image."]
        some = [replace(bare[0], columns={"vace_video": (data / "grey0.mp4",)})]
        pieces, notes = survey(some, FRAMING, ["vace_video", "vace_reference_image"], library)
        assert len(pieces) == 1 and notes == ["No item has a vace_reference_image."]

    def test_the_shorter_of_two_clips_counts(self, data, library, tmp_path):
        save_video(render(SCENES[0], 6), tmp_path / "short.mp4")
        item = Item("a", data / "clip0.mp4", "row 1", {"control_video": (tmp_path / "short.mp4",)})
        (piece,), (note,) = survey([item], Framing(9, SIZE, SIZE), ["control_video"], library)
        assert piece.cut == Cut(SIZE, SIZE, 5) and "6 frames common to its clips" in note

    def test_only_what_has_no_sides_is_mirrored(self, data, library):
        def count(prompt, *inputs):
            item = replace(items_of(data, *INPUTS)[0], prompt=prompt)
            return len(survey([item], FRAMING, inputs, library, flip=True)[0])

        assert count("a red circle moves up") == 2 and count("bright") == 2
        assert count("it moves Left") == count("the rightmost") == count("向左移动") == 1
        assert count("a red circle", "camera_control_direction") == 1


class TestPreparing:
    def test_mixed_lengths(self, data, encoders, tmp_path):
        items = [*items_of(data), Item("a red", data / "reference0.png", "row 3")]
        examples, notes = prepare(items, FRAMING, encoders, Cache(tmp_path), workers=2)
        assert [shape[1] for shape in examples.shapes] == [2, 2, 1]
        assert examples.groups[0] == examples.groups[1] != examples.groups[2] and len(notes) == 1

    def test_what_breaks_while_it_is_read_is_left_out(self, data, encoders, tmp_path, monkeypatch):
        items = items_of(data)
        facts = Library.facts
        monkeypatch.setattr(Library, "facts", lambda self, *about: replace(facts(self, *about), frames=30))
        with pytest.raises(InputError, match="(?s)nothing to train on.*row 1.*ends after 9 frames"):
            prepare(items, Framing(17, SIZE, SIZE), encoders, Cache(tmp_path))

    def test_the_second_time_no_encoder_works(self, data, encoders, tmp_path, monkeypatch):
        inputs = ("input_image", "control_video", "reference_image", "vace_video")
        items, cache = items_of(data, *inputs), Cache(tmp_path)
        first, _ = prepare(items, FRAMING, encoders, cache, inputs)
        for encoder in (encoders.vae, encoders.text_encoder, encoders.image_encoder):
            monkeypatch.setattr(type(encoder), "encode", None)
        second, _ = prepare(items, FRAMING, encoders, cache, inputs)
        assert first.facts == second.facts and torch.equal(first[0].latents, second[0].latents)
        prepare(items, FRAMING, encoders, cache)  # a part of it is known as well
        with pytest.raises(TypeError):  # another size has to be encoded
            prepare(items, Framing(1, SIZE, SIZE), encoders, cache, inputs)

    def test_names_follow_from_all_that_matters(self, data, encoder_files, encoders, tmp_path):
        def names(changed=encoders, framing=FRAMING, **options):
            examples, _ = prepare(items_of(data), framing, changed, Cache(tmp_path), ["input_image"], **options)
            return [(clip.latents, clip.text, clip.conditions["image"]) for clip in examples.clips]

        plain = names()
        blind = names(replace(encoders, image_encoder=None))
        assert [one[:2] for one in blind] == [one[:2] for one in plain] and blind[0][2] != plain[0][2]
        half = names(replace(encoders, vae=load_vae(encoder_files["vae"], "bf16", device="cpu")))
        assert half[0][1] == plain[0][1] and half[0][0] != plain[0][0] and half[0][2] != plain[0][2]
        assert names(framing=replace(FRAMING, num_frames=1))[0][0] != plain[0][0]
        assert {*plain} < {*names(flip=True)} and len(names(flip=True)) == 4

    def test_an_interrupted_preparation_goes_on(self, data, encoders, tmp_path, monkeypatch):
        items, cache = items_of(data), Cache(tmp_path)

        def stop(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(items, FRAMING, encoders, cache, on_item=stop)
        seen, encode = [], type(encoders.vae).encode
        monkeypatch.setattr(type(encoders.vae), "encode", lambda self, *a: seen.append(1) or encode(self, *a))
        prepare(items, FRAMING, encoders, cache)
        assert len(seen) == 1

    def test_what_is_damaged_is_named(self, data, encoders, tmp_path):
        examples, _ = prepare(items_of(data), FRAMING, encoders, Cache(tmp_path))
        file = examples.cache.file(examples.clips[1].latents)
        file.write_bytes(file.read_bytes()[:100])
        for use in (lambda: examples[1], lambda: examples.groups):
            with pytest.raises(FileError, match=f"{file.name}.*Delete it and start again"):
                use()
        file.unlink()
        assert prepare(items_of(data), FRAMING, encoders, Cache(tmp_path))[0][1].latents.shape == (1, 16, 2, 4, 4)

    def test_captions_are_dropped_in_their_share(self, data, encoders, tmp_path):
        plain, _ = prepare(items_of(data), FRAMING, encoders, Cache(tmp_path))
        dropping, _ = prepare(items_of(data), FRAMING, encoders, Cache(tmp_path), caption_dropout=0.3)
        empty = encoders.text_encoder.encode([""])[0][:, :1]
        generator = torch.Generator().manual_seed(0)
        texts = [dropping.batch([0], [generator]).text for _ in range(200)]
        dropped = [text for text in texts if text.shape == empty.shape and torch.equal(text, empty)]
        assert 40 < len(dropped) < 80 and dropping.facts != plain.facts
        state = generator.get_state()
        assert torch.equal(plain.batch([0], [generator]).text, plain[0].text)
        assert torch.equal(generator.get_state(), state)
        with pytest.raises(InputError, match="caption_dropout"):
            prepare(items_of(data), FRAMING, encoders, Cache(tmp_path), caption_dropout=2)
