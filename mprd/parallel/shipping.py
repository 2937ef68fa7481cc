"""What the machine that starts a run gives to the others of its cluster: this package, and a few variables."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from mprd.runtime.versions import installed_versions

VARIABLES = ("WANDB_", "MLFLOW_", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Beginnings of the names of variables. Keys of object storage stay: each machine has its role or its own."""
PACKAGES = ("mprd", "torch")


def shipped() -> dict[str, Any]:
    """Return Ray's runtime environment of a run: the package as it is here, and the variables."""
    variables = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    return {"py_modules": [str(Path(__file__).parents[1])], "env_vars": variables}


def own_versions() -> dict[str, str]:
    """Return the versions here of what all machines should have alike."""
    installed = installed_versions(PACKAGES)
    return {"Python": platform.python_version()} | {name: version or "none" for name, version in installed.items()}


def other_versions(wanted: dict[str, str]) -> str | None:
    """Return in one line which versions differ here from those of the starting machine; None where all are alike."""
    here = own_versions()
    differing = [f"{name} {here[name]}, not {wanted[name]}" for name in wanted if here.get(name) != wanted[name]]
    return f"{platform.node()} has {' and '.join(differing)}, as the starting machine has" if differing else None
