"""ModelScope over HTTP: which files a model has, and one file at a time onto the disk.

Written here because the modelscope package neither looks for room on the disk nor says how much it will fetch, and what
it leaves behind when it is interrupted differs from version to version; this is the documented API it uses itself
(modelscope.cn, "Model download": `/api/v1/models/ID/repo/files` and `/api/v1/models/ID/repo`).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import FileError
from ..saving import NO_ROOM

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ENDPOINT = "MODELSCOPE_ENDPOINT"  # the variable that ModelScope's own tools read
SERVER = "https://modelscope.cn"
TIMEOUT = 30.0  # seconds without a byte
PAUSE = 1.0  # seconds before the second attempt, doubled before each further one
BLOCK = 1 << 20
PART = ".part"  # behind the name of a file that is not complete


class Lost(Exception):
    """The connection broke; another attempt may do better."""


NETWORK = (Lost, OSError, http.client.HTTPException)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a model repository; `sha256` is empty where the server does not tell it."""

    path: str
    size: int
    sha256: str = ""


def in_words(count: int) -> str:
    """A number of bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def part_of(target: Path) -> Path:
    """Where a file lies while it is being downloaded."""
    return target.with_name(target.name + PART)


def list_files(model_id: str) -> list[RemoteFile]:
    """All files of a model. Raises FileError where ModelScope has no such model or cannot be reached."""
    url, patience = _url(model_id, "repo/files", Revision="master", Recursive="True"), Patience(model_id, attempts=3)
    while True:
        try:
            with _open(url, model_id) as response:
                answer = response.read()
            break
        except NETWORK as error:
            patience.lose(error)
    try:
        answer = json.loads(answer)
        if answer.get("Success", True):
            return [_remote_file(entry) for entry in answer["Data"]["Files"] if entry["Type"] != "tree"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise FileError(
            f"{_server()} answered in a way that is not ModelScope's when asked for the files of {model_id}. "
            f"Check the network (a login page may be in between) and {ENDPOINT}."
        ) from error
    raise FileError(f"ModelScope does not give the files of {model_id}: {answer.get('Message')}. Check the name.")


def _remote_file(entry: dict) -> RemoteFile:
    path = PurePosixPath(entry["Path"])
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{path} leads out of the model's folder")
    return RemoteFile(str(path), int(entry["Size"]), (entry.get("Sha256") or "").lower())


def begin(target: Path) -> None:
    """Let `part_of(target)` be there. Raises FileError if it cannot."""
    part = part_of(target)
    with _telling_of_disk(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()


def download(model_id: str, file: RemoteFile, target: Path, advance: Callable[[int], None]) -> None:
    """Fetch a file that was begun, which appears under its name when it is whole and checked.

    Until then it is `part_of(target)`, from which a later call goes on. advance(bytes) is told what is there, first
    what an earlier call has left; whatever it raises stops the download. Raises FileError.
    """
    part, patience = part_of(target), Patience(model_id, attempts=6)
    with _telling_of_disk(part):
        with part.open("ab") as out:
            _claim(out, part)
            advance(out.tell())
            while True:
                start = out.tell()
                try:
                    for block in _blocks(model_id, file, start):
                        out.write(block)
                        advance(len(block))
                    break
                except Lost as error:
                    patience.lose(error, gained=out.tell() > start)
        _check(model_id, file, part)
        part.replace(target)


def _claim(out: BinaryIO, part: Path) -> None:
    """Raises FileError if another process is downloading the same file (on Windows nobody knows)."""
    try:
        if fcntl:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileError(f"{part} is being downloaded by another process. Wait for it, then start again.") from error


def _blocks(model_id: str, file: RemoteFile, begin: int) -> Iterator[bytes]:
    """The bytes of a file from `begin` on, which may be too few or too many. Raises Lost if the connection breaks."""
    if begin >= file.size:
        return
    try:
        with _open(_url(model_id, "repo", Revision="master", FilePath=file.path), model_id, begin) as response:
            # A server that knows no ranges answers 200 and sends the whole file.
            position = begin if response.status == http.client.PARTIAL_CONTENT else 0
            while position < file.size and (block := response.read(BLOCK)):
                if position + len(block) > begin:
                    yield block[max(begin - position, 0) :]
                position += len(block)
    except urllib.error.HTTPError:  # the file ends before `begin`
        return
    except NETWORK as error:
        raise Lost(str(error)) from error
    if position < file.size:
        raise Lost(f"the connection ended after {position:,} of {file.size:,} bytes")


def _check(model_id: str, file: RemoteFile, part: Path) -> None:
    digest = hashlib.sha256()
    with part.open("rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    size = part.stat().st_size
    if size == file.size and file.sha256 in ("", digest.hexdigest()):
        return
    part.unlink()
    what = "its content is not" if size == file.size else f"its {size:,} bytes are not the {file.size:,}"
    raise FileError(
        f"{file.path} of {model_id} arrived damaged: {what} what ModelScope announced. It was removed; "
        "start the download again. If that does not help, the connection or a proxy alters files."
    )


def _open(url: str, model_id: str, begin: int = 0) -> http.client.HTTPResponse:
    """Raises FileError for what another attempt cannot mend, Lost for what it may, HTTPError if nothing is there."""
    headers = {"User-Agent": "wanflow"} | ({"Range": f"bytes={begin}-"} if begin else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.code in (401, 403, 404):
            raise FileError(
                f"ModelScope has no {model_id}, or not for everybody (it answered {error.code}). Check the name."
            ) from error
        raise Lost(f"the server answered {error.code}") from error


def _url(model_id: str, what: str, **parameters: str) -> str:
    return f"{_server()}/api/v1/models/{urllib.parse.quote(model_id)}/{what}?{urllib.parse.urlencode(parameters)}"


def _server() -> str:
    server = os.environ.get(ENDPOINT) or SERVER
    return (server if "://" in server else f"https://{server}").rstrip("/")


class Patience:
    """Waits after each failure, longer if it follows another, and gives up after so many in a row."""

    def __init__(self, model_id: str, attempts: int):
        self.model_id, self.attempts, self.failures = model_id, attempts, 0

    def lose(self, error: Exception, gained: bool = False) -> None:
        """Another failure, `gained`: that brought something. Raises FileError when it is the last one."""
        self.failures = 1 if gained else self.failures + 1
        if self.failures == self.attempts:
            reason = getattr(error, "reason", error)
            raise FileError(
                f"Downloading {self.model_id} from ModelScope failed ({reason}). Check the connection and start again: "
                "it goes on where it stopped."
            ) from error
        time.sleep(PAUSE * 2 ** (self.failures - 1))


@contextmanager
def _telling_of_disk(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in NO_ROOM
        raise FileError(
            f"{part} could not be written: {'the disk is full' if full else error.strerror}. "
            f"{'Free some space' if full else 'Make the folder writable'} and start the download again: it goes on."
        ) from error
