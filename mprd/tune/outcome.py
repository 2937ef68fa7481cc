"""How a trial starts in its run folder, and how it ended: its error file, its reason, its line on the terminal."""

from __future__ import annotations

import shutil
import traceback

from mprd.runs.folder import RunFolder, write_text
from mprd.storage.copies import discard
from mprd.text import read_text
from mprd.tune.trial import Trial
from mprd.tune.trial_queue import TrialQueue

ERROR, STOP = "error.txt", "stop"


class TrialStopped(Exception):
    """The pruner of the study stops the running trial."""


def prepare_folder(folder: RunFolder) -> bool:
    """Make a run folder, or clear the files of an earlier try; return whether a checkpoint is there to resume."""
    for name in (ERROR, STOP):
        discard(folder.path / name)
    if folder.last.is_file():
        return True
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir(parents=True)
    return False


def write_error(folder: RunFolder, error: Exception) -> str:
    """Write an error as one line and its traceback into the run folder; return the line."""
    first, *rest = str(error).strip().splitlines() or ["no message"]
    # Ray's errors start with a heading that ends in a colon, and end with the cause
    cause = f" {rest[-1].strip()}" if rest and first.endswith(":") else ""
    reason = f"{type(error).__name__}: {first}{cause}"
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.path / ERROR, f"{reason}\n\n{''.join(traceback.format_exception(error))}")
    return reason


def read_error(folder: RunFolder) -> str | None:
    """Return the line of `write_error`; None without an error."""
    file = folder.path / ERROR
    return read_text(file).partition("\n")[0] if file.is_file() else None


def request_stop(folder: RunFolder) -> None:
    """Request a trial of another process to stop after its epoch."""
    (folder.path / STOP).touch()


def obey_stop(folder: RunFolder) -> None:
    """Raise TrialStopped where `request_stop` was called."""
    if (folder.path / STOP).exists():
        raise TrialStopped


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
