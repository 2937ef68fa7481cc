"""One process at a time writes into the folder of a run or of a study."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mprd.errors import UserError

logger = logging.getLogger("mprd")
NAME = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder to this process for as long as the block runs; the lock goes with the process, however that ends.

    Raises UserError where another process holds the folder, or where it cannot be written. Where the file system knows
    no locks there is a warning alone.
    """
    try:
        file = (folder / NAME).open("a+")
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}") from None
    with file:
        try:
            # not flock, which loading processes would inherit, and hold on when this one was killed
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
        yield
