"""The feature file: Parquet with a row an image, its path, identity and camera where known, and its unit feature."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mprd.errors import UserError
from mprd.runtime.checkpoint import disk_reason

Dtype = Literal["float32", "float16"]
KEY = b"mprd"
FORMAT = 1
# features hardly shrink, and uncompressed they are read as fast as the disk gives them
COMPRESSION = {"path": "zstd", "pid": "zstd", "camid": "zstd"}


class Rows(NamedTuple):
    """Some images in order."""

    paths: list[str]
    pids: list[int | None]
    camids: list[int | None]
    """Cameras as numbered in file names."""
    features: np.ndarray
    """Unit features, float32 or float16 `[n, D]`."""


def feature_schema(*, run: str, num_features: int, dtype: Dtype) -> pa.Schema:
    """Describe the columns, and in the metadata under `mprd` the format, the run's name and D."""
    element = pa.float16() if dtype == "float16" else pa.float32()
    fields = [
        pa.field("path", pa.string()),
        pa.field("pid", pa.int64()),
        pa.field("camid", pa.int64()),
        pa.field("feature", pa.list_(element, num_features)),
    ]
    described = {"format": FORMAT, "run": run, "num_features": num_features}
    return pa.schema(fields, metadata={KEY: json.dumps(described)})


def to_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    """Turn rows into an Arrow table; features are rounded to the dtype of the schema."""
    feature = schema.field("feature").type
    values = rows.features.astype(feature.value_type.to_pandas_dtype(), copy=False)
    features = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), feature.list_size)
    columns = [pa.array(rows.paths, pa.string()), pa.array(rows.pids, pa.int64()), pa.array(rows.camids, pa.int64())]
    return pa.Table.from_arrays([*columns, features], schema=schema)


def write_features(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables as row groups of one file, whole or not at all; return the number of rows.

    Raises UserError where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    num_rows = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a file of Python's own: its errors say what the system said
        with temporary.open("wb") as file, open_writer(file, schema) as writer:
            for table in tables:
                writer.write_table(table)
                num_rows += len(table)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the features: {disk_reason(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def open_writer(file: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    """Choose how the columns are packed."""
    return pq.ParquetWriter(
        file, schema, compression=COMPRESSION, use_dictionary=["pid", "camid"], write_statistics=False
    )


@dataclass(frozen=True)
class FeatureFile:
    """A feature file that can be read: what it says of itself, and its rows."""

    path: Path
    run: str
    """Name of the run whose network made the features."""
    num_rows: int
    num_features: int
    dtype: Dtype

    def tables(self) -> Iterator[pa.Table]:
        """Yield the row groups as Arrow tables."""
        with pq.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group)

    def batches(self) -> Iterator[Rows]:
        """Yield the row groups with features as arrays of the file's dtype `[n, D]`."""
        for table in self.tables():
            paths, pids, camids = (table.column(name).to_pylist() for name in ("path", "pid", "camid"))
            yield Rows(paths, pids, camids, as_matrix(table.column("feature"), self.num_features))


def as_matrix(column: pa.ChunkedArray, num_features: int) -> np.ndarray:
    """Turn a column of fixed-size lists into an array `[n, D]`, without a copy where it is one chunk."""
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
    whole = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return whole.reshape(-1, num_features)


def open_features(path: Path | str) -> FeatureFile:
    """Look at a feature file; raise UserError where it is missing, damaged, or something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of features; mprd.extract writes one")
    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
        said = json.loads((schema.metadata or {})[KEY])
        check_schema(schema, said)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a file of features as mprd.extract writes it ({reason})") from None
    dtype: Dtype = "float16" if schema.field("feature").type.value_type == pa.float16() else "float32"
    return FeatureFile(path, said["run"], num_rows, said["num_features"], dtype)


def check_schema(schema: pa.Schema, said: dict[str, Any]) -> None:
    """Raise ValueError unless the columns are those of this format."""
    if said["format"] != FORMAT:
        raise ValueError(f"format {said['format']}, wanted {FORMAT}")
    for dtype in ("float32", "float16"):
        wanted = feature_schema(run=said["run"], num_features=said["num_features"], dtype=dtype)
        if [(field.name, as_text(field.type)) for field in schema] == [(f.name, as_text(f.type)) for f in wanted]:
            return
    raise ValueError(f"columns {', '.join(schema.names)}")


def as_text(kind: pa.DataType) -> str:
    """Write a type without the names of inner fields, which Parquet does not keep."""
    return f"{kind.value_type}[{kind.list_size}]" if pa.types.is_fixed_size_list(kind) else str(kind)


def join_files(parts: Sequence[Path], path: Path, schema: pa.Schema) -> int:
    """Write the row groups of files that were written one after the other as one file; return its rows."""
    return write_features(path, (table for part in parts for table in open_features(part).tables()), schema)
