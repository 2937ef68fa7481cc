"""Write docs/studies.md and docs/_static/study.schema.json from mprd.tune.study: `python docs/studies.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mprd.tune.study import Study

DOCS = Path(__file__).parent
PAGE = DOCS / "studies.md"
SCHEMA = DOCS / "_static" / "study.schema.json"

HEAD = """\
# Study files

Written by `python docs/studies.py` from `mprd/tune/study.py`; a test checks that it is current. The
[JSON schema](_static/study.schema.json) gives editors checks and completion. `mprd tune` finds the studies of
the package, and those in `tune_configs/` of the working folder, which come first; `mprd tune --list` shows them all.

```yaml
name: my_sweep
doc: Which threshold, and how many neighbors?
space:
  pairs.mu: {low: 0.1, high: 0.9}
  neighbors.k: {choice: [4, 8, 16]}
sampler: tpe
trials: 30
stop: {kind: median, grace_epochs: 4}
refit: {top: 3, seeds: [1, 2]}
```

`stop: null` lets every trial run to its end. An ablation names its points:

```yaml
name: mine
doc: What is whitening worth?
points:
  - {name: base, set: {}}
  - {name: no whitening, set: {neighbors.whitening: false}}
seeds: [0, 1]
objective: mAP
```
"""


def page() -> str:
    """Return the whole page."""
    parts = Study.model_json_schema()
    tables = {"The file": parts, **{part: parts["$defs"][part] for part in sorted(parts["$defs"])}}
    return "\n".join([HEAD, *(table(title, part) for title, part in tables.items())])


def table(title: str, part: dict[str, Any]) -> str:
    """Return a part's description, and its keys with their types, defaults and descriptions."""
    lines = [
        f"## {title}",
        "",
        " ".join(part.get("description", "").split()),
        "",
        "| key | value | default | |",
        "|---|---|---|---|",
    ]
    for key, field in part["properties"].items():
        default = "needed" if key in part.get("required", ()) else f"`{json.dumps(field.get('default'))}`"
        text = " ".join(field.get("description", "").split())
        lines.append(f"| `{key}` | {kind(field)} | {default} | {text} |")
    return "\n".join([*lines, ""])


def kind(field: dict[str, Any]) -> str:
    """Return the values of a key in words."""
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    for key in ("anyOf", "oneOf"):
        if key in field:
            return " or ".join(dict.fromkeys(kind(option) for option in field[key]))
    if field.get("type") == "array":
        return f"list of {kind(field['items'])}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"map to {kind(values)}" if isinstance(values, dict) else "map"
    return field.get("type", "any")


if __name__ == "__main__":
    PAGE.write_text(page())
    SCHEMA.write_text(json.dumps(Study.model_json_schema(), indent=1) + "\n")
