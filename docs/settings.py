"""Write docs/settings.md from the docstrings of mprd.config.schema: `python docs/settings.py`."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mprd.config.loading import build_config, read_preset
from mprd.config.nested import flatten
from mprd.config.schema import Config, Preset

PAGE = Path(__file__).with_name("settings.md")
PLACE = re.compile(
    r"\(?((?:not stated in the paper|(?:Eq|Sec|Alg)\. [\d.]+(?: lines? [\d-]+| item \d)?|Tables? \d+(?: and \d+)?)"
    r"(?:, (?:[\d.]+|(?:Eq|Sec|Alg)\. [\d.]+|Tables? [\d and]+|MPRD#))*)\)?",
    re.IGNORECASE,
)

HEAD = """\
# Settings

Written by `python docs/settings.py` from `mprd/config/schema.py`; a test checks that it is current. Set them by
`--set SECTION.FIELD=VALUE` or in a YAML file given by `--config`. The defaults are the paper's where it states one;
*demo* is the value of the preset `demo` if it differs; the other presets are at the end. *paper* is the place in the
paper that a setting is from.
"""


def page() -> str:
    """Return the whole page."""
    demo = build_config(read_preset("demo"))
    presets = [name for name in get_args(Preset) if name != "demo"]
    return "\n".join([HEAD, *section_tables(Config(), demo, Config, ""), PRESETS, *map(preset_row, presets), ""])


PRESETS = """
## Presets

| preset | in place of the defaults |
|---|---|"""


def preset_row(name: str) -> str:
    """Return what a preset changes."""
    default, changed = flatten(Config().model_dump()), flatten(build_config(add_root(read_preset(name))).model_dump())
    told = {k: code(value).strip("`") for k, value in changed.items() if value != default[k] and k != "data.root"}
    return f"| `{name}` | {', '.join(f'`{key}={value}`' for key, value in told.items())} |"


def add_root(settings: dict[str, Any]) -> dict[str, Any]:
    """Give a preset the folder without which it does not validate."""
    if settings.get("data", {}).get("dataset", "synthetic") != "synthetic":
        settings["data"]["root"] = "ROOT"
    return settings


def section_tables(default: BaseModel, demo: BaseModel, section: type[BaseModel], prefix: str) -> list[str]:
    """Return a heading and a table for each section below another, in order."""
    parts = []
    rows = []
    for name, field in section.model_fields.items():
        ours, theirs = getattr(default, name), getattr(demo, name)
        if isinstance(ours, BaseModel):
            parts += section_tables(ours, theirs, type(ours), f"{prefix}{name}.")
        else:
            rows.append(row(f"{prefix}{name}", field, ours, theirs))
    if rows:
        head = ["| setting | meaning | type | default | demo | paper |", "|---|---|---|---|---|---|"]
        title = f"\n## {prefix.rstrip('.')}\n\n{one_line(section.__doc__ or '')}\n"
        parts = [title, *head, *rows, *parts]
    return parts


def row(name: str, field: FieldInfo, default: Any, demo: Any) -> str:
    """Return a setting's row."""
    meaning = one_line(field.description or "")
    place = "; ".join(found.group(1) for found in PLACE.finditer(meaning))
    told = "" if demo == default else code(demo)
    cells = (f"`{name}`", meaning, tell_type(field), code(default), told, place)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def one_line(text: str) -> str:
    """Join the lines of a docstring."""
    return " ".join(text.split())


def code(value: Any) -> str:
    """Write a value as `--set` takes it."""
    written = {True: "true", False: "false", None: "null"}.get(value) if isinstance(value, bool | None) else None
    text = written or (f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value))
    return f"`{text}`"


def tell_type(field: FieldInfo) -> str:
    """Say what a setting takes, with its limits."""
    limits = [bound for item in field.metadata for bound in tell_bounds(item)]
    return ", ".join([plain_type(field.annotation), *limits])


def plain_type(annotation: Any) -> str:
    """Say a type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([plain_type(inner[0]), *(bound for item in inner[1:] for bound in tell_bounds(item))])
    if origin is Literal:
        return " ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return f"{len(inner)} x {plain_type(inner[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else plain_type(part) for part in inner)
    return {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}.get(
        annotation, str(annotation)
    )


def tell_bounds(item: Any) -> list[str]:
    """Say the limits that a piece of a field's metadata holds."""
    if isinstance(item, FieldInfo):
        return [bound for inner in item.metadata for bound in tell_bounds(inner)]
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    found = [(sign, getattr(item, name, PydanticUndefined)) for name, sign in signs]
    return [f"{sign} {value:g}" for sign, value in found if value is not PydanticUndefined and value is not None]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
