"""The folder of a study.

study.yaml, config.yaml, study.json   the study, the settings shared by all trials, the options of the command line
trials.json                           every trial with its state
trials/NAME/                          the run folder of each trial
study.db                              the Optuna study, for optuna-dashboard
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from mprd.config.loading import read_config, read_yaml
from mprd.config.nested import layered, nest
from mprd.config.old_names import check_resumable, upgrade_dotted
from mprd.config.schema import Config
from mprd.data.same_images import ImageRecord, find_changes
from mprd.errors import UserError
from mprd.runs.folder import RunFolder, parse_object, write_text
from mprd.storage.copies import push
from mprd.storage.places import local_path
from mprd.text import quoted, read_text
from mprd.tune.study import Objective, Study, build_study, write_study
from mprd.tune.trial import Trial


@dataclass(frozen=True)
class StudyOptions:
    """What the command line chose for a study."""

    objective: Objective
    num_trials: int
    seed: int = 0
    """Of the sampler."""
    storage: str | None = None
    """Where Optuna keeps the study, in place of study.db."""


class StudyFolder:
    """Paths of a study, and reading and writing of its files."""

    def __init__(self, path: Path | str) -> None:
        """Take a path, or a URL, whose working copy is used; nothing is fetched."""
        self.path = path = local_path(path)
        self.study_file = path / "study.yaml"
        self.config_file = path / "config.yaml"
        self.options_file = path / "study.json"
        self.trials_file = path / "trials.json"
        self.images_file = path / "images.json"
        self.database = path / "study.db"

    def create(self, study: Study, config: Config, options: StudyOptions) -> None:
        """Make the folder; raise UserError where it holds a study already."""
        if self.study_file.exists():
            raise UserError(
                f"{self.path}: holds a study already; go on with --resume --out {quoted(self.path)}, or change --out"
            )
        try:
            (self.path / "trials").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the study folder: {error.strerror}") from None
        write_text(self.config_file, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        self.write_options(options)
        # last, because its presence means that the others are complete
        write_text(self.study_file, write_study(study))
        push(self.path)

    def check_exists(self) -> None:
        """Raise UserError where the folder holds no study."""
        if not self.study_file.is_file():
            raise UserError(f"{self.path}: holds no study to go on with, it has no {self.study_file.name}")

    def check_is_resumable(self) -> None:
        """Raise UserError where trials of the study would train in a way that is gone."""
        shared, study = read_yaml(self.config_file), read_yaml(self.study_file)
        parts = [point.get("set", {}) for point in study.get("points", ())]
        for name, values in study.get("space", {}).items():
            parts += [{name: value} for value in values.get("grid", values.get("choice", ()))]
        for settings in parts or [{}]:
            check_resumable(layered(shared, nest(settings)))

    def check_images(self, now: ImageRecord, *, on_changed: str) -> None:
        """Keep the record of the training images, or raise UserError where they differ from the one that is kept."""
        file = self.images_file
        if not file.is_file():
            write_text(file, now.to_json() + "\n")
            return
        changes = find_changes(ImageRecord.read_json(file), now)
        if changes and on_changed == "stop":
            raise UserError(
                f"{file}: the training images have changed: {changes}; start anew, or remove the file to go on"
            )

    def write_options(self, options: StudyOptions) -> None:
        write_text(self.options_file, json.dumps(asdict(options)) + "\n")

    def read_options(self) -> StudyOptions:
        options = parse_object(read_text(self.options_file))
        try:
            return StudyOptions(**(options or {}))
        except TypeError:
            raise UserError(f"{self.options_file}: damaged; wanted an object with objective and num_trials") from None

    def read_study(self) -> Study:
        """Read the study as it was when the folder was made."""
        values = read_yaml(self.study_file)
        for part in (values, *values.get("points", ())):
            part["set"] = upgrade_dotted(part.get("set", {}))
        return build_study(values, source=str(self.study_file))

    def read_config(self) -> Config:
        """Read the settings shared by all trials."""
        return read_config(self.config_file)

    def read_trials(self) -> list[Trial]:
        """Read all trials that were ever started, by number."""
        if not self.trials_file.is_file():
            return []
        try:
            trials = json.loads(read_text(self.trials_file))
            if not isinstance(trials, list):
                raise TypeError
            for values in trials:
                # its name in the files of mprd 0.1
                if "mirror" in values:
                    values["optuna_number"] = values.pop("mirror")
                values["settings"] = upgrade_dotted(values["settings"])
            return [Trial(**values) for values in trials]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f"{self.trials_file}: damaged, so the trials of this study are not known; take it from a copy, or "
                "remove it to run all of them anew"
            ) from None

    def write_trials(self, trials: list[Trial]) -> None:
        """Replace the list of trials atomically, and send what a URL lacks."""
        write_text(self.trials_file, json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")
        push(self.path)

    def run_folder(self, trial: Trial) -> RunFolder:
        """Return the run folder of a trial, absolute because Ray's workers have other working directories."""
        return RunFolder((self.path / "trials" / trial.folder_name).resolve())
