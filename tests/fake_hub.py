"""A stand-in for ModelScope's API on this machine, which can be told to misbehave."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlparse


class Hub:
    """`files` maps model id -> path -> content.

    `faults` are used up, one by each request for a file: an int sends so many bytes and then hangs up, "500" and the
    like answer with this status, "ranges" ignores the wish for a part, "moved" sends the asker elsewhere, as ModelScope
    does for large files.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.sizes: dict[str, int] = {}  # announced in place of the true ones
        self.hashes: dict[str, str] = {}
        self.faults: list = []
        self.listings: list[str] = []  # the models that were asked for
        self.asked: list[tuple[str, str]] = []  # (path, the range that was wished for)
        self.sent = 0

    def entries(self, model_id: str) -> list[dict]:
        files = self.files[model_id]
        folders = [{"Path": "google", "Type": "tree", "Size": 0}]
        return folders + [
            {
                "Path": path,
                "Name": path.split("/")[-1],
                "Type": "blob",
                "Size": self.sizes.get(path, len(content)),
                "Sha256": self.hashes.get(path, hashlib.sha256(content).hexdigest()),
            }
            for path, content in files.items()
        ]


def handler(hub: Hub) -> type:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            url = urlparse(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            *_, organisation, name, what = url.path.removesuffix("/files").split("/")
            model_id = f"{organisation}/{name}"
            if what != "repo" or model_id not in hub.files:
                return self.answer(404, b"{}")
            if url.path.endswith("/files"):
                hub.listings.append(model_id)
                return self.answer(200, json.dumps({"Code": 200, "Data": {"Files": hub.entries(model_id)}}).encode())
            self.send_file(query["FilePath"], hub.files[model_id][query["FilePath"]])

        def send_file(self, path: str, content: bytes):
            wished = self.headers.get("Range", "")
            hub.asked.append((path, wished))
            fault = hub.faults.pop(0) if hub.faults else None
            if fault == "moved":
                return self.answer(302, b"", location=f"{self.path}&signature=1")
            if isinstance(fault, str) and fault.isdigit():
                return self.answer(int(fault), b"")
            begin = int(wished.removeprefix("bytes=").removesuffix("-") or 0) if fault != "ranges" else 0
            if begin and begin >= len(content):
                return self.answer(416, b"")
            self.answer(206 if begin else 200, content[begin:], fault if isinstance(fault, int) else None)

        def answer(self, status: int, content: bytes, sent: int | None = None, location: str = ""):
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])
            hub.sent += len(content[:sent])
            self.close_connection = True

        def log_message(self, *_):
            pass

    return Handler


@contextmanager
def running() -> Iterator[tuple[Hub, str]]:
    """A hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
