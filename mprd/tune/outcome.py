"""How a trial starts in its run folder, and how it ended: its error file, its reason, its line on the terminal."""

from __future__ import annotations

import shutil
import time
import traceback
from contextlib import suppress

from mprd.errors import UserError
from mprd.runs.folder import RunFolder, write_text
from mprd.runs.lock import held
from mprd.storage.copies import discard, push, take_over
from mprd.storage.places import shown
from mprd.tune.trial import Trial
from mprd.tune.trial_queue import TrialQueue

ERROR = "error.txt"
FREE_SECONDS = 30
"""Longest wait for an earlier process of a trial to end."""


class TrialStopped(Exception):
    """The pruner of the study stops the running trial."""


def prepare_folder(folder: RunFolder) -> bool:
    """Make a run folder, or clear the files of an earlier try; return whether a checkpoint is there to resume."""
    take_over(folder.path)
    wait_until_free(folder)
    discard(folder.path / ERROR)
    if folder.last.is_file():
        return True
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir(parents=True)
    return False


def wait_until_free(folder: RunFolder) -> None:
    """Wait until no earlier process writes the run folder, as one that outlives a killed study for a moment."""
    until = time.monotonic() + FREE_SECONDS
    while time.monotonic() < until:
        with suppress(UserError), held(folder.path):
            return
        time.sleep(0.5)


def write_error(folder: RunFolder, error: Exception) -> str:
    """Write an error as one line and its traceback into the run folder; return the line."""
    first, *rest = str(error).strip().splitlines() or ["no message"]
    # Ray's errors start with a heading that ends in a colon, and end with the cause
    cause = f" {rest[-1].strip()}" if rest and first.endswith(":") else ""
    reason = shown(f"{type(error).__name__}: {first}{cause}")
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.path / ERROR, f"{reason}\n\n{''.join(traceback.format_exception(error))}")
    with suppress(UserError):
        push(folder.path)
    return reason


def stop_reason(queue: TrialQueue) -> str:
    """Return the reason of a trial that the pruner stopped."""
    assert queue.study.stop is not None
    return f"poor {queue.objective} by the {queue.study.stop.kind} rule"


def trial_line(queue: TrialQueue, trial: Trial, seconds: float) -> str:
    """Return the line that the terminal shows at the end of a trial."""
    row = queue.last_row(trial)
    ended = sum(other.state != "running" for other in queue.trials)
    figures = [f"{key} {row[key]:.3f}" for key in ("label_free_score", "mAP") if row.get(key) is not None]
    parts = [f"trial {ended}/{queue.num_trials}", f"{trial.point}, seed {trial.seed}:", trial.state]
    return "  ".join([*parts, *figures, f"{seconds:.0f} s", *([trial.reason] if trial.reason else [])])
