from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mprd.errors import UserError
from mprd.parallel import shared_folder
from mprd.parallel.shared_folder import check_place, check_shared, mark_shared
from mprd.storage.places import local_path


def test_a_machine_with_another_folder_of_that_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "WAIT_SECONDS", 0)
    monkeypatch.setattr(shared_folder.socket, "gethostname", lambda: "node7")
    old = mark_shared(tmp_path)
    mark = mark_shared(tmp_path)
    check_shared(tmp_path, mark)
    with pytest.raises(UserError, match=f"^{tmp_path}: machine node7 has no such folder, or another one of that name"):
        check_shared(tmp_path, old)
    shutil.rmtree(tmp_path / "ray")
    with pytest.raises(UserError, match="machine node7 has no such folder"):
        check_shared(tmp_path, mark)


def test_a_url_is_refused_over_a_cluster(tmp_path: Path) -> None:
    copy = local_path("s3://bucket/runs/a")
    check_place(copy, is_local=True)
    check_place(tmp_path, is_local=False)
    with pytest.raises(UserError, match=r"^s3://bucket/runs/a: over a cluster --out must be a folder"):
        check_place(copy, is_local=False)
