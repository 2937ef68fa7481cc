"""Ray: join a cluster or start one, failing in one line and bounded time."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from mprd.errors import UserError
from mprd.parallel import reaper
from mprd.parallel.shipping import shipped

logger = logging.getLogger("mprd")

QUIET = {
    # seconds within which the end of a worker is noticed
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # machines that an autoscaler brings take minutes to start and more to install
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800",
    # keep the meaning of relative paths
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # by default Ray starts a worker for each core at once, which a run does not use
    "RAY_prestart_worker_first_driver": "0",
    # a submitted job may bring variables of its own
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
}
"""Environment of Ray processes, where nothing else is set."""
HOST_AND_PORT = re.compile(r"(\[[^\]\s]+\]|[^\[\]:/\s]+):(\d{1,5})")
CONNECT_SECONDS, PROBE_SECONDS = 10, 90
"""Limits for an answer of an address, and of a Ray cluster behind it."""
MAX_SOCKET_FOLDER = 43
"""Characters of Ray's temporary folder that leave room for its sockets, whose paths have at most 107."""
PROBE = """
import os, sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    ray.shutdown()
except BaseException as error:
    print(" ".join(f"{type(error).__name__}: {error}".split()), flush=True)
    os._exit(1)
"""


@dataclass(frozen=True)
class Address:
    """The address of a cluster, and where it was given."""

    value: str
    """`HOST:PORT`, `auto`, or `local` for a new cluster on this machine."""
    source: str
    """For messages."""

    @property
    def is_local(self) -> bool:
        return self.value == "local"


def find_address(option: str | None = None) -> Address:
    """Return the address of `--address`, else of RAY_ADDRESS, else `local`; empty ones count as none."""
    for name, value in (("--address ", option), ("RAY_ADDRESS=", os.environ.get("RAY_ADDRESS"))):
        if value is not None and value.strip():
            return Address(value.strip(), f"{name}{value.strip()}")
    return Address("local", "Ray")


@contextmanager
def cluster(address: Address, *, num_cpus: int) -> Iterator[Path]:
    """Join a Ray cluster, or start one with so many logical CPUs, while the block runs; raises as `start_ray`.

    Yields a folder for the files of Ray's trainers, which run on this machine; the run folder holds all of value.
    """
    start_ray(address, num_cpus=num_cpus)
    with tempfile.TemporaryDirectory(prefix="mprd-ray-", ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder)
        finally:
            ray.shutdown()


def start_ray(address: Address, *, num_cpus: int, without: str = "--launcher local does without it") -> None:
    """Join the Ray cluster at an address, or start one on this machine with so many logical CPUs.

    Args:
        without: how to do without Ray, for the message where it cannot start.

    Raises UserError of one line, in bounded time, whatever fails.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options: dict[str, Any] = {"address": address.value, "log_to_driver": False, "logging_level": logging.ERROR}
    if address.is_local:
        reaper.watch()
        options |= {"include_dashboard": False, "num_cpus": num_cpus, **temporary_folder()}
        ensure_token()
    else:
        check_address(address)
        options["runtime_env"] = shipped()
    # ray.init replaces the handler, but a run stops gracefully by its own
    is_main = threading.current_thread() is threading.main_thread()
    old = signal.getsignal(signal.SIGTERM)
    # a cluster's workers import first from the folder where it is joined, in which they may have another copy of mprd
    elsewhere = nullcontext() if address.is_local else chdir("/")
    try:
        with elsewhere:
            ray.init(**options)
    except Exception as error:  # of many types: ConnectionError, OSError, RuntimeError, ValueError and Ray's own
        reason = f"{type(error).__name__}: {error}"
        if address.is_local:
            raise UserError(f"Ray cannot start on this machine ({shorten(reason)}); {without}") from None
        raise UserError(explain(address, reason)) from None
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, old)


def check_address(address: Address) -> None:
    """Raise UserError for an address that is none, and where no cluster answers that this process can join."""
    match = HOST_AND_PORT.fullmatch(address.value)
    if match is None and address.value != "auto":
        hint = "; an address with :// is for `ray job submit` or Ray Client" if "://" in address.value else ""
        raise UserError(f"{address.source}: wanted HOST:PORT of a cluster (Ray's port is 6379), auto or local{hint}")
    if match is not None:
        try:
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{address.source}: nothing listens there ({reason})") from None
    # in another process: ray.init retries for minutes, and then ends its process, where something else answers
    command = [sys.executable, "-c", PROBE, address.value]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(explain(address, f"no answer of Ray within {PROBE_SECONDS} s")) from None
    if done.returncode:
        lines = (done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}").splitlines()
        raise UserError(explain(address, lines[-1]))


def shorten(reason: str) -> str:
    return " ".join(reason.split())[:300]


def explain(address: Address, reason: str) -> str:
    """Return in one line why a cluster cannot be joined, and what helps."""
    # the error is the same where a cluster refuses for want of a token
    hint = "" if os.environ.get("RAY_AUTH_MODE") else "; one with a token wants RAY_AUTH_MODE=token here as well"
    return f"{address.source}: no Ray cluster answers there that this process can join ({shorten(reason)}){hint}"


def temporary_folder() -> dict[str, str]:
    """Return the option with a folder for Ray's sockets, where its usual one has too long a path or is not writable.

    Raises UserError where there is none.
    """
    usual = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    if takes_sockets(usual):
        return {}
    for place in ("/tmp", "/var/tmp", "/dev/shm"):
        folder = Path(place) / f"ray-{os.geteuid()}"
        if takes_sockets(folder, owned=True):
            logger.info("%s: too long a path, or not writable, so Ray's sockets are in %s", usual, folder)
            return {"_temp_dir": str(folder)}
    raise UserError(
        f"{usual}: not writable, or too long a path for Ray's sockets; set RAY_TMPDIR to a folder whose path has at "
        f"most {MAX_SOCKET_FOLDER - len('/ray')} characters"
    )


def takes_sockets(folder: Path, *, owned: bool = False) -> bool:
    """Return whether files can be made in a folder, which is created, whose path leaves room for a socket's name.

    Args:
        owned: whether it must be this user's own.
    """
    if len(os.fsencode(folder)) > MAX_SOCKET_FOLDER or not folder.is_absolute():
        return False
    try:
        folder.mkdir(mode=0o700 if owned else 0o777, parents=True, exist_ok=True)
        if owned and folder.lstat().st_uid != os.geteuid():
            return False
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError:
        return False
    return True


def ensure_token() -> None:
    """Give a new cluster a token of its own where Ray cannot keep one in the home folder."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        return
    file = Path(os.path.expanduser("~")) / ".ray" / "auth_token"
    try:
        if file.exists():
            file.read_bytes()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=file.parent).close()
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
