from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mprd.errors import UserError
from mprd.parallel import shared_folder
from mprd.parallel.shared_folder import check_shared, mark_shared
from mprd.storage.places import local_path


def test_a_machine_with_another_folder_of_that_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "WAIT_SECONDS", 0)
    monkeypatch.setattr(shared_folder.socket, "gethostname", lambda: "node7")
    old = mark_shared(tmp_path)
    mark = mark_shared(tmp_path)
    check_shared(tmp_path, mark)
    with pytest.raises(UserError, match=f"^{tmp_path}: machine node7 has no such folder, or another one of that name"):
        check_shared(tmp_path, old)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="machine node7 has no such folder"):
        check_shared(tmp_path, mark)


def test_working_copies_are_each_machines_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = mark_shared(local_path("s3://bucket/runs/a"))
    monkeypatch.setenv("MPRD_CACHE", str(tmp_path))
    check_shared(local_path("s3://bucket/runs/a"), mark)
