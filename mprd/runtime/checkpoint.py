"""Checkpoints: the training state in one file, written atomically, read without running code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mprd.errors import UserError
from mprd.runtime.files import disk_reason, replaced

FORMAT = 1


def save(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values atomically: `path` is always the complete old or the complete new file.

    Raises UserError where the write fails; the old file is then unchanged.
    """
    try:
        with replaced(path, "save the checkpoint") as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
    except RuntimeError as error:  # of torch's writer
        raise UserError(f"{path}: cannot save the checkpoint: {disk_reason(error)}") from None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raise UserError where it is missing, damaged or of another format."""
    if not path.is_file():
        raise UserError(f"{path}: there is no checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip and runtime errors for damaged files
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this version of mprd (wanted format {FORMAT})")
    return Parts(state, path)


class Parts(dict[str, Any]):
    """The parts of a checkpoint; raises UserError naming its file for one that it lacks."""

    def __init__(self, state: dict[str, Any], path: Path) -> None:
        super().__init__(state)
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise UserError(f"{self.path}: the checkpoint has no {name}, so it is not one of a training run of mprd")


def load_module(module: torch.nn.Module, state: dict[str, Any], *, path: Path, name: str) -> None:
    """Load a network's state dict; raise UserError where it is of another architecture."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: the {name} of the checkpoint is of another architecture than config.yaml says, which was changed "
            f"since, or the file is of another run: {reason}"
        ) from None


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], *, path: Path, setting: str) -> None:
    """Load an optimizer's state dict; raise UserError, naming its setting, where it is of another kind."""
    # Adam has betas, SGD momentum
    saved, own = (
        [("betas" in group, len(group["params"])) for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    if saved != own:
        raise UserError(f"{path}: made with another {setting} than config.yaml says, which was changed since")
    # of this device, and not of the one that the checkpoint was made on
    fused = optimizer.param_groups[0]["fused"]
    optimizer.load_state_dict({**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]})
