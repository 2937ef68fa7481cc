"""Check that the machines of a run see the folder in which the starting process writes."""

from __future__ import annotations

import secrets
import socket
import tempfile
import time
from pathlib import Path

from mprd.errors import UserError
from mprd.storage.places import place_of, split_copy

WAIT_SECONDS = 5
"""Longest wait for a new file, which network file systems may show late."""


def check_place(folder: Path, *, is_local: bool) -> None:
    """Raise UserError where the folder is the working copy of a URL and Ray was not started for this run.

    Processes exchange messages through the folder, which other machines do not see.
    """
    if not is_local and split_copy(folder) is not None:
        raise UserError(
            f"{place_of(folder)}: over a cluster --out must be a folder that all machines share, and no URL; "
            "copy it afterwards, or run on this machine alone, without --address"
        )


def mark_shared(folder: Path) -> str:
    """Write a mark below a run or study folder, and return it for `check_shared`."""
    mark = secrets.token_hex(16)
    (folder / "ray").mkdir(parents=True, exist_ok=True)
    (folder / "ray" / "mark").write_text(mark)
    return mark


def check_shared(folder: Path, mark: str) -> None:
    """Raise UserError naming this machine unless it sees the folder with that mark, and can write there."""
    machine = f"machine {socket.gethostname()}"
    place, until = folder / "ray", time.monotonic() + WAIT_SECONDS
    while not sees(place, mark):
        if time.monotonic() > until:
            raise UserError(
                f"{folder}: {machine} has no such folder, or another one of that name; give --out on storage that all "
                "machines share at one path"
            )
        time.sleep(0.5)
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"{folder}: {machine} cannot write there ({error.strerror})") from None


def sees(place: Path, mark: str) -> bool:
    """Return whether this machine reads that mark."""
    try:
        return (place / "mark").read_text() == mark
    except OSError:
        return False
