"""Settings from a preset, a YAML file and the command line, merged and checked: every mistake in one line."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mprd.config.nested import layered, nest
from mprd.config.old_names import tell_old, upgrade
from mprd.config.schema import Config, Preset
from mprd.errors import UserError
from mprd.text import read_text


def load_config(
    preset: str = "demo",
    *,
    file: Path | None = None,
    overrides: tuple[str, ...] = (),
    values: dict[str, Any] | None = None,
) -> Config:
    """Merge a preset, a YAML file, dotted `section.field=value` overrides and plain values, later ones winning.

    Raises UserError naming the preset, file or setting, with the nearest known name.
    """
    return build_config(layered(read_preset(preset), read_given(file, overrides), values or {}))


def read_given(file: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Read the nested settings of a YAML file and of dotted overrides, which win; raise UserError naming a section."""
    settings = layered({} if file is None else read_yaml(file), *map(parse_override, overrides))
    for section, fields in settings.items():
        if not isinstance(fields, dict):
            raise UserError(f"{section} must be a section, `{section}: {{field: value}}`, but got {fields!r}")
    return settings


def build_config(settings: dict[str, Any]) -> Config:
    """Validate nested settings; raise UserError with one line on the first thing that is wrong."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise UserError(explain(error)) from None


def read_config(file: Path) -> Config:
    """Read all settings that a run or study folder keeps, also those of earlier versions; raise UserError naming it."""
    try:
        settings = read_yaml(file)
        if missing := {"data", "backbone", "train"} - settings.keys():
            raise UserError(f"lacks {min(missing)}; cut, or not written by mprd")
        return build_config(upgrade(settings))
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None


def absolute(config: Config) -> Config:
    """Make the paths of the settings independent of the working directory."""
    root, labels, weights = config.data.root, config.meta.labels, Path(config.backbone.weights)
    data = config.data if root is None else config.data.model_copy(update={"root": root.resolve()})
    meta = config.meta if labels is None else config.meta.model_copy(update={"labels": labels.resolve()})
    backbone = config.backbone
    if weights.exists():
        backbone = backbone.model_copy(update={"weights": str(weights.resolve())})
    return config.model_copy(update={"data": data, "meta": meta, "backbone": backbone})


def read_preset(name: str) -> dict[str, Any]:
    """Read one of the presets that come with the package, laid over its `base` where it names one."""
    if name not in get_args(Preset):
        known = ", ".join(get_args(Preset))
        raise UserError(f"unknown preset {name!r}{suggest(name, get_args(Preset))}; known: {known}")
    settings = read_packaged(name)
    return layered(read_preset(settings.pop("base")), settings) if "base" in settings else settings


def read_packaged(name: str) -> dict[str, Any]:
    """Read a file of `mprd/presets`."""
    return yaml.safe_load(resources.files("mprd").joinpath("presets", f"{name}.yaml").read_text("utf-8"))


def read_yaml(file: Path) -> dict[str, Any]:
    """Read nested settings from a YAML file; raise UserError naming it."""
    try:
        settings = yaml.safe_load(read_text(file))
    except OSError as error:
        raise UserError(f"{file}: cannot read the settings: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{file}: wanted settings as `section: {{field: value}}`, but got {type(settings).__name__}")
    return settings


def parse_override(text: str) -> dict[str, Any]:
    """Turn `section.field=value` into nested settings; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set wants section.field=value, but got {text!r}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {key}: cannot read the value {value!r}") from None
    # YAML 1.1 reads 1e-4 (no dot) as a string; a person who types it means the number
    if isinstance(parsed, str):
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    return nest({key.strip(): parsed})


def explain(error: ValidationError) -> str:
    """Say the first thing that is wrong, in one line, with the setting's dotted name."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return explain_unknown(name)
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    message = first["msg"].removeprefix("Input ").replace("should be", "must be")
    return f"{name} {message}, but got {first['input']!r}"


def explain_unknown(name: str) -> str:
    """Return why a name is no setting: it is gone, with what is there instead, or it never was, with the nearest."""
    return tell_old(name) or f"unknown setting {name}{suggest(name, setting_names())}"


def setting_names(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """List the dotted names of all settings."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += setting_names(inner, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def suggest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Offer the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""
