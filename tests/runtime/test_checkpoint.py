"""Checkpoints are complete or absent, and faulty ones are refused with the file named."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mprd.errors import UserError
from mprd.runtime import checkpoint


def test_a_state_round_trips(tmp_path: Path) -> None:
    state = {"weights": torch.arange(3.0), "epoch": 2, "name": "x"}
    checkpoint.save(state, tmp_path / "a" / "last.pt")
    loaded = checkpoint.load(tmp_path / "a" / "last.pt")
    assert loaded.pop("weights").tolist() == [0, 1, 2]
    assert loaded == {"epoch": 2, "name": "x", "format": 1}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (RuntimeError("write failed\nat zip.cc"), r"\(write failed\); is the disk full\?"),
    ],
)
def test_a_failed_write_keeps_the_old_file(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save({"epoch": 1}, path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=rf"last\.pt: cannot save the checkpoint: .*{reason}"):
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no checkpoint"),
        (b"text", "not a readable checkpoint"),
        ({"format": 0}, "not a checkpoint of this version"),
        ([1], "not a checkpoint of this version"),
    ],
)
def test_a_missing_damaged_or_foreign_file_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"last\.pt: {message}"):
        checkpoint.load(path)


def test_weights_of_another_architecture_are_refused() -> None:
    state = torch.nn.Linear(2, 2).state_dict()
    with pytest.raises(UserError, match=r"a\.pt: the GCN of the checkpoint is of another architecture"):
        checkpoint.load_module(torch.nn.Linear(2, 3), state, path=Path("a.pt"), name="GCN")


def test_a_checkpoint_without_a_part_is_named(tmp_path: Path) -> None:
    checkpoint.save({"epoch": 2}, tmp_path / "last.pt")
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert ("epoch" in loaded, "memory" in loaded) == (True, False)
    with pytest.raises(UserError, match=r"last\.pt: the checkpoint has no memory"):
        _ = loaded["memory"]
