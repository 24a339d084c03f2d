"""Clips survive being written and read, carry their workflow, and leave nothing behind when the disk is full."""

import json
import subprocess

import imageio_ffmpeg
import pytest
import torch
from comfyui_wanflow.wan_core import video
from comfyui_wanflow.wan_core.errors import FileError, InputError
from comfyui_wanflow.wan_core.fit import fit_clip, fit_pictures
from comfyui_wanflow.wan_core.video import parse_size, read_graphs, read_video, save_video
from PIL import Image

GRAPHS = {
    "prompt": {"1": {"class_type": "X", "inputs": {"text": 'a=b;c#d\\ne\\\\f\n"ü 红"'}}},
    "workflow": {"nodes": []},
}


def clip(frames=9, height=48, width=64):
    """A white square walks to the right over a blue ground."""
    images = torch.zeros(frames, height, width, 3)
    images[..., 2] = 0.8
    for number in range(frames):
        images[number, 16:32, 4 * number : 4 * number + 16] = 1
    return images


def probe(path):
    """ffmpeg's description of a file, and its tags."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path), "-f", "ffmetadata", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    lines = done.stdout.decode().replace("\\\n", "\n").splitlines()
    tags = {}
    for line in lines[1:]:
        name, _, value = line.partition("=")
        tags[name] = value
    return done.stderr.decode(), tags


def unescape(text):
    out, characters = "", iter(text)
    for character in characters:
        out += next(characters) if character == "\\" else character
    return out


@pytest.mark.parametrize("suffix, decibels", [("mp4", 30), ("webm", 30), ("webp", 30)])
def test_round_trip(tmp_path, suffix, decibels):
    images = clip()
    (path,) = save_video(images, tmp_path / f"a.{suffix}", frame_rate=16, quality=8)
    again, rate = read_video(path)
    assert again.shape == images.shape and again.dtype == torch.float32
    assert rate == pytest.approx(16, rel=0.01)
    assert -10 * torch.log10((again - images).square().mean()) > decibels
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_colours_survive_a_flat_picture(tmp_path):
    """The colour matrix is named in the file: without it saturated colours shift by several per cent."""
    for colour in ([1.0, 0, 0], [0, 1.0, 0], [0.2, 0.4, 0.9]):
        images = torch.tensor(colour).expand(5, 32, 32, 3)
        save_video(images, tmp_path / "flat.mp4", quality=10)
        again, _ = read_video(tmp_path / "flat.mp4")
        assert (again - images).abs().max() < 3 / 255


def test_levels_are_rounded(tmp_path):
    """The reference cuts them, which makes every picture half a level darker."""
    (path,) = save_video(torch.tensor([99.4, 99.6, 254.6]).expand(1, 16, 16, 3) / 255, tmp_path / "a.png")
    with Image.open(path) as picture:
        assert picture.getpixel((0, 0)) == (99, 100, 255)


def test_mp4_is_h264_that_every_player_shows(tmp_path):
    save_video(clip(height=47, width=63), tmp_path / "a.mp4", frame_rate=16)
    description, _ = probe(tmp_path / "a.mp4")
    assert "h264" in description and "yuv420p" in description and "16 fps" in description and "64x48" in description
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # starts to play before it is loaded


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_workflow_in_video_tags(tmp_path, suffix):
    save_video(clip(), tmp_path / f"a.{suffix}", metadata=GRAPHS)
    _, tags = probe(tmp_path / f"a.{suffix}")
    tags = {name.lower(): unescape(value) for name, value in tags.items()}
    assert {name: json.loads(tags[name]) for name in GRAPHS} == GRAPHS


def test_mp4_tags_have_the_names_the_front_end_reads(tmp_path):
    """The names stand in the file's `mdta` keys, not in a comment."""
    save_video(clip(), tmp_path / "a.mp4", metadata=GRAPHS)
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"mdtaprompt" in data and b"mdtaworkflow" in data


def test_workflow_in_webp_and_png(tmp_path):
    save_video(clip(), tmp_path / "a.webp", metadata=GRAPHS)
    exif = Image.open(tmp_path / "a.webp").getexif()
    assert json.loads(exif[0x0110].removeprefix("prompt:")) == GRAPHS["prompt"]
    assert json.loads(exif[0x010F].removeprefix("workflow:")) == GRAPHS["workflow"]
    files = save_video(clip(3), tmp_path / "b_00001_.png", metadata=GRAPHS)
    assert [file.name for file in files] == ["b_00001_0000.png", "b_00001_0001.png", "b_00001_0002.png"]
    assert {name: json.loads(text) for name, text in Image.open(files[1]).text.items()} == GRAPHS
    assert Image.open(files[1]).getpixel((0, 0)) == (0, 0, 204)


@pytest.mark.parametrize("suffix", ["mp4", "webm", "webp", "png"])
def test_the_workflow_is_read_back(tmp_path, suffix):
    (path, *_) = save_video(clip(), tmp_path / f"a.{suffix}", metadata=GRAPHS)
    assert read_graphs(path) == GRAPHS
    (path, *_) = save_video(clip(), tmp_path / f"b.{suffix}")
    assert read_graphs(path) == {}
    path.write_bytes(b"no picture")
    for odd in (path, tmp_path / f"missing.{suffix}"):
        with pytest.raises(FileError, match="could not be read|There is no file"):
            read_graphs(odd)


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_sound(tmp_path, suffix):
    sound = {"waveform": torch.sin(torch.arange(12000) / 20).expand(1, 2, -1), "sample_rate": 24000}
    (path,) = save_video(clip(17), tmp_path / f"a.{suffix}", audio=sound)  # half as long as the picture
    assert "Audio:" in probe(path)[0]
    assert len(read_video(path)[0]) == 17
    with pytest.raises(InputError, match="sound"):
        save_video(clip(), tmp_path / "a.webp", audio=sound)


@pytest.mark.parametrize("suffix", ["mp4", "webm", "webp", "png"])
def test_full_disk_leaves_nothing(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    noise = torch.rand(9, 128, 128, 3)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))  # no file may grow beyond 4 kB
    try:
        with pytest.raises(FileError, match="could not be saved.*No partial file"):
            save_video(noise, tmp_path / f"a.{suffix}", quality=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["mp4", "webp", "png"])
def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, suffix):
    (tmp_path / "taken").touch()  # no folder, so nothing can be written below it, nor removed
    with pytest.raises(FileError, match="could not be saved.*Choose another output folder"):
        save_video(clip(), tmp_path / "taken" / f"a.{suffix}")


def test_an_older_file_survives_a_failure(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"older")
    with pytest.raises(InputError):
        save_video(clip(), path, quality=11)
    assert path.read_bytes() == b"older"


def test_wrong_values_are_sentences(tmp_path):
    for arguments, word in (({"quality": 0}, "quality"), ({"frame_rate": 0}, "frame_rate")):
        with pytest.raises(InputError, match=word):
            save_video(clip(), tmp_path / "a.mp4", **arguments)
    with pytest.raises(InputError, match="mp4, webm, webp, png"):
        save_video(clip(), tmp_path / "a.avi")
    with pytest.raises(InputError, match="nothing to save"):
        save_video(torch.zeros(0, 8, 8, 3), tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", ["mp4", "webp"])
def test_reading_fits_time_and_size(tmp_path, suffix):
    save_video(clip(16), tmp_path / f"a.{suffix}", frame_rate=16)
    frames, rate = read_video(tmp_path / f"a.{suffix}", frame_rate=8)
    assert (len(frames), rate) == (8, 8)
    frames, rate = read_video(tmp_path / f"a.{suffix}", num_frames=5, size=(32, 32))
    assert frames.shape == (5, 32, 32, 3) and rate == pytest.approx(16, rel=0.01)


def test_unreadable_videos_are_sentences(tmp_path):
    with pytest.raises(FileError, match="There is no video"):
        read_video(tmp_path / "missing.mp4")
    for name in ("text.mp4", "text.webp"):
        (tmp_path / name).write_text("not a video")
        with pytest.raises(FileError, match="could not be read as a video"):
            read_video(tmp_path / name)


def test_parse_size():
    assert parse_size("832x480") == (832, 480)
    assert parse_size(" 832 × 480 ") == (832, 480)
    assert parse_size("original") is None
    for text in ("big", "0x480", "832", "-1x5"):
        with pytest.raises(InputError, match="832x480"):
            parse_size(text)


def test_fit_pictures():
    wide = torch.zeros(2, 10, 40, 3)
    wide[:, :, 15:25] = 1  # the middle quarter is white
    cover = fit_pictures(wide, 16, 16, "cover")
    contain = fit_pictures(wide, 16, 16, "contain")
    stretch = fit_pictures(wide, 16, 16, "stretch")
    assert cover.shape == contain.shape == stretch.shape == (2, 16, 16, 3)
    assert cover.mean() > 0.9  # the dark sides are cut off
    assert contain[:, :5].abs().max() == 0 and contain[:, 7:9, 7:9].min() > 0.9
    assert stretch[:, :, 7:9].min() > 0.9 and stretch.mean() == pytest.approx(0.25, abs=0.02)
    assert fit_pictures(wide, 40, 10) is wide
    with pytest.raises(InputError, match="cover, contain, stretch"):
        fit_pictures(wide, 16, 16, "squeeze")


def test_fit_clip_says_what_it_did():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 16, 16, 3) / 10
    same, note = fit_clip(images, 16, 16, 6)
    assert note is None and torch.equal(same, images)
    longer, note = fit_clip(images, 16, 16, 9)
    assert "held" in note and torch.equal(longer[5:], images[5:].expand(4, -1, -1, -1))
    shorter, note = fit_clip(images, 32, 16, 5)
    assert "first 5" in note and "32x16" in note and shorter.shape == (5, 16, 32, 3)
    assert fit_clip(torch.rand(1, 16, 16, 4), 16, 16, 1)[0].shape[-1] == 3
    with pytest.raises(InputError, match="IMAGE"):
        fit_clip(torch.rand(16, 16, 3), 16, 16, 1)


@pytest.mark.parametrize("rate, own", [(16, 25), (24000 / 1001, 30), (16, 16)])
def test_a_piece_far_into_a_file_is_the_same(tmp_path, monkeypatch, rate, own):
    """It is jumped to, in place of decoding all that is before; key frames lie where the encoder put them."""
    grey = (torch.arange(16 * own) * 37 % 101 / 100).view(-1, 1, 1, 1).expand(-1, 16, 16, 3)
    save_video(grey, tmp_path / "long.mp4", own, quality=10)
    start = int(13 * rate)
    jumped, _ = read_video(tmp_path / "long.mp4", rate, 20, start=start)
    monkeypatch.setattr(video, "FAR", 1000)
    counted, _ = read_video(tmp_path / "long.mp4", rate, 20, start=start)
    assert torch.equal(jumped, counted) and len(jumped) == 20
