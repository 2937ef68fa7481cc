"""Nested settings, `{section: {field: value}}`, and their dotted names."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import BaseModel

Nested = dict[str, Any]


def get(settings: Nested, name: str, default: Any = None) -> Any:
    """Return the value under a dotted name."""
    value: Any = settings
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def put(settings: Nested, name: str, value: Any) -> None:
    """Set the value under a dotted name, in place."""
    *sections, field = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[field] = value


def pop(settings: Nested, name: str) -> None:
    """Remove the value under a dotted name, in place."""
    *sections, field = name.split(".")
    for section in sections:
        settings = settings[section]
    del settings[field]


def nest(settings: dict[str, Any]) -> Nested:
    """Turn dotted names into nested sections."""
    nested: Nested = {}
    for name, value in settings.items():
        put(nested, name, value)
    return nested


def look_up(config: BaseModel, name: str) -> Any:
    """Return the value of a setting by its dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def merge(base: Nested, extra: Nested) -> None:
    """Lay nested settings over others, in place; `extra` stays as it is."""
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = deepcopy(value)


def layered(*layers: Nested) -> Nested:
    """Merge nested settings into new ones, later ones winning."""
    settings: Nested = {}
    for layer in layers:
        merge(settings, layer)
    return settings


def flatten(settings: Nested, prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
