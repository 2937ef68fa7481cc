"""Lock the folder of a run or of a study, so that one process at a time writes there."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mprd.errors import UserError
from mprd.storage.copies import claim

logger = logging.getLogger("mprd")
LOCK_NAME = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created, while the block runs; the system releases it with a killed process.

    Raises UserError if another process holds the lock or the folder cannot be written. A file system without locks
    only causes a warning.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a+")
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}") from None
    with file:
        try:
            # flock would be inherited by loader workers, which outlive a killed parent
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "another process"
            raise UserError(f"{folder}: {holder} is at work there; wait for it, or stop it") from None
        except OSError as error:
            logger.warning("%s: cannot be locked (%s); let no other process write there", folder, error.strerror)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        # for processes of other machines
        claim(folder)
        yield
