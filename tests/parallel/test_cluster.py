"""Ray is joined or started, or the one line says why not and what to change."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from mprd.errors import UserError
from mprd.parallel import cluster
from mprd.parallel.cluster import Address, check_address, ensure_token, find_address, start_ray


def given(value: str) -> Address:
    return Address(value, f"--address {value}")


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_the_option_comes_before_the_environment_and_an_empty_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_address().is_local
    monkeypatch.setenv("RAY_ADDRESS", " ")
    assert find_address("").is_local
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert find_address() == Address("head:6379", "RAY_ADDRESS=head:6379")
    assert find_address("other:1") == given("other:1")
    assert find_address("local").is_local


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("localhost", "wanted HOST:PORT"),
        ("127.0.0.1", "wanted HOST:PORT"),
        ("http://127.0.0.1:8265", "wanted HOST:PORT.*is for `ray job submit` or Ray Client"),
        ("ray://127.0.0.1:10001", "wanted HOST:PORT.*Ray Client"),
        ("a b:1", "wanted HOST:PORT"),
        ("::1:6379", "wanted HOST:PORT"),
        ("127.0.0.1:99999", "nothing listens there"),
        ("no.such.host.invalid:6379", "nothing listens there"),
        ("x" * 70 + ":6379", "nothing listens there"),
        ("[::1]:1", "nothing listens there"),
    ],
)
def test_an_address_that_is_none_is_named(value: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        start_ray(given(value), num_cpus=1)
    assert str(error.value).startswith(f"--address {value}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("import time; time.sleep(60)", "no answer of Ray within 0.3 s"),
        ("raise SystemExit('Version mismatch')", "Version mismatch"),
        ("import os; os.abort()", "exit code -6"),
        ("print('AuthenticationError: no token'); raise SystemExit(1)", r"no token\).*RAY_AUTH_MODE=token"),
    ],
)
def test_what_listens_and_cannot_be_joined_ends_in_one_line(
    probe: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PROBE", probe)
    if "sleep" in probe:
        monkeypatch.setattr(cluster, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UserError, match=message) as error:
        check_address(given(f"127.0.0.1:{server.getsockname()[1]}"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [OSError(98, "in use"), RuntimeError("died\nsee the log"), ValueError("odd")])
def test_a_start_that_fails_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cluster.ray, "init", fail)
    with pytest.raises(UserError, match=r"^Ray cannot start on this machine \(.*--launcher local") as found:
        start_ray(find_address(), num_cpus=1)
    assert "\n" not in str(found.value)


def test_sockets_move_where_their_paths_are_too_long_or_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mprd")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert cluster.temporary_folder() == {}
    (tmp_path / "file").touch()
    for place in (tmp_path / ("long" * 20), tmp_path / "file", Path("relative")):
        monkeypatch.setenv("RAY_TMPDIR", str(place))
        moved = cluster.temporary_folder()["_temp_dir"]
        assert moved == f"/tmp/ray-{os.geteuid()}"
        assert f"{place}/ray: too long a path, or not writable" in caplog.text
    monkeypatch.setattr(cluster, "takes_sockets", lambda *_, **__: False)
    with pytest.raises(UserError, match="set RAY_TMPDIR to a folder"):
        cluster.temporary_folder()


def test_a_home_that_cannot_be_written_needs_no_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    ensure_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    ensure_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
