"""Downloads, against a stand-in of ModelScope that breaks off, lies and refuses; and what is found without it."""

import errno
import re
import shutil
from pathlib import Path

import fake_hub
import pytest
from comfyui_wanflow.nodes.headless import cli
from comfyui_wanflow.nodes.host import host
from comfyui_wanflow.nodes.library import ModelLibrary, library_of
from comfyui_wanflow.nodes.load import place
from comfyui_wanflow.wan_core.errors import FileError
from comfyui_wanflow.wan_core.loading import download, hub
from comfyui_wanflow.wan_core.loading.catalog import Source
from comfyui_wanflow.wan_core.loading.download import Library, fetch, find
from comfyui_wanflow.wan_core.loading.hub import in_words

CONTENT = bytes(range(256)) * 4096  # a megabyte
NAME = "diffusion_pytorch_model.safetensors"
MODEL = Source("Org/Some-Model", "diffusion_pytorch_model*.safetensors")
PLACE = Path("models/Org/Some-Model")


@pytest.fixture(autouse=True)
def online(tmp_path, monkeypatch):
    """An empty folder and a hub with one model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANFLOW_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "PAUSE", 0)
    monkeypatch.setattr(hub, "BLOCK", 1 << 16)
    monkeypatch.setattr(host, "models_dir", tmp_path / "models")
    monkeypatch.setattr(host, "quiet", False)
    with fake_hub.running() as (server, address):
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
        server.files["Org/Some-Model"] = {NAME: CONTENT, "config.json": b"{}"}
        yield server


class Told:
    """What a user sees."""

    def __init__(self, stop_at=None):
        self.lines, self.steps, self.stop_at = [], [], stop_at
        self.library = Library(say=self.lines.append, progress=self.begin)

    def begin(self, megabytes):
        self.total = megabytes
        return self

    def update(self, megabytes):
        self.steps.append(megabytes)
        if self.stop_at is not None and len(self.steps) > self.stop_at:
            raise KeyboardInterrupt


class TestAWholeFile:
    def test_arrives_under_its_name_only(self, online):
        assert fetch(MODEL) == [PLACE / NAME]
        assert (PLACE / NAME).read_bytes() == CONTENT
        assert [path.name for path in PLACE.iterdir()] == [NAME]
        assert online.asked == [(NAME, "")]

    def test_size_and_progress_are_told(self):
        told = Told()
        fetch(MODEL, told.library)
        assert told.lines == [f"Downloading {MODEL} from ModelScope into {PLACE}: 1 file, 1.05 MB."]
        assert (told.total, told.steps[0], told.steps[-1]) == (2, 0, 2)
        assert told.steps == sorted(told.steps)

    def test_empty_files_are_files(self, online):
        online.files["Org/Some-Model"] = {"empty.txt": b""}
        assert fetch(Source("Org/Some-Model", "empty.txt"))[0].read_bytes() == b""

    def test_a_file_of_another_size_is_replaced(self, online):
        """Someone else's interrupted download: shards 1 of 2 whole, 2 of 2 short of its end."""
        names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        online.files["Org/Some-Model"] = dict.fromkeys(names, CONTENT)
        PLACE.mkdir(parents=True)
        (PLACE / names[0]).write_bytes(CONTENT)
        (PLACE / (names[1] + ".part")).write_bytes(CONTENT[:100])
        assert fetch(MODEL) == [PLACE / name for name in names]
        assert online.asked == [(names[1], "bytes=100-")]


class TestBrokenConnections:
    def test_it_goes_on_where_it_broke(self, online):
        online.faults = [300_000, 200_000]
        fetch(MODEL)
        assert (PLACE / NAME).read_bytes() == CONTENT
        assert online.asked == [(NAME, ""), (NAME, "bytes=300000-"), (NAME, "bytes=500000-")]
        assert online.sent < len(CONTENT) + 2000  # nothing was sent twice

    def test_a_server_that_is_busy(self, online):
        online.faults = ["503", "429", "500"]
        fetch(MODEL)
        assert (PLACE / NAME).read_bytes() == CONTENT

    def test_it_gives_up_and_a_later_call_goes_on(self, online):
        online.faults = [1000] + [0] * 5
        with pytest.raises(FileError, match="ModelScope failed .the connection ended after 1,000 of.*goes on"):
            fetch(MODEL)
        assert [path.name for path in PLACE.iterdir()] == [NAME + ".part"]
        assert find(MODEL) == []  # what is there is not taken for the file
        told = Told()
        fetch(MODEL, told.library)
        assert "of which 1 kB are there from before" in told.lines[0]
        assert online.asked[-1] == (NAME, "bytes=1000-")
        assert (PLACE / NAME).read_bytes() == CONTENT

    def test_as_long_as_something_arrives_it_tries_again(self, online):
        online.faults = [50_000] * 20
        fetch(MODEL)
        assert (PLACE / NAME).read_bytes() == CONTENT

    def test_a_server_that_sends_elsewhere(self, online):
        online.faults = ["moved", 300_000, "moved"]
        fetch(MODEL)
        assert (PLACE / NAME).read_bytes() == CONTENT
        assert [wished for _, wished in online.asked] == ["", "", "bytes=300000-", "bytes=300000-"]

    def test_a_server_without_ranges(self, online):
        online.faults = [300_000, "ranges"]
        fetch(MODEL)
        assert (PLACE / NAME).read_bytes() == CONTENT

    def test_stopped_by_the_user(self, online):
        with pytest.raises(KeyboardInterrupt):
            fetch(MODEL, Told(stop_at=4).library)
        size = (PLACE / (NAME + ".part")).stat().st_size
        assert 0 < size < len(CONTENT)
        fetch(MODEL)
        assert (PLACE / NAME).read_bytes() == CONTENT
        assert online.asked[-1] == (NAME, f"bytes={size}-")

    def test_two_at_once(self, online):
        fcntl = pytest.importorskip("fcntl")
        PLACE.mkdir(parents=True)
        with (PLACE / (NAME + ".part")).open("ab") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(FileError, match="is being downloaded by another process. Wait for it"):
                fetch(MODEL)
        assert fetch(MODEL) and online.asked == [(NAME, "")]

    def test_nobody_answers(self, monkeypatch):
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "127.0.0.1:1")
        with pytest.raises(FileError, match="Org/Some-Model from ModelScope failed .*Check the connection"):
            fetch(MODEL)


class TestWrongAnswers:
    @pytest.mark.parametrize("announced", [len(CONTENT) - 5, len(CONTENT) + 5])
    def test_another_size_than_announced(self, online, announced):
        online.sizes[NAME] = announced
        with pytest.raises(FileError, match=f"{NAME} of Org/Some-Model arrived damaged.*removed"):
            fetch(MODEL)
        assert list(PLACE.iterdir()) == []

    def test_another_content_than_announced(self, online):
        online.hashes[NAME] = "0" * 64
        with pytest.raises(FileError, match="arrived damaged: its content is not what ModelScope announced"):
            fetch(MODEL)
        assert list(PLACE.iterdir()) == []

    def test_without_a_hash_the_size_counts(self, online):
        online.hashes[NAME] = ""
        assert fetch(MODEL)

    def test_an_unknown_model(self):
        with pytest.raises(FileError, match="ModelScope has no Org/Other, .*404.*Check the name"):
            fetch(Source("Org/Other", "a.safetensors"))

    def test_an_unknown_pattern(self):
        with pytest.raises(FileError, match="Org/Some-Model has no files 'a.safetensors'. Check the name and pattern"):
            fetch(Source("Org/Some-Model", "a.safetensors"))

    def test_parts_are_missing_there(self, online):
        online.files["Org/Some-Model"] = {"diffusion_pytorch_model-00001-of-00002.safetensors": b"x"}
        with pytest.raises(FileError, match="has not all parts of"):
            fetch(MODEL)

    @pytest.mark.parametrize("path", ["../../evil.safetensors", "/etc/evil.safetensors"])
    def test_paths_that_lead_elsewhere(self, online, path):
        online.files["Org/Some-Model"] = {path: b"x"}
        with pytest.raises(FileError, match="answered in a way that is not ModelScope's"):
            fetch(Source("Org/Some-Model", "*.safetensors"))

    def test_a_refusal_in_words(self, monkeypatch):
        monkeypatch.setattr(fake_hub.json, "dumps", lambda _: '{"Code": 404, "Success": false, "Message": "gone"}')
        with pytest.raises(FileError, match="does not give the files of Org/Some-Model: gone. Check the name"):
            fetch(MODEL)

    def test_a_login_page(self, online, monkeypatch):
        monkeypatch.setattr(fake_hub.json, "dumps", lambda _: "<html>Log in</html>")
        with pytest.raises(FileError, match="not ModelScope's.*login page.*MODELSCOPE_ENDPOINT"):
            fetch(MODEL)


class TestDisk:
    def test_too_little_room_is_told_before_anything_is_sent(self, online, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1_000_000))
        with pytest.raises(FileError, match=r"needs 1.05 MB on the disk, and .* has 1 MB left. Nothing was downloaded"):
            fetch(MODEL)
        assert online.asked == [] and not PLACE.exists()

    def test_what_is_there_needs_no_room(self, online, monkeypatch):
        PLACE.mkdir(parents=True)
        (PLACE / (NAME + ".part")).write_bytes(CONTENT[:900_000])
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 500_000))
        fetch(MODEL)
        assert online.asked == [(NAME, "bytes=900000-")]

    def test_it_fills_up_on_the_way(self, monkeypatch):
        def full(self, *arguments, **options):
            file = real(self, *arguments, **options)
            if self.name.endswith(".part"):
                file = Full(file)
            return file

        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, block):
                if self.file.tell() > 200_000:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.file.write(block)

        real = Path.open
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full)
            with pytest.raises(FileError, match="could not be written: the disk is full. Free some space.*goes on"):
                fetch(MODEL)
        assert find(MODEL) == []
        fetch(MODEL)
        assert (PLACE / NAME).read_bytes() == CONTENT

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "models").write_text("a file")
        with pytest.raises(FileError, match="could not be written"):
            fetch(MODEL)


class TestFolders:
    TOKENIZER = {"google/umt5-xxl/tokenizer.json": b"{}", "google/umt5-xxl/spiece.model": b"abc"}

    @pytest.mark.parametrize("pattern", ["google/umt5-xxl/", "google/*"])
    def test_a_folder_is_there_when_all_of_it_is(self, online, pattern):
        """"google/*" is how DiffSynth-Studio names the same folder."""
        online.files["Org/Some-Model"] |= self.TOKENIZER
        source, folder = Source("Org/Some-Model", pattern), PLACE / "google" / "umt5-xxl"
        online.faults = [None, 0, 0, 0, 0, 0, 0]  # the second file does not come
        with pytest.raises(FileError):
            fetch(source)
        assert (folder / "tokenizer.json").exists() and find(source) == []
        assert fetch(source) == [folder]
        assert sorted(path.name for path in folder.iterdir()) == ["spiece.model", "tokenizer.json"]

    def test_a_whole_model(self):
        assert fetch(Source("Org/Some-Model", "")) == [PLACE]
        assert sorted(path.name for path in PLACE.iterdir()) == ["config.json", NAME]

    def test_a_model_folder_is_no_model(self, tmp_path):
        (tmp_path / "models" / "vae").mkdir(parents=True)
        assert find(Source("Org/Some-Model", ""), Library((tmp_path / "models",))) == []


class TestLibrary:
    VAE = "Wan2.1_VAE.pth"

    @pytest.fixture
    def common(self, online):
        for model_id in ("Wan-AI/Wan2.1-T2V-1.3B", "PAI/Wan2.1-Fun-14B-InP"):
            online.files[model_id] = {self.VAE: model_id.encode()}

    def test_local_model_path(self, tmp_path):
        library = Library((tmp_path / "models" / "vae",), local_model_path=tmp_path / "elsewhere")
        assert fetch(MODEL, library) == [tmp_path / "elsewhere" / "Org" / "Some-Model" / NAME]
        assert find(MODEL, library) and not find(MODEL) and not (tmp_path / "models").exists()

    @pytest.mark.parametrize("way", ["skip_download", "WANFLOW_OFFLINE"])
    def test_skip_download(self, online, monkeypatch, way):
        if way == "WANFLOW_OFFLINE":
            monkeypatch.setenv(way, "1")
        with pytest.raises(FileError, match=f"Some-Model:.* is not on this machine, and {way} forbids downloads"):
            fetch(MODEL, Library(skip_download=way == "skip_download"))
        assert online.listings == []

    def test_what_is_there_is_not_asked_for(self, online, tmp_path):
        for folder in (tmp_path / "library/Org/Some-Model", tmp_path / "library/Some-Model"):
            folder.mkdir(parents=True)
            (folder / NAME).write_bytes(b"x")
            assert fetch(MODEL, Library((tmp_path / "library",))) == [folder / NAME]
            shutil.rmtree(tmp_path / "library")
        assert online.listings == []

    def test_every_model_folder_is_searched(self, tmp_path, online):
        home = tmp_path / "models/diffusion_models/Wan-AI/Wan2.1-T2V-1.3B"
        home.mkdir(parents=True)
        (home / self.VAE).write_bytes(b"x")
        assert fetch(Source("Wan-AI/Wan2.1-T2V-1.3B", self.VAE), library_of("vae")) == [home / self.VAE]
        (tmp_path / "models/vae").mkdir()
        (tmp_path / "models/vae" / self.VAE).write_bytes(b"x")  # its own folder comes first
        found = fetch(Source("Wan-AI/Wan2.1-T2V-1.3B", self.VAE), library_of("vae"))
        assert found == [tmp_path / "models/vae" / self.VAE]
        assert online.listings == []

    def test_common_files_are_redirected(self, common, online):
        told = Told()
        source = Source("PAI/Wan2.1-Fun-14B-InP", self.VAE)
        assert fetch(source, told.library)[0].read_bytes() == b"Wan-AI/Wan2.1-T2V-1.3B"
        assert told.lines[0].startswith(f"{source} is the same file as Wan-AI/Wan2.1-T2V-1.3B:{self.VAE}")
        assert online.listings == ["Wan-AI/Wan2.1-T2V-1.3B"]

    def test_unless_that_is_not_wanted(self, common):
        source = Source("PAI/Wan2.1-Fun-14B-InP", self.VAE)
        found = fetch(source, Library(redirect_common_files=False))
        assert found == [Path("models/PAI/Wan2.1-Fun-14B-InP") / self.VAE]
        assert fetch(source) == found  # nor when they are there already

    def test_as_the_reference_redirects(self):
        """wan21.md 1.3: text encoder and VAE to T2V-1.3B, CLIP to I2V-14B-480P, nothing else."""
        assert {pattern: source.model_id for pattern, source in download.COMMON.items()} == {
            "models_t5_umt5-xxl-enc-bf16.pth": "Wan-AI/Wan2.1-T2V-1.3B",
            "Wan2.1_VAE.pth": "Wan-AI/Wan2.1-T2V-1.3B",
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "Wan-AI/Wan2.1-I2V-14B-480P",
        }

    def test_the_node(self, tmp_path, online, capsys):
        chosen = ModelLibrary.execute(str(tmp_path / "big disk"), False, True).args[0]
        assert fetch(MODEL, library_of("diffusion_models", chosen)) == [tmp_path / "big disk/Org/Some-Model" / NAME]
        said = capsys.readouterr().err
        assert "1 file, 1.05 MB" in said and "2/2 MB" in said
        assert place("vae")["library"].local_model_path == host.models_dir
        assert ModelLibrary.execute("", True, False).args[0] == Library((), host.models_dir, True, False)


class TestCommands:
    @pytest.fixture(autouse=True)
    def published(self, online):
        home = "Wan-AI/Wan2.1-T2V-1.3B"
        names = (NAME, "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth")
        online.files[home] = TestFolders.TOKENIZER | dict.fromkeys(names, CONTENT)

    def test_downloads_go_where_models_are(self, tmp_path, capsys):
        assert cli.main(["download", "Wan2.1-T2V-1.3B", "--models-dir", "disk"]) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines()[0] == f"disk/Wan-AI/Wan2.1-T2V-1.3B/{NAME}"
        assert printed.err.startswith("Wan2.1-T2V-1.3B: 3.15 MB to download.\nDownloading Wan-AI/")
        assert not (tmp_path / "models").exists()
        assert cli.main(["models", "Wan2.1-T2V-1.3B", "--local_model_path", "disk"]) == 0
        assert "missing" not in capsys.readouterr().out

    def test_only_what_is_missing(self, tmp_path, online, capsys):
        (tmp_path / "models/vae").mkdir(parents=True)
        (tmp_path / "models/vae/Wan2.1_VAE.pth").write_bytes(b"mine")
        assert cli.main(["download", "Wan2.1-T2V-1.3B"]) == 0
        assert "Wan2.1_VAE.pth" not in [path for path, _ in online.asked]
        count = len(online.asked)
        assert cli.main(["download", "Wan2.1-T2V-1.3B"]) == 0 and len(online.asked) == count
        assert len(capsys.readouterr().out.splitlines()) == 8

    def test_the_disk_must_take_all_of_it(self, online, monkeypatch, capsys):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2_000_000))
        assert cli.main(["download", "Wan2.1-T2V-1.3B"]) == 1
        assert "Wan2.1-T2V-1.3B needs 3.15 MB on the disk" in capsys.readouterr().err
        assert online.asked == []

    def test_any_files(self, capsys):
        assert cli.main(["download", "Org/Some-Model:*.json"]) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith("models/Org/Some-Model/config.json")

    def test_sizes(self, online, capsys):
        assert cli.main(["models", "Wan2.1-T2V-1.3B"]) == 0
        printed = capsys.readouterr().out
        assert "vae: missing, Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth (about 508 MB)\n" in printed
        assert "diffusion_pytorch_model*.safetensors (about 5.68 GB)\n" in printed  # as wan21.md and formats.md say
        assert online.listings == []
        assert cli.main(["models", "Wan2.1-T2V-1.3B", "--sizes"]) == 0
        assert "vae: missing, Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth (1.05 MB)\n" in capsys.readouterr().out
        cli.main(["download", "Wan2.1-T2V-1.3B"])
        capsys.readouterr()
        assert cli.main(["models"]) == 0
        assert re.search(r"^Wan2.1-T2V-1.3B +here, 3.15 MB$", capsys.readouterr().out, re.MULTILINE)


def test_sizes_in_words():
    assert [in_words(n) for n in (0, 999, 1000, 508_000_000, 5_680_000_000)] == [
        "0 bytes", "999 bytes", "1 kB", "508 MB", "5.68 GB",
    ]  # fmt: skip
