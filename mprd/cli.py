"""What all command lines share: logging, and errors as one line with an exit code."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from glob import has_magic
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from mprd.errors import STOPPED, Interrupted, UserError
from mprd.storage.places import is_url, local_path
from mprd.text import explain, one_line

HOME = re.compile(r"^(--[\w-]+=)?(~[^/=]*(?:/.*)?)$", re.DOTALL)
"""An argument, or the value of an option, that begins with `~`; a shell expands `~` only at the start of a word."""


PARAMETERS: ContextVar[dict[str, Any]] = ContextVar("PARAMETERS", default={})  # noqa: B039
"""Of the command that runs."""
OTHER_CAMERAS = "The images' cameras are not those trained on, whatever names say: take statistics of all."
"""Help of an option."""
WRITTEN = ("out", "resume", "html", "features_dir")
"""Parameters that name what a command writes."""


class Command(TyperCommand):
    """A command in whose arguments `~` is the home folder and a URL is its working copy, also in `--out=~/x`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        local: list[str] = []
        run_command(lambda: local.extend(map(local_argument, args)))
        return super().parse_args(ctx, local)

    def invoke(self, ctx: Any) -> Any:
        token = PARAMETERS.set(ctx.params)
        try:
            return super().invoke(ctx)
        finally:
            PARAMETERS.reset(token)


def local_argument(text: str) -> str:
    """Return an argument with `~` expanded, and a URL replaced by the path of its working copy."""
    text = HOME.sub(lambda match: (match[1] or "") + os.path.expanduser(match[2]), text)
    option, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    return f"{option}{equals}{local_path(value)}" if is_url(value) else text


@contextmanager
def working_copies() -> Iterator[None]:
    """Fetch the URLs among the parameters of a command before the block, and send what it has written afterwards."""
    given = [(name, value) for name, values in PARAMETERS.get().items() for value in listed(values)]
    paths = [(name, Path(value)) for name, value in given if isinstance(value, str | Path) and "/remote/" in str(value)]
    from mprd.storage import copies

    for name, path in paths:
        if name == "data":
            copies.fetch_data(path)
        else:
            copies.pull(next(place for place in (path, *path.parents) if not has_magic(str(place))))
    with copies.sent(path for name, path in paths if name in WRITTEN):
        yield


def listed(values: Any) -> Sequence[Any]:
    return values if isinstance(values, list | tuple) else [values]


class OneLine(logging.Formatter):
    """Log each record in one line, whatever is in the names that it holds."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return one_line(super().formatMessage(record))


class StderrHandler(logging.Handler):
    """Print to the current `sys.stderr`, which a live display replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def main(app: Callable[..., None], name: str) -> None:
    """Run a command line as a process, which a stop ends at once: torch takes seconds to unload."""
    try:
        app(prog_name=name)
    except SystemExit as end:
        if end.code == STOPPED:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                # its reader may have gone
                with suppress(OSError):
                    stream.flush()
            os._exit(STOPPED)
        raise


def run_command(command: Callable[[], None]) -> None:
    """Run a command; exit with 2 and one line for errors of the user or of the file system, with STOPPED for a stop."""
    set_up_output()
    try:
        with working_copies():
            command()
    except BrokenPipeError:
        # as when the reader of `mprd ... | head` has gone; the exit would flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (UserError, OSError, UnicodeEncodeError) as error:
        print(f"error: {one_line(explain(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as stop:
        print(one_line(str(stop)), file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(STOPPED) from None


def set_up_output() -> None:
    """Log to stderr, and let stdout escape what its encoding lacks, such as names that are no text."""
    handler = StderrHandler()
    handler.setFormatter(OneLine("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("matplotlib", "PIL", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # the stream of a notebook or a test may lack it
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings of loading that are given later, or in other words."""
    logger = logging.getLogger("mprd")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


LAUNCHERS = ("ray", "local")
PRESETS = (
    "recommended (the default with --data), paper, demo (the default without) or bench; "
    "market1501, dukemtmcreid, msmt17: paper on that layout; "
    "luperson, luperson_vit, clip: recommended from other weights."
)


def choose_launcher(name: str | None) -> str:
    """Return what was asked for, or else Ray where it is installed.

    Raises UserError for any other name, and where Ray is asked for and missing.
    """
    has_ray = importlib.util.find_spec("ray") is not None
    if name is None:
        return "ray" if has_ray else "local"
    if name not in LAUNCHERS:
        raise UserError(f"--launcher must be {' or '.join(LAUNCHERS)}, but got {name!r}")
    if name == "ray" and not has_ray:
        raise UserError("--launcher ray needs Ray, which is not installed: pip install 'ray[data,train,tune]'")
    return name
