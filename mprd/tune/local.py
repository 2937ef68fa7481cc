"""Run a study's trials one after another in this process, where there is no Ray."""

from __future__ import annotations

import shutil
import time
import traceback
from typing import Any

from rich.console import Console

from mprd.config.schema import Config
from mprd.errors import Interrupted
from mprd.runs.folder import RunFolder, write_text
from mprd.train.local import run_local
from mprd.tune.folder import Ledger, State, Trial, trial_config


class TrialStopped(Exception):
    """End a trial early because the study's stop rule asked for it."""


def run_locally(ledger: Ledger, config: Config, console: Console) -> None:
    """Run all trials that are left; one that fails is written down, and the next begins."""
    for trial in ledger:
        started = time.monotonic()
        state, reason = run_here(ledger, config, trial)
        trial = ledger.finish(trial, state, reason)
        console.print(trial_line(ledger, trial, time.monotonic() - started), highlight=False, soft_wrap=True)


def run_here(ledger: Ledger, config: Config, trial: Trial) -> tuple[State, str | None]:
    """Run one trial, from its checkpoint where it has one; say how it ended."""
    folder = ledger.folder.run_folder(trial)

    def report(row: dict[str, Any]) -> None:
        if ledger.report(trial, row) and row["epoch"] + 1 < config.train.epochs:
            raise TrialStopped

    try:
        resume = make_ready(folder)
        with (folder.path / "log.txt").open("a") as log:
            run_local(trial_config(config, trial), folder, resume=resume, console=Console(file=log), on_row=report)
    except TrialStopped:
        return "stopped", stop_reason(ledger)
    except Interrupted:
        raise
    except Exception as error:
        return "failed", keep_error(folder, error)
    return "finished", None


def make_ready(folder: RunFolder) -> bool:
    """Make a run folder, or clear what an earlier try left in it; say whether there is a checkpoint to go on from."""
    (folder.path / ERROR).unlink(missing_ok=True)
    if folder.last.is_file():
        return True
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir(parents=True)
    return False


ERROR = "error.txt"


def keep_error(folder: RunFolder, error: Exception) -> str:
    """Write an error in one line, and its traceback below, into the run folder; return the line."""
    first, *rest = str(error).strip().splitlines() or ["no message"]
    # Ray's errors announce a worker's traceback, which ends with the cause
    cause = f" {rest[-1].strip()}" if rest and first.endswith(":") else ""
    reason = f"{type(error).__name__}: {first}{cause}"
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.path / ERROR, f"{reason}\n\n{''.join(traceback.format_exception(error))}")
    return reason


def read_error(folder: RunFolder) -> str | None:
    """Return what `keep_error` wrote, in one line; None where there was no error."""
    file = folder.path / ERROR
    return file.read_text().splitlines()[0] if file.is_file() else None


def stop_reason(ledger: Ledger) -> str:
    """Say why a trial was stopped."""
    assert ledger.study.stop is not None
    return f"poor {ledger.objective} by the {ledger.study.stop.kind} rule"


def trial_line(ledger: Ledger, trial: Trial, seconds: float) -> str:
    """Say in one line how a trial ended."""
    row = ledger.last_row(trial)
    ended = sum(other.state != "running" for other in ledger.trials)
    figures = [f"{key} {row[key]:.3f}" for key in ("label_free_score", "mAP") if row.get(key) is not None]
    parts = [f"trial {ended}/{ledger.num_trials}", f"{trial.point}, seed {trial.seed}:", trial.state]
    return "  ".join([*parts, *figures, f"{seconds:.0f} s", *([trial.reason] if trial.reason else [])])
