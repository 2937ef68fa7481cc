"""Check that the machines of a run see the folder in which the starting process writes.

Of a URL each has a working copy of its own, so that none is shared.
"""

from __future__ import annotations

import secrets
import socket
import tempfile
import time
from pathlib import Path

from mprd.errors import UserError
from mprd.storage.copies import is_copy

WAIT_SECONDS = 5
"""Longest wait for a new file, which network file systems may show late."""
MARK = ".mark"


def mark_shared(folder: Path) -> str:
    """Write a mark into a run or study folder, and return it for `check_shared`; none into a working copy."""
    mark = secrets.token_hex(16)
    if not is_copy(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(mark)
    return mark


def check_shared(folder: Path, mark: str) -> None:
    """Raise UserError naming this machine unless it sees the folder with that mark, and can write there.

    A working copy passes.
    """
    if is_copy(folder):
        return
    machine, until = f"machine {socket.gethostname()}", time.monotonic() + WAIT_SECONDS
    while not sees(folder, mark):
        if time.monotonic() > until:
            raise UserError(
                f"{folder}: {machine} has no such folder, or another one of that name; give --out as a URL of object "
                "storage, or on storage that all machines share at one path"
            )
        time.sleep(0.5)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: {machine} cannot write there ({error.strerror})") from None


def sees(folder: Path, mark: str) -> bool:
    """Return whether this machine reads that mark."""
    try:
        return (folder / MARK).read_text() == mark
    except OSError:
        return False
