"""The feature file keeps paths, ids and features, describes itself, and is never half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mprd.errors import UserError
from mprd.feature_file import Dtype, Rows, feature_schema, open_features, rows_to_table, write_features

ROWS = Rows(["a.jpg", "b/c.jpg"], [7, None], [None, 2], np.array([[0.6, 0.8, 0.0], [0.0, -1.0, 0.0]], np.float32))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "features.parquet"


def write(path: Path, dtype: Dtype = "float32", num_tables: int = 2) -> None:
    schema = feature_schema(run="market", num_features=3, dtype=dtype, weights="ab12")
    assert write_features(path, [rows_to_table(ROWS, schema)] * num_tables, schema) == 2 * num_tables


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 5e-4)])
def test_what_is_written_is_read_again(dtype: Dtype, tolerance: float, file: Path) -> None:
    write(file, dtype)
    opened = open_features(file)
    assert (opened.run, opened.num_rows, opened.num_features, opened.dtype, opened.weights) == (
        "market",
        4,
        3,
        dtype,
        "ab12",
    )
    first, second = opened.batches()
    assert first[:3] == second[:3] == ROWS[:3]
    assert first.features.dtype == dtype
    np.testing.assert_allclose(second.features, ROWS.features, rtol=0, atol=tolerance)


def test_any_parquet_reader_finds_columns_and_metadata(file: Path) -> None:
    write(file)
    table = pq.read_table(file)
    assert [str(field.type) for field in table.schema][:3] == ["string", "int64", "int64"]
    feature = table.schema.field("feature").type
    assert (feature.list_size, feature.value_type) == (3, pa.float32())
    assert json.loads(table.schema.metadata[b"mprd"]) == {
        "format": 1,
        "run": "market",
        "num_features": 3,
        "weights": "ab12",
    }
    assert table.column("pid").to_pylist() == [7, None, 7, None]


def test_a_file_without_rows_is_valid(file: Path) -> None:
    write(file, num_tables=0)
    assert open_features(file).num_rows == 0
    assert list(open_features(file).batches()) == []


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    schema = feature_schema(run="x", num_features=3, dtype="float32")
    later = schema.with_metadata({b"mprd": json.dumps({"format": 2, "run": "x", "num_features": 3})})
    write_features(tmp_path / "later.parquet", [], later)
    write_features(tmp_path / "wrong.parquet", [], schema.remove(1))
    for name, reason in {
        "other": "not a file of features",
        "broken": "not a file of features",
        "later": "format 2, wanted 1",
        "wrong": "columns path, camid, feature",
        "absent": "no such folder or feature file",
    }.items():
        with pytest.raises(UserError, match=rf"{name}\.parquet: .*{reason}"):
            open_features(tmp_path / f"{name}.parquet")


def test_a_full_disk_is_an_error_that_keeps_the_old_file(file: Path, tiny_disk: None) -> None:
    write(file)
    schema = feature_schema(run="x", num_features=1000, dtype="float32")
    large = rows_to_table(Rows(["a"] * 99, [1] * 99, [1] * 99, np.random.default_rng(0).random((99, 1000))), schema)
    with pytest.raises(UserError, match=r"features\.parquet: cannot write the features: File too large"):
        write_features(file, [large], schema)
    assert open_features(file).run == "market"
    assert list(file.parent.iterdir()) == [file]
