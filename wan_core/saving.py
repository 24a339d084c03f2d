"""Files that appear under their names only when they are complete."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from .errors import FileError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Call each writer with a temporary path beside its file, and rename when all of them are done.

    A writer raises OSError when it cannot go on; that becomes a FileError, and none of the files is left.
    """
    unfinished = {path: path.with_name(f".{path.stem}.part{path.suffix}") for path in writers}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished[path])
        for path, file in unfinished.items():
            file.replace(path)
    except OSError as error:
        full = error.errno in NO_ROOM
        reason = "there is no room left on the disk" if full else error.strerror or str(error)
        raise FileError(
            f"{next(iter(writers))} could not be saved: {reason}. No partial file was left. "
            f"{'Free some space or choose' if full else 'Choose'} another output folder, and run again."
        ) from error
    finally:
        for file in unfinished.values():
            with suppress(OSError):  # where nothing could be written, there is nothing to remove
                file.unlink()
