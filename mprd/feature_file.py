"""Read and write feature files: Parquet with one row per image: path, identity and camera if known, unit feature."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mprd.errors import UserError
from mprd.runtime.files import replaced
from mprd.text import from_unicode, to_unicode

Dtype = Literal["float32", "float16"]
METADATA_KEY = b"mprd"
FILE_FORMAT = 1
WRITER_OPTIONS: dict[str, Any] = {
    # features hardly compress
    "compression": {"path": "zstd", "pid": "zstd", "camid": "zstd"},
    "use_dictionary": ["pid", "camid"],
    "write_statistics": False,
}


class Rows(NamedTuple):
    """Images with their ids and features."""

    paths: list[str]
    pids: list[int | None]
    camids: list[int | None]
    """Cameras as numbered in file names."""
    features: np.ndarray
    """Unit features, float32 or float16 `[n, D]`."""


def feature_schema(*, run: str, num_features: int, dtype: Dtype, weights: str = "") -> pa.Schema:
    """Return the columns; the metadata under `mprd` hold the format, the run's name, D and a hash of the weights."""
    element = pa.float16() if dtype == "float16" else pa.float32()
    fields = [
        pa.field("path", pa.string()),
        pa.field("pid", pa.int64()),
        pa.field("camid", pa.int64()),
        pa.field("feature", pa.list_(element, num_features)),
    ]
    header = {"format": FILE_FORMAT, "run": run, "num_features": num_features, "weights": weights}
    return pa.schema(fields, metadata={METADATA_KEY: json.dumps(header)})


def rows_to_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    """Return rows as an Arrow table, with features in the dtype of the schema."""
    feature = schema.field("feature").type
    values = rows.features.astype(feature.value_type.to_pandas_dtype(), copy=False)
    features = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), feature.list_size)
    paths = pa.array([*map(to_unicode, rows.paths)], pa.string())
    columns = [paths, pa.array(rows.pids, pa.int64()), pa.array(rows.camids, pa.int64())]
    return pa.Table.from_arrays([*columns, features], schema=schema)


def write_features(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables as row groups of one file; return the number of rows.

    An existing file is replaced only once the new one is complete. Raises UserError if writing fails.
    """
    num_rows = 0
    with replaced(path, "write the features") as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Arrow's own files hide the system's error message
        with temporary.open("wb") as file, pq.ParquetWriter(file, schema, **WRITER_OPTIONS) as writer:
            for table in tables:
                writer.write_table(table)
                num_rows += len(table)
    return num_rows


@dataclass(frozen=True)
class FeatureFile:
    """The header of a feature file, and access to its rows."""

    path: Path
    run: str
    """Name of the run that the features come from."""
    num_rows: int
    num_features: int
    dtype: Dtype
    weights: str
    """`Model.fingerprint` of the network; empty where it is not known."""

    def tables(self) -> Iterator[pa.Table]:
        """Yield the row groups as Arrow tables."""
        # Arrow takes neither names that are not UTF-8 nor all others
        with self.path.open("rb") as raw, pq.ParquetFile(raw) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group)

    def batches(self) -> Iterator[Rows]:
        """Yield the row groups with features `[n, D]` of the file's dtype."""
        for table in self.tables():
            paths, pids, camids = (table.column(name).to_pylist() for name in ("path", "pid", "camid"))
            yield Rows([*map(from_unicode, paths)], pids, camids, as_matrix(table.column("feature"), self.num_features))


def as_matrix(column: pa.ChunkedArray, num_features: int) -> np.ndarray:
    """Return a column of fixed-size lists as an array `[n, D]`; a single chunk is not copied."""
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
    whole = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return whole.reshape(-1, num_features)


def open_features(path: Path | str) -> FeatureFile:
    """Read the header of a feature file; raise UserError if it is missing, damaged or of another kind.

    >>> import numpy as np
    >>> from mprd.search import Gallery
    >>> Gallery.from_features(np.eye(3), pids=[7, 7, 8]).save("features.parquet")
    >>> file = open_features("features.parquet")
    >>> file.num_rows, file.num_features, file.dtype
    (3, 3, 'float32')
    >>> [rows.pids for rows in file.batches()]
    [[7, 7, 8]]
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such folder or feature file; mprd extract writes one")
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
        header = json.loads((schema.metadata or {})[METADATA_KEY])
        check_schema(schema, header)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a file of features as mprd.extract writes it ({reason})") from None
    dtype: Dtype = "float16" if schema.field("feature").type.value_type == pa.float16() else "float32"
    # files of earlier versions lack the weights
    return FeatureFile(path, header["run"], num_rows, header["num_features"], dtype, header.get("weights", ""))


def check_schema(schema: pa.Schema, header: dict[str, Any]) -> None:
    """Raise ValueError unless format and columns are those that this version writes."""
    if header["format"] != FILE_FORMAT:
        raise ValueError(f"format {header['format']}, wanted {FILE_FORMAT}")
    for dtype in ("float32", "float16"):
        wanted = feature_schema(run=header["run"], num_features=header["num_features"], dtype=dtype)
        if [(field.name, type_name(field.type)) for field in schema] == [(f.name, type_name(f.type)) for f in wanted]:
            return
    raise ValueError(f"columns {', '.join(schema.names)}")


def type_name(kind: pa.DataType) -> str:
    """Return the name of a type without those of inner fields, which Parquet does not keep."""
    return f"{kind.value_type}[{kind.list_size}]" if pa.types.is_fixed_size_list(kind) else str(kind)


def join_files(parts: Sequence[Path], path: Path, schema: pa.Schema) -> int:
    """Concatenate feature files of one schema; return the number of rows."""
    return write_features(path, (table for part in parts for table in open_features(part).tables()), schema)
