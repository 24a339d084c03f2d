"""`wanflow run --processes N`: the command runs N times at once, and its processes make each video together.

They find each other as those of torchrun do, which may start them as well, on several computers too:
`torchrun --nproc-per-node 4 -m comfyui_wanflow run WORKFLOW`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPED = 130
PATIENCE = 5.0  # seconds that processes get to end by themselves


def is_part() -> bool:
    """Whether this process is one of several already."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def wanflow(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", f"{__package__}.cli", *arguments]


def launch(command: list[str], count: int) -> int:
    """Run the command in `count` processes; the exit status. When one fails, all end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    processes = [
        subprocess.Popen(
            command, env=os.environ | shared | {"RANK": str(i), "LOCAL_RANK": str(i)}, start_new_session=True
        )
        for i in range(count)
    ]
    with passing_on(processes) as stopped:
        try:
            return STOPPED if watch(processes) and stopped else status(processes)
        finally:
            end(processes)


@contextmanager
def passing_on(processes: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Inside the `with`, whoever asks this process to stop asks all of them; the signals that came."""
    came: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        for process in processes:
            process.send_signal(number)  # nothing happens to one that has ended

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(processes: list[subprocess.Popen]) -> bool:
    """Wait until all have ended well, or one badly: whether the latter."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return any(codes)
        time.sleep(0.05)


def status(processes: list[subprocess.Popen]) -> int:
    """The exit status of all together. One that was killed could not say so itself."""
    for number, process in enumerate(processes):
        if (process.returncode or 0) < 0:
            name = signal.Signals(-process.returncode).name
            hint = ": the computer may have run out of memory" if name == "SIGKILL" else ""
            print(f"Process {number + 1} of {len(processes)} was ended by {name}{hint}.", file=sys.stderr, flush=True)
            return 1
    return next((process.returncode for process in processes if process.returncode), 0)


def end(processes: list[subprocess.Popen]) -> None:
    """Nothing is left running."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
