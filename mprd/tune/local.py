"""Run the trials of a study one after another in this process, without Ray."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

from mprd.config.schema import Config
from mprd.errors import Interrupted
from mprd.text import new_console
from mprd.train.local import run_local
from mprd.tune.outcome import TrialStopped, prepare_folder, stop_reason, trial_line, write_error
from mprd.tune.trial import State, Trial, trial_config
from mprd.tune.trial_queue import TrialQueue


def run_trials_locally(queue: TrialQueue, config: Config, console: Console) -> None:
    """Run all trials that are left; record one that fails, and continue with the next."""
    for trial in queue:
        started = time.monotonic()
        state, reason = run_trial_locally(queue, config, trial)
        trial = queue.finish(trial, state, reason)
        console.print(trial_line(queue, trial, time.monotonic() - started), highlight=False, soft_wrap=True)


def run_trial_locally(queue: TrialQueue, config: Config, trial: Trial) -> tuple[State, str | None]:
    """Run one trial, from its checkpoint where there is one; return how it ended, and why."""
    folder = queue.folder.run_folder(trial)
    try:
        own = trial_config(config, trial)

        def report(row: dict[str, Any]) -> None:
            if queue.report(trial, row) and row["epoch"] + 1 < own.train.epochs:
                raise TrialStopped

        resume = prepare_folder(folder)
        # the table of trials has the terminal
        run_local(own, folder, resume=resume, console=new_console(quiet=True, force_terminal=False), on_row=report)
    except TrialStopped:
        return "stopped", stop_reason(queue)
    except Interrupted:
        raise
    except Exception as error:
        return "failed", write_error(folder, error)
    return "finished", None
