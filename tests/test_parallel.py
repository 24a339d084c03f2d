"""Several processes make one video: it is the one that one process makes, each does its share, and all end together."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from comfyui_wanflow.nodes.headless import together
from comfyui_wanflow.nodes.headless.runner import Runner
from comfyui_wanflow.nodes.headless.validate import WorkflowError
from comfyui_wanflow.nodes.host import io
from comfyui_wanflow.nodes.host.standalone import StandaloneHost
from comfyui_wanflow.wan_core.errors import InputError, Lost
from comfyui_wanflow.wan_core.models.compiled import Compile
from comfyui_wanflow.wan_core.parallel.sequence import Sequence
from comfyui_wanflow.wan_core.parallel.team import Share, Team, join
from families import model, relative_error, video
from PIL import Image
from torch import distributed as dist

WORKER = Path(__file__).with_name("parallel_worker.py")
ROOT = Path(__file__).resolve().parents[1]
SIZE = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of four processes says of every case."""
    file = tmp_path_factory.mktemp("parallel") / "found"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    known |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(file)]
    workers = [
        subprocess.Popen(command, env=os.environ | known | {"RANK": str(i)}, cwd=WORKER.parent) for i in range(SIZE)
    ]
    for worker in workers:
        worker.wait(300)
    return [json.loads(Path(f"{file}.{i}").read_text()) for i in range(SIZE)]


@pytest.mark.parametrize("way", ["auto", "tokens"])
@pytest.mark.parametrize("case", [
    "T2V", "without guidance", "merged guidance", "several videos", "video to video", "I2V", "FLF2V",
    "control and reference", "camera", "VACE", "motion speed", "TeaCache", "EasyCache", "MagCache",
    "part guided", "windows",
])  # fmt: skip
def test_all_make_the_video_that_one_makes(found, case, way):
    for process in found:
        error, (rows, tokens, calls) = process[case][way]
        assert error <= 1e-5
        _, (all_rows, all_tokens, all_calls) = process[case]["alone"]
        if way == "tokens" or case in ("without guidance", "merged guidance"):  # four parts, all prompts
            assert (rows, tokens, calls) == (all_rows, -(-all_tokens // 4), all_calls)
        elif case == "part guided":  # two parts of one prompt; all do the positive one where it is alone
            assert (rows, tokens) == (all_rows, -(-all_tokens // 2)) and all_calls // 2 < calls < all_calls
        else:  # two parts of one prompt
            assert (rows, tokens, calls) == (all_rows, -(-all_tokens // 2), all_calls // 2)


def test_a_process_that_is_gone_is_noticed(found):
    for process in found[:-1]:
        assert "Another process of this run has ended" in process["lost"]


def test_who_can_share_what():
    def share(size, prompts, heads, way="auto"):
        return Team(0, size, None, way).share(prompts, heads)

    assert share(2, 1, 12).tokens.size == 2 and share(2, 1, 12).prompt is None
    with pytest.raises(InputError, match="among 8 processes, because this model's 12 attention heads cannot. Start"):
        share(8, 1, 12)
    with pytest.raises(InputError, match="numbers of processes: 2, 4, 6, 8, 12, 24."):
        share(16, 2, 12)
    with pytest.raises(InputError, match="2 prompts cannot be shared evenly among 3 processes. Start a multiple of 2"):
        share(3, 2, 12, "prompts")
    assert share(3, 2, 12).tokens.size == 3


def test_each_needs_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="this computer has 2 for 3. Start as many processes as there are cards"):
        join()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Lost):  # the first has said it
        join()


def test_the_first_complains():
    store = dist.HashStore()
    first, second = (Team(rank, 2, store) for rank in (0, 1))
    assert second.speaks and not first.speaks and second.speaks


@pytest.fixture
def group():
    """A group of this process alone, through which all the same is spoken."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_compiled_blocks_share_too(group, monkeypatch):
    wan = model("T2V").with_compile(Compile(dynamic=False, backend="eager"))
    expected = video(wan)
    monkeypatch.setattr(Team, "share", lambda *_: Share(tokens=Sequence(0, 1, None)))
    assert relative_error(video(wan, team=Team(0, 1, None)), expected) <= 1e-5


# ---- whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """`quickstart(processes)`: the command in a new Python -> what it printed, and the pictures (5, 32, 32, 3)."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "comfyui_wanflow").symlink_to(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))
    settings = {"6.width": 32, "6.height": 32, "6.num_frames": 5, "7.steps": 1, "9.format": "png"}
    command = [sys.executable, "-m", "comfyui_wanflow", "run", "quickstart"]
    command += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]

    def run(processes):
        arguments = ["--output-dir", f"in{processes}", "--processes", str(processes)]
        done = subprocess.run(command + arguments, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        pictures = [numpy.array(Image.open(tmp_path / name)) for name in done.stdout.splitlines()]
        return done, torch.tensor(numpy.stack(pictures)).float()

    return run


def test_a_workflow_is_saved_once(quickstart, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    _, alone = quickstart(1)
    done, together = quickstart(2)
    assert done.stderr.count("Wan Sampler") == 1
    assert len(list((tmp_path / "in2").iterdir())) == len(alone) == 5
    assert torch.equal(alone, together)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two graphics cards")
def test_on_cards(quickstart):
    (_, alone), (_, together) = quickstart(1), quickstart(2)
    assert (alone - together).abs().mean() < 2  # of 255


class Make(io.ComfyNode):
    made: list = []
    WORKS_TOGETHER = True

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Make", category="WanFlow/loaders", outputs=[io.Int.Output(display_name="number")])

    @classmethod
    def execute(cls):
        cls.made.append("made")
        return io.NodeOutput(1)


class Save(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Save", inputs=[io.Int.Input("number")], is_output_node=True)

    @classmethod
    def execute(cls, number):
        Make.made.append("saved")
        return io.NodeOutput()


def test_others_run_for_what_is_done_together_after_the_leader_has_loaded(tmp_path):
    workflow = {"1": {"class_type": "Make", "inputs": {}}, "2": {"class_type": "Save", "inputs": {"number": ["1", 0]}}}
    store = dist.HashStore()

    def run(rank):
        host = StandaloneHost(tmp_path)
        host.team, host.quiet = Team(rank, 2, store), True
        return Runner([Make, Save], host).run(workflow).ran

    other = threading.Thread(target=run, args=[1])
    other.start()
    time.sleep(0.2)
    assert Make.made == []  # it waits
    assert run(0) == ["1", "2"]
    other.join(10)
    assert sorted(Make.made) == ["made", "made", "saved"]


class Train(Save):
    @classmethod
    def define_schema(cls):
        lora = io.Int.Output(display_name="lora")
        return io.Schema(node_id="Train", inputs=[], outputs=[lora], is_output_node=True)


class Sample(Make):
    @classmethod
    def define_schema(cls):
        number = io.Int.Output(display_name="number")
        return io.Schema(node_id="Sample", inputs=[io.Int.Input("lora")], outputs=[number])


@pytest.mark.parametrize("rank", [0, 1])
def test_what_would_be_saved_by_all_is_refused(tmp_path, rank):
    workflow = {
        "1": {"class_type": "Train", "inputs": {}},
        "2": {"class_type": "Sample", "inputs": {"lora": ["1", 0]}},
        "3": {"class_type": "Save", "inputs": {"number": ["2", 0]}},
    }
    host = StandaloneHost(tmp_path)
    host.team, host.quiet = Team(rank, 2, dist.HashStore()), True
    with pytest.raises(WorkflowError, match=r"Node 1 \(Train\) saves files, .* Run this workflow without --processes"):
        Runner([Train, Sample, Save], host).run(workflow)


# ---- the launcher -----------------------------------------------------------------------------------------------


def started(program, count=2):
    """The exit status of processes that run a few lines of Python, where `rank` is theirs."""
    return together.launch([sys.executable, "-c", f"import os, time; rank = int(os.environ['RANK']); {program}"], count)


def test_all_end_well():
    assert started("assert os.environ['WORLD_SIZE'] == '3'", 3) == 0


def test_an_error_in_one_ends_all():
    start = time.monotonic()
    assert started("time.sleep(60 if rank == 0 else 0.1); os._exit(2)") == 2
    assert time.monotonic() - start < 10


def test_one_that_is_killed_is_named(capfd):
    assert started("rank and os.kill(os.getpid(), 9); time.sleep(60)") == 1
    assert "Process 2 of 2 was ended by SIGKILL: the computer may have run out of memory." in capfd.readouterr().err


def test_stopping_stops_all():
    handler = signal.getsignal(signal.SIGINT)
    threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()
    assert started("time.sleep(60)") == 130
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_part_of_several_starts_no_others(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert together.is_part()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not together.is_part()
