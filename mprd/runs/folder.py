"""The run folder: settings, versions, metrics and checkpoints."""

from __future__ import annotations

import json
import logging
import platform
import sys
from pathlib import Path
from typing import Any

import yaml

from mprd.config.loading import absolute, read_config, read_yaml
from mprd.config.old_names import check_resumable
from mprd.config.schema import Config
from mprd.data.own_files import RUN_FILES
from mprd.errors import UserError
from mprd.runtime.files import replaced
from mprd.runtime.machine import num_cores
from mprd.runtime.versions import installed_versions
from mprd.storage.copies import push
from mprd.storage.places import local_path
from mprd.text import quoted, read_text

logger = logging.getLogger("mprd")

PACKAGES = ("mprd", "torch", "torchvision", "numpy", "torch-geometric", "ray", "faiss-cpu", "optuna")


OWN_FILES = RUN_FILES | {".lock", "log.txt", "metrics.jsonl", "checkpoints"}
"""Of which a run has at least one from its start."""


class RunFolder:
    """Read and write the files of a run."""

    def __init__(self, path: Path | str) -> None:
        """Take a path, or a URL, whose working copy is used; nothing is fetched."""
        self.path = path = local_path(path)
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.untrained_file = path / "untrained.json"
        self.last = path / "checkpoints" / "last.pt"
        self.best = path / "checkpoints" / "best.pt"

    def check_is_free(self, config: Config, *, goes_on: bool = True) -> None:
        """Raise UserError if the folder holds the data, files of others, or a run that has a checkpoint.

        Args:
            goes_on: whether such a run could be resumed, which the message then says.
        """
        root = config.data.root
        if root is not None and self.path.resolve() == root.resolve():
            raise UserError(f"{self.path}: --out must not be the folder of the data")
        if self.last.exists():
            advice = f"go on with --resume {quoted(self.path)}, or " if goes_on else ""
            raise UserError(f"{self.path}: holds a run already; {advice}change --out")
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if names and not names & OWN_FILES:
            raise UserError(f"{self.path}: holds files that are not of a run, such as {min(names)}; change --out")
        self.check_is_unmeasured()

    def check_is_unmeasured(self) -> None:
        """Raise UserError if there are metrics, which a run that starts anew would replace."""
        if rows := self.read_rows():
            raise UserError(
                f"{self.last}: there is no checkpoint of the {len(rows)} epochs in {self.metrics_file.name}; to train "
                "anew, change --out"
            )

    def has_start(self) -> bool:
        """Return whether there is a checkpoint to resume; log that the run starts anew where there is none.

        Raises UserError where it has been removed after an epoch.
        """
        if self.last.is_file():
            return True
        self.check_is_unmeasured()
        logger.info("%s: no checkpoint yet, starting anew", self.path)
        return False

    def create(self, config: Config) -> None:
        """Create the folder with settings, versions and command line; raise UserError if it already holds a run."""
        self.check_is_free(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the run folder: {error.strerror}") from None
        write_text(self.path / "run.json", json.dumps(describe_run(), indent=2) + "\n")
        # last, because its presence means that the others are complete
        write_text(self.config_file, yaml.safe_dump(absolute(config).model_dump(mode="json"), sort_keys=False))
        push(self.path)

    def check_is_resumable(self) -> None:
        """Raise UserError where an earlier version trained in a way that is gone."""
        if self.config_file.is_file():
            check_resumable(read_yaml(self.config_file))

    def read_config(self) -> Config:
        """Read the settings; raise UserError if the folder holds no run."""
        if not self.config_file.is_file():
            raise UserError(f"{self.path}: not a run folder, it has no {self.config_file.name}")
        return read_config(self.config_file)

    def read_rows(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl, one row per epoch; a truncated last line is dropped.

        Raises UserError for another line that is damaged.
        """
        lines = read_text(self.metrics_file).splitlines() if self.metrics_file.is_file() else []
        rows = [parse_object(line) for line in lines]
        for number, row in enumerate(rows[:-1], 1):
            if row is None or "epoch" not in row:
                raise UserError(f"{self.metrics_file}: line {number} is damaged; restore it, or remove the line")
        return [row for row in rows if row is not None and "epoch" in row]

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Replace metrics.jsonl, so that readers never see a partial row."""
        write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))

    def write_untrained(self, row: dict[str, float]) -> None:
        """Write the evaluation of the untrained network."""
        write_text(self.untrained_file, json.dumps(row) + "\n")

    def read_untrained(self) -> dict[str, float]:
        """Read the evaluation of the untrained network; empty if there is none."""
        return (parse_object(read_text(self.untrained_file)) if self.untrained_file.is_file() else None) or {}

    def save(self, state: dict[str, Any]) -> None:
        """Write the last checkpoint, and send what a URL lacks."""
        # local, as the process of a study reads run folders without torch
        from mprd.runtime import checkpoint

        checkpoint.save(state, self.last)
        push(self.path)

    def save_best(self, state: dict[str, Any]) -> None:
        """Write the checkpoint with the best label-free score."""
        from mprd.runtime import checkpoint

        checkpoint.save(state, self.best)


def parse_object(text: str) -> dict[str, Any] | None:
    """Parse a JSON object; return None where the text is cut off or something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically; raise UserError if writing fails."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def describe_run() -> dict[str, Any]:
    """Return the command line, the package versions and the machine."""
    return {
        "command": [Path(sys.executable).name, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": num_cores(),
        "versions": installed_versions(PACKAGES),
    }
