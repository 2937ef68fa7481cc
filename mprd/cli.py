"""What all command lines share: logging, and errors as one line with an exit code."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mprd.errors import Interrupted, UserError


def run_command(command: Callable[[], None]) -> None:
    """Run a command; leave with 2 and one line for the person's mistakes, with 130 when asked to stop."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    for noisy in ("matplotlib", "PIL", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        print("stopped at once; go on from the last checkpoint with --resume", file=sys.stderr)
        raise SystemExit(130) from None


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
    "market1501, dukemtmcreid, msmt17: paper on that layout."
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
