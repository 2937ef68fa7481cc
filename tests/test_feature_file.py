"""The feature file keeps paths, ids and features, says what it is, and is written whole or not at all."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mprd.errors import UserError
from mprd.feature_file import Dtype, Rows, feature_schema, open_features, to_table, write_features

ROWS = Rows(["a.jpg", "b/c.jpg"], [7, None], [None, 2], np.array([[0.6, 0.8, 0.0], [0.0, -1.0, 0.0]], np.float32))


def write(path: Path, dtype: Dtype = "float32", num_tables: int = 2) -> None:
    schema = feature_schema(run="market", num_features=3, dtype=dtype)
    assert write_features(path, [to_table(ROWS, schema)] * num_tables, schema) == 2 * num_tables


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read_again(dtype: Dtype, tmp_path: Path) -> None:
    write(tmp_path / "features.parquet", dtype)
    file = open_features(tmp_path / "features.parquet")
    assert (file.run, file.num_rows, file.num_features, file.dtype) == ("market", 4, 3, dtype)
    first, second = file.batches()
    assert first[:3] == second[:3] == ROWS[:3]
    assert first.features.dtype == dtype
    assert np.abs(second.features.astype(np.float32) - ROWS.features).max() < {"float32": 1e-9, "float16": 5e-4}[dtype]


def test_any_parquet_reader_finds_the_columns_and_what_they_are(tmp_path: Path) -> None:
    write(tmp_path / "features.parquet")
    table = pq.read_table(tmp_path / "features.parquet")
    assert [str(field.type) for field in table.schema][:3] == ["string", "int64", "int64"]
    assert table.schema.field("feature").type.list_size == 3
    assert table.schema.field("feature").type.value_type == pa.float32()
    assert json.loads(table.schema.metadata[b"mprd"]) == {"format": 1, "run": "market", "num_features": 3}
    assert table.column("pid").to_pylist() == [7, None, 7, None]


def test_a_file_of_no_rows_is_a_file_of_features(tmp_path: Path) -> None:
    write(tmp_path / "features.parquet", num_tables=0)
    assert open_features(tmp_path / "features.parquet").num_rows == 0
    assert list(open_features(tmp_path / "features.parquet").batches()) == []


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    later = feature_schema(run="x", num_features=3, dtype="float32").with_metadata(
        {b"mprd": json.dumps({"format": 2, "run": "x", "num_features": 3})}
    )
    write_features(tmp_path / "later.parquet", [], later)
    wrong = feature_schema(run="x", num_features=3, dtype="float32").remove(1)
    write_features(tmp_path / "wrong.parquet", [], wrong)
    for name, reason in {
        "other": "not a file of features",
        "broken": "not a file of features",
        "later": "format 2, wanted 1",
        "wrong": "columns path, camid, feature",
        "absent": "no such file of features",
    }.items():
        with pytest.raises(UserError, match=rf"{name}\.parquet: .*{reason}"):
            open_features(tmp_path / f"{name}.parquet")


@pytest.fixture
def tiny_disk() -> Iterator[None]:
    """Let no file of this process grow beyond 100 kB."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path: Path, tiny_disk: None) -> None:
    path = tmp_path / "features.parquet"
    write(path)
    schema = feature_schema(run="x", num_features=1000, dtype="float32")
    table = to_table(Rows(["a"] * 99, [1] * 99, [1] * 99, np.random.default_rng(0).random((99, 1000))), schema)
    with pytest.raises(UserError, match=r"features\.parquet: cannot write the features: File too large"):
        write_features(path, [table], schema)
    assert open_features(path).run == "market"
    assert [p.name for p in tmp_path.iterdir()] == ["features.parquet"]
