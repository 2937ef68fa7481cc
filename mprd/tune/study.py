"""The definition of a study: settings and how they vary, seeds, objective, and the paper's figures."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from mprd.config.loading import explain_unknown, read_yaml, setting_names, suggest
from mprd.errors import UserError
from mprd.runs.html import show

Objective = Literal["label_free_score", "silhouette", "mAP"]
"""A column of metrics.jsonl to maximize."""
Sampler = Literal["grid", "tpe", "random"]
Pruner = Literal["asha", "median", "hyperband"]

Value = bool | int | float | str | None
Settings = dict[str, Any]
"""Settings by dotted name, such as `{"pairs.mu": 0.3}`."""

SEED = "train.seed"


class Part(BaseModel):
    """A part of a study file; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def check_distinct(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """Raise ValueError for a value that is listed twice: its trials would be repeats."""
    twice = next((value for number, value in enumerate(values) if value in values[:number]), None)
    if len(set(values)) < len(values):
        raise ValueError(f"{twice} is listed twice")
    return values


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(check_distinct)]
Values = Annotated[tuple[Value, ...], Field(min_length=1), AfterValidator(check_distinct)]


class Grid(Part):
    """All of a list of values."""

    grid: Values

    def values(self) -> tuple[Value, ...]:
        return self.grid


class Choice(Part):
    """One of a list of values, drawn by the sampler."""

    choice: Values

    def values(self) -> tuple[Value, ...]:
        return self.choice


class Range(Part):
    """A number from low to high, both included, drawn by the sampler."""

    low: int | float
    high: int | float
    log: bool = False
    """Draw on a logarithmic scale."""

    @property
    def is_integer(self) -> bool:
        """Return whether integers are drawn: both ends are."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def values(self) -> Sequence[Value] | None:
        """Return the integers of the range; None for real numbers."""
        return range(int(self.low), int(self.high) + 1) if self.is_integer else None

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low must lie below high, but got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, but got {self.low}")
        return self


def choose_dimension(value: Any) -> str:
    """Return the kind of a dimension by its keys, so that errors mention that kind only."""
    keys = value if isinstance(value, dict) else vars(value) if isinstance(value, Part) else ()
    return next((name for name in ("grid", "choice") if name in keys), "range")


Dimension = Annotated[
    Annotated[Grid, Tag("grid")] | Annotated[Choice, Tag("choice")] | Annotated[Range, Tag("range")],
    Discriminator(choose_dimension),
]


class Point(Part):
    """A named set of settings, such as a row of a table."""

    name: str = Field(min_length=1)
    set: dict[str, Value] = {}
    """Settings by dotted name."""

    @field_validator("set")
    @classmethod
    def _names_are_settings(cls, settings: dict[str, Value]) -> dict[str, Value]:
        return check_names(settings)


class Stop(Part):
    """The pruner, which stops trials by the objective after each epoch."""

    kind: Pruner
    """Asynchronous successive halving, worse than the median of the others at the same epoch, or Hyperband."""
    grace_epochs: int = Field(4, ge=1)
    """Epochs before a trial can be stopped."""
    reduction: int = Field(2, ge=2)
    """Reduction factor of `asha` and `hyperband`: one in so many trials survives each rung."""


class Refit(Part):
    """More seeds for the best points once all trials have ended, so that no lucky seed names the best one."""

    top: int = Field(3, ge=1)
    """Points, the best by the objective."""
    seeds: Seeds = (1, 2)
    """Seeds that the study itself does not run."""


class Figures(Part):
    """Figures stated by the paper, as fractions."""

    rank1: float = Field(ge=0, le=1)
    mAP: float = Field(ge=0, le=1)  # noqa: N815


class Paper(Part):
    """The paper's results for a study."""

    source: str
    """Table or figure."""
    needs: dict[str, Value] = {}
    """Settings without which the study varies another quantity than the paper, whose results are then left out."""
    text: str
    """Its description in the paper."""
    peak: float | None = None
    """Maximum of its curve."""
    values: dict[str, dict[str, Figures]] = {}
    """By data set, then point."""


class Study(Part):
    """A search over settings."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    doc: str
    """The question, in one line."""
    space: dict[str, Dimension] = {}
    """Settings that vary independently: all `grid`, or all drawn."""
    points: tuple[Point, ...] = ()
    """Named sets of settings, instead of a space."""
    set: dict[str, Value] = {}
    """Settings of all trials."""
    seeds: Seeds = (0,)
    """Every point is run with each seed."""
    sampler: Sampler = "grid"
    """The whole grid in order, tree-structured Parzen estimation, or uniform."""
    trials: int | None = Field(None, ge=1)
    """Number of trials of a drawn study, all seeds counted."""
    stop: Stop | None = None
    """By default `median` where points are drawn, none for a grid."""
    refit: Refit | None = None
    objective: Objective = "label_free_score"
    """Selects the best point, and guides sampler and pruner; `--objective` overrides it."""
    paper: Paper | None = None

    @field_validator("space", "set")
    @classmethod
    def _names_are_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return check_names(settings)

    @field_validator("points")
    @classmethod
    def _names_differ(cls, points: tuple[Point, ...]) -> tuple[Point, ...]:
        names = [point.name for point in points]
        if len(set(names)) < len(names):
            raise ValueError(f"two points share a name: {', '.join(names)}")
        return points

    @model_validator(mode="after")
    def _parts_agree(self) -> Study:
        if bool(self.space) == bool(self.points):
            raise ValueError("a study needs either space or points")
        is_grid = all(isinstance(dimension, Grid) for dimension in self.space.values())
        if is_grid != (self.sampler == "grid"):
            raise ValueError(f"sampler {self.sampler} needs space as {SPACES[self.sampler]}")
        if self.sampler != "grid" and self.trials is None:
            raise ValueError(f"sampler {self.sampler} needs trials, their number")
        if self.sampler != "grid" and any(isinstance(dimension, Grid) for dimension in self.space.values()):
            raise ValueError(f"sampler {self.sampler} needs space as {SPACES[self.sampler]}")
        if self.refit is not None and set(self.refit.seeds) & set(self.seeds):
            raise ValueError("refit.seeds must differ from seeds")
        return self

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Return the seeds of a point that is refitted, or of any where none is."""
        return self.seeds + (() if self.refit is None else self.refit.seeds)

    @property
    def num_trials(self) -> int:
        """Return the number of trials."""
        limits = [limit for limit in (self.trials, self.max_trials) if limit is not None]
        return min(limits)

    @property
    def max_trials(self) -> int | None:
        """Return the number of distinct points times seeds; None where a setting is a real number."""
        if self.points:
            return len(self.points) * len(self.seeds)
        sizes = [len(values) for dimension in self.space.values() if (values := dimension.values()) is not None]
        return math.prod(sizes) * len(self.seeds) if len(sizes) == len(self.space) else None

    @property
    def varied(self) -> list[str]:
        """Return the settings that vary between points."""
        names = [*self.space, *(name for point in self.points for name in point.set)]
        return list(dict.fromkeys(names))

    def grid(self) -> list[Point]:
        """Return the points of a grid in order; empty where points are drawn."""
        return [*self.all_points()] if self.sampler == "grid" else []

    def all_points(self) -> Iterator[Point]:
        """Yield every point of a finite space in order."""
        if self.points:
            yield from self.points
            return
        values = [dimension.values() or () for dimension in self.space.values()]
        names: set[str] = set()
        for chosen in itertools.product(*values):
            point = name_point(dict(zip(self.space, chosen, strict=True)), taken=names)
            names.add(point.name)
            yield point

    def key(self, name: str, settings: Settings) -> str:
        """Return what identifies a point in this study: a given name, or else the settings."""
        return name if self.points else json.dumps(settings, sort_keys=True)


SPACES = {"grid": "grids", "tpe": "choice or low and high", "random": "choice or low and high"}


def check_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Raise ValueError for a name that is not a setting, with the nearest one."""
    known = setting_names()
    for name in settings:
        if name not in known:
            raise ValueError(explain_unknown(name))
        if name == SEED:
            raise ValueError(f"{SEED} is varied by seeds")
    return settings


def name_point(settings: Settings, *, taken: Collection[str] = ()) -> Point:
    """Name a point after its settings, with rounded numbers unless that name is taken."""

    def label(write: Callable[[Any], str]) -> str:
        return ", ".join(f"{name.rsplit('.', 1)[-1]}={write(value)}" for name, value in settings.items())

    rounded = label(show)
    return Point(name=label(str) if rounded in taken else rounded, set=settings)


def study_files(folder: Path | None = None) -> dict[str, Any]:
    """Return the files of all studies by name: those of the package, overridden by those in `tune_configs/`."""
    packaged = resources.files("mprd").joinpath("tune_configs")
    files: dict[str, Any] = {f.name.removesuffix(".yaml"): f for f in packaged.iterdir() if f.name.endswith(".yaml")}
    files |= {file.stem: file for file in (folder or Path("tune_configs")).glob("*.yaml")}
    return dict(sorted(files.items()))


def load_study(name: str, *, folder: Path | None = None) -> Study:
    """Read a study by name; raise UserError for an unknown name or an invalid file."""
    files = study_files(folder)
    if name not in files:
        raise UserError(f"unknown study {name!r}{suggest(name, list(files))}; known: {', '.join(files)}")
    with resources.as_file(files[name]) as file:
        study = build_study(read_yaml(file), source=f"{file.parent.name}/{file.name}")
    is_drawn = study.sampler != "grid"
    # an explicit `stop: null` prunes nothing
    return with_pruner(study, "median") if is_drawn and "stop" not in study.model_fields_set else study


def with_pruner(study: Study, kind: str) -> Study:
    """Prune by another rule than the study's own, or by none."""
    if kind == "none":
        return study.model_copy(update={"stop": None})
    own = {} if study.stop is None else study.stop.model_dump()
    return study.model_copy(update={"stop": Stop.model_validate({**own, "kind": kind})})


def with_sampler(study: Study, sampler: str, *, trials: int | None) -> Study:
    """Draw points by another sampler than the study's own, over the same values.

    Raises UserError for named points, and for a grid over real numbers.
    """
    if study.points:
        raise UserError(f"--sampler: {study.name} has named points, which are not drawn")
    space: dict[str, Any] = {name: part.model_dump() for name, part in study.space.items()}
    is_grid = sampler == "grid"
    for name, part in study.space.items():
        values = part.values()
        if is_grid and values is None:
            raise UserError(f"--sampler grid: {name} of {study.name} is a real number, which has no grid")
        if is_grid != isinstance(part, Grid):
            space[name] = {"grid" if is_grid else "choice": list(values or ())}
    changed = {"sampler": sampler, "space": space, "trials": None if is_grid else trials or study.num_trials}
    return build_study({**study.model_dump(exclude_defaults=True), **changed}, source=study.name)


def build_study(values: dict[str, Any], *, source: str) -> Study:
    """Validate a study; raise UserError with the first mistake in one line."""
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain_study(error)}") from None


def explain_study(error: ValidationError) -> str:
    """Return the first mistake in one line."""
    # an unknown key explains why another is missing, so it comes first
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    parts = [str(part) for number, part in enumerate(first["loc"]) if not is_tag(first["loc"], number)]
    name = ".".join(parts)
    if first["type"] == "extra_forbidden":
        return f"unknown key {name}{suggest(parts[-1], study_keys())}"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{name}: {message}" if name else message
    if first["type"] == "missing":
        return f"{name} is missing"
    message = first["msg"].removeprefix("Input ").replace("should be", "must be")
    return f"{name} {message}, but got {first['input']!r}"


def is_tag(loc: tuple[int | str, ...], number: int) -> bool:
    """Return whether a part of an error's location is pydantic's tag of a dimension, which is not in the file."""
    return loc[0] == "space" and number == 2


def study_keys() -> list[str]:
    """Return all keys of study files."""
    parts = (Study, Grid, Choice, Range, Point, Stop, Refit, Figures, Paper)
    return list(dict.fromkeys(name for part in parts for name in part.model_fields))


def write_study(study: Study) -> str:
    """Return a study as YAML that reads back equal."""
    return yaml.safe_dump(study.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
