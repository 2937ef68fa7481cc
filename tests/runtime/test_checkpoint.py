"""Checkpoints are written whole or not at all, and loading one runs no code."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from mprd.errors import UserError
from mprd.runtime import checkpoint


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, tiny_disk: None) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save({"epoch": 1}, path)
    with pytest.raises(UserError, match=r"last\.pt: cannot save the checkpoint"):
        checkpoint.save({"epoch": 2, "big": torch.rand(10**6)}, path)
    assert checkpoint.load(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_or_missing_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"last\.pt: not a readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"absent\.pt: there is no checkpoint"):
        checkpoint.load(tmp_path / "absent.pt")


def test_loading_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    path = tmp_path / "trap.pt"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"trap\.pt"):
        checkpoint.load(path)
    assert not (tmp_path / "sprung").exists()
