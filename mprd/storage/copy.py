"""Working copies of URLs: all code reads and writes local files, which are fetched before and sent after.

An object appears under its name when it is complete, and files are sent in an order in which a reader never finds a
checkpoint that the metrics lack; they are fetched in the opposite order. The object `.writer` in a run or study names
the copy that wrote last: its files are the newest, and no other copy overwrites what it has not fetched.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

from mprd.errors import UserError
from mprd.storage.cache import make_cache
from mprd.storage.places import copies_folder, place_of, split_copy

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

logger = logging.getLogger("mprd")

T = TypeVar("T")
Stat = list[int]
"""Bytes, and time of change in nanoseconds."""

WRITER = ".writer"
LATE = ("config.yaml", "checkpoints/best.pt", "checkpoints/last.pt", "trials.json", "study.yaml")
"""Files that are sent last, in this order: each means that the others are there."""
LARGE = (".pt",)
"""Suffixes of files that are not fetched of the runs inside of a study."""
PAUSES = (1.0, 4.0)
"""Seconds before the second and the third try."""
NUM_THREADS = 16
CHUNK_BYTES = 8 << 20
"""Bytes that are read in one request, so that no writer can come between."""
SAY_SECONDS = 10.0
SECOND = 1.0
"""Resolution of the times of objects."""


@dataclass
class State:
    """What a working copy knows of its URL."""

    id: str = field(default_factory=lambda: uuid4().hex)
    seen: str | None = None
    """The writer whose files were fetched."""
    is_writer: bool = False
    is_partial: bool = False
    """Whether fetching was cut off."""
    files: dict[str, tuple[Stat, Stat | None]] = field(default_factory=dict)
    """Each file as it is here, and as it is there, when both were last the same."""


class Copy:
    """The working copy of a URL, a folder or a single file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = place_of(path)
        self.state_file = path.with_name(f".{path.name}.copy.json")

    @cached_property
    def remote(self) -> tuple[FileSystem, str]:
        """Return the file system of the URL, and the path there."""
        found = split_copy(self.path)
        assert found is not None
        filesystem, bucket = open_filesystem(found[0])
        return filesystem, "/".join([bucket.rstrip("/"), *found[1]])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process of this machine at a time fetch and send."""
        make_cache(copies_folder().parent)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.state_file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def read_state(self) -> State:
        """Read what is known of the URL; nothing where the files are gone."""
        if self.path.exists():
            with suppress(OSError, ValueError, TypeError):
                return State(**json.loads(self.state_file.read_text()))
        return State()

    def write_state(self, state: State) -> None:
        temporary = self.state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(state)))
        os.replace(temporary, self.state_file)

    def pull(self, *, skipped: tuple[str, ...] = (), keeps_unsent: bool = True) -> None:
        """Fetch what is newer there but for files of some suffixes; of the runs inside of a study no checkpoints.

        Files that are not sent yet stay. Raises UserError where the URL cannot be read, or was written by others
        since, whose files replace the unsent ones without `keeps_unsent`.
        """
        with self.locked(), explained(f"{self.url}: cannot be read"):
            found = tried(self.objects)
            for root, files in self.split(found).items():
                if not root:
                    self.mirror(files, skipped=skipped, keeps_unsent=keeps_unsent)
                    continue
                inner = Copy(self.path / root)
                with inner.locked():
                    inner.mirror(files, skipped=LARGE)

    def objects(self) -> dict[str, FileInfo]:
        """List the files there by their relative names, hidden ones but for WRITER left out."""
        from pyarrow.fs import FileSelector, FileType

        filesystem, base = self.remote
        info = filesystem.get_file_info(base)
        if info.type == FileType.File:
            return {"": info}
        infos = filesystem.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
        names = {info.path[len(base) :].lstrip("/"): info for info in infos if info.type == FileType.File}
        return {name: info for name, info in names.items() if not is_hidden(name.removesuffix(WRITER))}

    def split(self, files: dict[str, FileInfo]) -> dict[str, dict[str, FileInfo]]:
        """Group files by the copy that they belong to: this one, or a run inside that has a writer or a copy."""
        own = self.read_state().files
        roots = {name.removesuffix(WRITER).rstrip("/") for name in files if name.endswith(WRITER)} - {""}
        roots |= {root for root in inner_copies(self.path) if root not in own}
        parts: dict[str, dict[str, FileInfo]] = {"": {}}
        for name, info in files.items():
            places = [name, *map(str, Path(name).parents)] if name else []
            root = next((place for place in places if place in roots), "")
            parts.setdefault(root, {})[name[len(root) :].lstrip("/")] = info
        return parts

    def mirror(self, files: dict[str, FileInfo], *, skipped: tuple[str, ...] = (), keeps_unsent: bool = True) -> None:
        """Make the files here those that are there, unless the last ones are from here.

        Args:
            skipped: suffixes of files that stay as they are.
            keeps_unsent: whether to raise UserError rather than to remove files here that were never sent.
        """
        state, writer = self.read_state(), self.read_writer() if WRITER in files else None
        files = {name: info for name, info in files.items() if name != WRITER and not name.endswith(skipped)}
        known = {name: there for name, (_, there) in state.files.items() if not name.endswith(skipped)}
        is_same = known == {name: [info.size, info.mtime_ns] for name, info in files.items()}
        if not state.is_partial and (is_same or (writer is not None and writer == state.id)):
            self.fetch_files(state, {name: info for name, info in files.items() if not (self.path / name).exists()})
            if is_same and state.seen != writer:
                # who has claimed the URL since, and written nothing
                state.seen = writer
                self.write_state(state)
            return
        unsent = [] if state.is_partial else self.unsent(state)
        if unsent and keeps_unsent:
            raise UserError(
                f"{self.url}: was written from elsewhere, but {', '.join(unsent[:3])} in {str(self.path)!r} were "
                "never sent; move them away to go on with what is there"
            )
        for name in unsent:
            (self.path / name).unlink()
        state.seen, state.is_partial = writer, True
        self.write_state(state)
        for name in known.keys() - files.keys():
            (self.path / name).unlink(missing_ok=True)
            del state.files[name]
        self.fetch_files(state, files)
        state.is_partial = False
        self.write_state(state)

    def fetch_files(self, state: State, files: dict[str, FileInfo]) -> None:
        """Fetch files that differ, the LATE ones first, and note each in the state."""

        def differs(name: str) -> bool:
            known = state.files.get(name)
            info = files[name]
            return known is None or known[1] != [info.size, info.mtime_ns] or not (self.path / name).exists()

        names = [name for name in sorted(files, key=sending_order, reverse=True) if differs(name)]
        if not names:
            return
        late = sum(sending_order(name)[0] > 0 for name in names)
        saved = time.monotonic()
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            done = map(lambda name: self.fetch(name, files[name]), names[:late])
            rest = pool.map(lambda name: self.fetch(name, files[name]), names[late:])
            for count, (name, stats) in enumerate(zip(names, chain(done, rest), strict=True), 1):
                state.files[name] = stats
                if time.monotonic() - saved > SAY_SECONDS:
                    saved = time.monotonic()
                    self.write_state(state)
                    logger.info("%s: fetched %d of %d files", self.url, count, len(names))
        self.write_state(state)

    def fetch(self, name: str, info: FileInfo) -> tuple[Stat, Stat | None]:
        """Fetch one file, which gets the time of the object; return it as it is here and there."""
        from pyarrow.fs import LocalFileSystem, copy_files

        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        filesystem, _ = self.remote

        def copy() -> FileInfo:
            before = info
            # times of objects are whole seconds: one that is written again in this second would pass for the same
            age = time.time() - info.mtime_ns / 1e9
            if 0 <= age < SECOND:
                time.sleep(SECOND - age)
            while True:
                copy_files(
                    info.path,
                    str(temporary),
                    source_filesystem=filesystem,
                    destination_filesystem=LocalFileSystem(),
                    chunk_size=CHUNK_BYTES,
                )
                if info.size <= CHUNK_BYTES and temporary.stat().st_size == info.size:
                    return before
                # what several requests return may be of two versions
                after = filesystem.get_file_info(info.path)
                if (after.size, after.mtime_ns) == (before.size, before.mtime_ns):
                    if temporary.stat().st_size != after.size:
                        raise OSError(f"{info.path}: {temporary.stat().st_size} of {after.size} bytes came")
                    return after
                before = after

        try:
            found = tried(copy)
            os.utime(temporary, ns=(found.mtime_ns, found.mtime_ns))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return stat_of(path), [found.size, found.mtime_ns]

    def unsent(self, state: State) -> list[str]:
        """Return the files that have changed here since they were fetched or sent, in the order of sending."""
        files = self.local_files()
        changed = [name for name, stat in files.items() if state.files.get(name, (None,))[0] != stat]
        return sorted(changed, key=sending_order)

    def local_files(self) -> dict[str, Stat]:
        """Return the files here by their relative names, without hidden ones and those of copies inside."""
        if self.path.is_file():
            return {"": stat_of(self.path)}
        inner, found = set(inner_copies(self.path)), {}
        for folder, folders, names in os.walk(self.path):
            base = "" if folder == str(self.path) else f"{os.path.relpath(folder, self.path)}/"
            folders[:] = [name for name in folders if not is_hidden(name) and base + name not in inner]
            for name in names:
                if not is_hidden(name) and base + name not in inner:
                    found[base + name] = stat_of(Path(folder, name))
        return found

    def push(self) -> None:
        """Send what has changed here, in order; raise OSError for what cannot be sent, after a few tries.

        Raises UserError where the URL was written from elsewhere since.
        """
        with self.locked():
            state = self.read_state()
            if not self.unsent(state):
                return
            self.claim(state)
            for name in self.unsent(state):
                path = self.path / name
                # before, so that a change meanwhile is sent the next time
                stat = stat_of(path)
                there = tried(lambda path=path, name=name: self.send(path, name))  # type: ignore[misc]
                state.files[name] = stat, there
                self.write_state(state)

    def send(self, path: Path, name: str) -> Stat | None:
        """Write a local file to an object; return the object's stat where no writer is kept."""
        filesystem, base = self.remote
        place = f"{base}/{name}" if name else base
        if filesystem.type_name == "hdfs":
            filesystem.create_dir(os.path.dirname(place))
        content = path.read_bytes()

        def write() -> None:
            # not pyarrow's copy_files, which ignores the errors of closing
            stream = filesystem.open_output_stream(place)
            stream.write(content)
            stream.close()

        # in a thread, which Ctrl-C does not break off: a dropped stream leaves a part of the file under the name
        with ThreadPoolExecutor(1) as pool:
            pool.submit(write).result()
        if name:
            return None
        info = filesystem.get_file_info(place)
        return [info.size, info.mtime_ns]

    def claim(self, state: State) -> None:
        """Become the writer of the URL; raise UserError where another has become it since."""
        if self.path.is_file():
            return
        current = tried(self.read_writer)
        if current == state.id:
            return
        if current not in (None, state.seen):
            raise UserError(
                f"{self.url}: another process writes there since; what was not sent is in {str(self.path)!r}"
            )
        if current is None and state.is_writer:
            # all was removed there
            state.files.clear()
        # a new one, which those do not know that fetched what this copy wrote earlier
        state.id, state.is_writer = uuid4().hex, True
        self.write_state(state)
        file = self.state_file.with_suffix(".id")
        file.write_text(state.id)
        tried(lambda: self.send(file, WRITER))

    def read_writer(self) -> str | None:
        """Return the copy that wrote last; None where there is none."""
        filesystem, base = self.remote
        try:
            with filesystem.open_input_stream(f"{base}/{WRITER}") as file:
                return file.read().decode()
        except FileNotFoundError:
            return None

    def discard(self, name: str) -> None:
        """Remove a file here and there."""
        with self.locked(), explained(f"{self.url}: cannot be changed"):
            state, (filesystem, base) = self.read_state(), self.remote
            (self.path / name).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                tried(lambda: filesystem.delete_file(f"{base}/{name}"))
            if state.files.pop(name, None) is not None:
                self.write_state(state)


def inner_copies(path: Path) -> list[str]:
    """Return the relative paths of the working copies inside of a folder."""
    return [
        str(file.relative_to(path).with_name(file.name[1 : -len(".copy.json")])) for file in path.rglob(".*.copy.json")
    ]


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def sending_order(name: str) -> tuple[int, str]:
    return LATE.index(name) + 1 if name in LATE else 0, name


def stat_of(path: Path) -> Stat:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


@cache
def open_filesystem(url: str) -> tuple[FileSystem, str]:
    """Return pyarrow's file system of a bucket, and its path there; credentials are found as pyarrow finds them."""
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(url)


def tried(action: Callable[[], T]) -> T:
    """Do what may fail on a network, a few times."""
    for pause in PAUSES:
        try:
            return action()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            time.sleep(pause)
    return action()


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an error of the storage into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
