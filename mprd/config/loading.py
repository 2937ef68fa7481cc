"""Settings from a preset, a YAML file and the command line, merged and checked: every mistake in one line."""

from __future__ import annotations

import contextlib
import difflib
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mprd.config.schema import Config, Preset
from mprd.errors import UserError


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
    settings = read_preset(preset)
    if file is not None:
        merge(settings, read_yaml(file))
    for override in overrides:
        merge(settings, parse_override(override))
    merge(settings, values or {})
    return build_config(settings)


def build_config(settings: dict[str, Any]) -> Config:
    """Validate nested settings; raise UserError with one line on the first thing that is wrong."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise UserError(explain(error)) from None


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
    settings = yaml.safe_load(resources.files("mprd").joinpath("presets", f"{name}.yaml").read_text()) or {}
    if "base" not in settings:
        return settings
    base = read_preset(settings.pop("base"))
    merge(base, settings)
    return base


def read_yaml(file: Path) -> dict[str, Any]:
    """Read nested settings from a YAML file; raise UserError naming it."""
    try:
        settings = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: cannot read the settings: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
    nested: Any = parsed
    for name in reversed(key.strip().split(".")):
        nested = {name: nested}
    return nested


def merge(base: dict[str, Any], extra: dict[str, Any]) -> None:
    """Lay nested settings over others, in place."""
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def explain(error: ValidationError) -> str:
    """Say the first thing that is wrong, in one line, with the setting's dotted name."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = setting_names()
        return f"unknown setting {name}{suggest(name, known)}"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    message = first["msg"].removeprefix("Input ").replace("should be", "must be")
    return f"{name} {message}, but got {first['input']!r}"


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
