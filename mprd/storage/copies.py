"""What commands do with working copies; each function does nothing for a path that is none."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mprd.errors import UserError
from mprd.storage.copy import Copy, explained, reason_of, tried
from mprd.storage.places import copies_folder, place_of

logger = logging.getLogger("mprd")

FETCHED: set[Path] = set()
"""Copies that this process has fetched."""
UNSENT: dict[Path, str] = {}
"""Copies whose last sending failed, and why."""


def is_copy(path: Path) -> bool:
    folder = copies_folder()
    # below a scheme and a bucket
    return path.is_relative_to(folder) and len(path.relative_to(folder).parts) >= 2


def pull(path: Path, *, skipped: tuple[str, ...] = (), keeps_unsent: bool = True) -> None:
    """Fetch a URL into its working copy, but for files of some suffixes; raise UserError as `Copy.pull`."""
    if is_copy(path):
        Copy(path).pull(skipped=skipped, keeps_unsent=keeps_unsent)
        FETCHED.add(path)


def take_over(path: Path) -> None:
    """Fetch a URL to go on with it on this machine, whichever of the machines of a run wrote last.

    What was not sent is sent, or removed where another machine has written since. Raises UserError where that fails.
    """
    pull(path, keeps_unsent=False)
    claim(path)
    finish([path])


def fetch(path: Path) -> None:
    """Fetch a URL that is read only, once a process, where no folder above has been fetched."""
    above = [place for place in (path, *path.parents) if is_copy(place)]
    if not FETCHED.intersection(above):
        pull(next((place for place in above if Copy(place).state_file.exists()), path))


def fetch_data(root: Path) -> None:
    """Fetch a data set; that of a list is the folder of the list."""
    fetch(root.parent if root.suffix.lower() == ".csv" else root)


def claim(path: Path) -> None:
    """Become the writer of a URL that has been fetched; raise UserError where it cannot be written."""
    if is_copy(path):
        copy = Copy(path)
        with copy.locked(), explained(f"{copy.url}: cannot be written"):
            copy.claim(copy.read_state())


def push(path: Path) -> bool:
    """Send a working copy, those inside that could not be sent first; log a warning where that fails, and go on."""
    if not is_copy(path):
        return True
    inner = [place for place in UNSENT if place != path and place.is_relative_to(path)]
    if not all(push(place) for place in inner):
        # or else the study would tell of a trial whose files are not there
        return False
    try:
        Copy(path).push()
    except (OSError, ValueError) as error:
        UNSENT[path] = reason_of(error)
        logger.warning("%s: not sent (%s); the next checkpoint tries again", place_of(path), UNSENT[path])
        return False
    UNSENT.pop(path, None)
    return True


def discard(path: Path) -> None:
    """Remove a file of a run, from its URL too."""
    run = path.parent
    if is_copy(run):
        Copy(run).discard(path.name)
    path.unlink(missing_ok=True)


@contextmanager
def sent(paths: Iterable[Path]) -> Iterator[None]:
    """Send working copies after the block, as `finish` does; where it fails, its error goes first."""
    paths = [*paths]
    try:
        yield
    except BaseException:
        for path in paths:
            with suppress(UserError):
                push(path)
        raise
    finish(paths)


def changed_at(path: Path) -> int:
    """Return when a file was changed, in nanoseconds, at its URL where it has one; 0 where none is found."""
    if is_copy(path):
        filesystem, name = Copy(path).remote
        with suppress(OSError):
            return tried(lambda: filesystem.get_file_info(name)).mtime_ns or 0
        return 0
    return path.stat().st_mtime_ns if path.is_file() else 0


def finish(paths: Iterable[Path]) -> None:
    """Send working copies at the end of a command; raise UserError that says what was not sent and where it is."""
    for path in (*paths, *UNSENT):
        push(path)
    failed = dict(UNSENT)
    UNSENT.clear()
    for path, reason in failed.items():
        names = ", ".join(Copy(path).unsent(Copy(path).read_state())[:4])
        raise UserError(
            f"{place_of(path)}: {names} could not be sent ({reason}); they are on {socket.gethostname()} in "
            f"{str(path)!r}, and --resume there sends them"
        )


def local_only(path: Path) -> Path:
    """Return a folder itself, or for a working copy one beside it whose files are not sent."""
    return path.with_name(f".{path.name}.local") if is_copy(path) else path
