"""Read the run and study folders of a report, and compare their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mprd.config.loading import setting_names
from mprd.config.nested import look_up
from mprd.config.schema import Config
from mprd.errors import UserError
from mprd.runs.folder import RunFolder, parse_object
from mprd.text import read_text, to_unicode
from mprd.tune.folder import StudyFolder
from mprd.tune.study import Study
from mprd.tune.trial import Trial


@dataclass(frozen=True, eq=False)
class Run:
    """The contents of a run folder."""

    name: str
    """Unique in the report."""
    folder: RunFolder
    config: Config
    rows: list[dict[str, Any]]
    """By epoch; empty before the first is complete."""
    untrained: dict[str, float]
    made: dict[str, Any]
    """Command, versions and machine; empty without `run.json`."""

    @property
    def is_finished(self) -> bool:
        """Return whether the last epoch is complete."""
        return len(self.rows) >= self.config.train.epochs

    @property
    def seconds(self) -> float:
        """Return the time of training without evaluation."""
        return sum(row.get("gcn_seconds", 0.0) + row.get("cnn_seconds", 0.0) for row in self.rows)


@dataclass(frozen=True, eq=False)
class StudyRuns:
    """The contents of a study folder."""

    folder: StudyFolder
    study: Study
    config: Config
    trials: list[Trial]

    @property
    def name(self) -> str:
        return self.study.name


@dataclass(frozen=True)
class Setting:
    """A setting in all runs."""

    name: str
    meaning: str
    default: str
    values: list[str]
    """By run."""
    is_changed: list[bool]
    """By run, whether the value differs from the default."""

    @property
    def differs(self) -> bool:
        """Return whether the runs differ."""
        return len(set(self.values)) > 1


def read_folders(paths: Sequence[Path]) -> tuple[list[Run], list[StudyRuns]]:
    """Read runs and studies; raise UserError for a folder that is neither, and for one given twice."""
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise UserError(f"{paths[number]}: given twice")
    is_study = [StudyFolder(path).study_file.is_file() for path in resolved]
    for path, study in zip(paths, is_study, strict=True):
        if not study and not RunFolder(path).config_file.is_file():
            raise UserError(f"{path}: neither a run nor a study folder, it has no config.yaml and no study.yaml")
    runs = [path for path, study in zip(resolved, is_study, strict=True) if not study]
    studies = [path for path, study in zip(resolved, is_study, strict=True) if study]
    names = unique_names(runs)
    return [read_run(path, name) for path, name in zip(runs, names, strict=True)], [*map(read_study, studies)]


def read_run(path: Path, name: str) -> Run:
    """Read a run folder, which may have no complete epoch."""
    folder = RunFolder(path)
    config = folder.read_config()
    return Run(name, folder, config, folder.read_rows(), folder.read_untrained(), read_made(path / "run.json"))


def read_made(file: Path) -> dict[str, Any]:
    """Read `run.json`; empty where it is missing or cut off."""
    try:
        return parse_object(read_text(file)) or {}
    except (OSError, UserError):
        return {}


def read_study(path: Path) -> StudyRuns:
    folder = StudyFolder(path)
    return StudyRuns(folder, folder.read_study(), folder.read_config(), folder.read_trials())


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Name each path by its last parts, as few as make all names differ."""
    for count in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = [to_unicode("/".join(path.parts[-count:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [to_unicode(str(path)) for path in paths]


def compare_settings(configs: Sequence[Config]) -> list[Setting]:
    """Return every setting with its default and its value in each run."""
    default = Config()
    settings = []
    for name in setting_names():
        values = [show_value(look_up(config, name)) for config in configs]
        usual = show_value(look_up(default, name))
        changed = [value != usual for value in values]
        settings.append(Setting(name, meaning(name), usual, values, changed))
    return settings


def meaning(name: str) -> str:
    """Return the docstring of a setting, without backticks."""
    *sections, field = name.split(".")
    section: Any = Config()
    for part in sections:
        section = getattr(section, part)
    return " ".join((type(section).model_fields[field].description or "").replace("`", "").split())


def show_value(value: Any) -> str:
    """Format the value of a setting as in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return ", ".join(map(show_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
