"""A real ComfyUI for the tests: started headless on a free port, with this checkout among its custom nodes."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMPUTE_DTYPE = "float32"  # what is fast on this machine is measured otherwise, and core's VAE computes in fp32
FOLDERS = ["custom_nodes", "input", "output", "temp", "user", "models/diffusion_models", "models/text_encoders"]
FOLDERS += ["models/vae", "models/clip_vision", "models/loras"]


@dataclass
class Run:
    """What one queued graph did."""

    status: str = ""  # execution_success, execution_error or execution_interrupted
    cached: list[str] = field(default_factory=list)
    steps: list[tuple[str, int]] = field(default_factory=list)  # (node, step) as they were announced
    previews: int = 0
    outputs: dict[str, dict] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)


class Server:
    """`base` is its folder of models, inputs and outputs; `log` is what it printed."""

    def __init__(self, comfyui: Path, python: str, base: Path):
        self.base = base
        self.log_file = base / "log.txt"
        for folder in FOLDERS:
            (base / folder).mkdir(parents=True)
        (base / "custom_nodes/comfyui-wanflow").symlink_to(ROOT)
        (base / "custom_nodes/probe.py").symlink_to(ROOT / "tests/comfyui_probe.py")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = f"""{python} {comfyui / "main.py"} --cpu --listen 127.0.0.1 --port {self.port} --base-directory {base}
            --disable-api-nodes --disable-auto-launch --database-url sqlite:///:memory: --preview-method latent2rgb"""
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"WANFLOW_COMPUTE_DTYPE": COMPUTE_DTYPE}
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command.split(), stdout=log, stderr=subprocess.STDOUT, cwd=base, env=environment
            )

    def wait_until_ready(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.ask("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def ask(self, path: str, data: dict | None = None) -> Any:
        """GET, or POST where there is `data`; the answer's JSON."""
        body = None if data is None else json.dumps(data).encode()
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def run(
        self,
        graph: dict,
        workflow: dict | None = None,
        on_step: Callable[[str, int], None] = lambda node, step: None,
        on_message: Callable[[str, Any], None] = lambda kind, data: None,
    ) -> Run:
        """Queues a graph as the front end does and waits for its end.

        `on_step(node, step)` sees the progress, of which newer versions skip some; `on_message` all that is told.
        """
        client, run = uuid.uuid4().hex, Run()
        events = self.events(client)
        next(events)  # the greeting: from now on nothing is missed
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        prompt = self.ask("/prompt", {"prompt": graph, "client_id": client, "extra_data": extra})["prompt_id"]
        for kind, data in events:
            on_message(kind, data)
            if kind == "preview":
                run.previews += 1
            elif kind == "progress":
                run.steps.append((data["node"], data["value"]))
                on_step(data["node"], data["value"])
            elif kind == "execution_cached":
                run.cached = data["nodes"]
            elif kind in ("execution_success", "execution_error", "execution_interrupted"):
                run.status, run.error = kind, data
                break
        while not (history := self.ask(f"/history/{prompt}")):
            time.sleep(0.1)
        run.outputs = history[prompt]["outputs"]
        return run

    def events(self, client: str) -> Iterator[tuple[str, Any]]:
        """What the server tells this client: a websocket, read only (whole, unmasked frames)."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            key = base64.b64encode(os.urandom(16)).decode()
            connection.sendall(
                f"GET /ws?clientId={client} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: Upgrade\r\n"
                f"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
            )
            stream = connection.makefile("rb")
            while stream.readline().strip():
                pass  # the answer's header
            while True:
                opcode, length = stream.read(2)
                if length in (126, 127):
                    length = int.from_bytes(stream.read(2 if length == 126 else 8), "big")
                payload = stream.read(length)
                if opcode & 15 == 1:
                    message = json.loads(payload)
                    yield message["type"], message["data"]
                elif opcode & 15 == 2:
                    yield "preview", payload
