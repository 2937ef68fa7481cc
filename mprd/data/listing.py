"""A data set as a CSV `file,split,identity,camera`."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from mprd.data.layouts import Crop, Splits, split_of
from mprd.data.scan import LeftOut
from mprd.errors import UserError
from mprd.text import read_text

COLUMNS = ("file", "split", "identity", "camera")
SPLITS = {"train": "train", "train_all": "train", "query": "query", "gallery": "gallery", "val": "val"}


def read_listing(file: Path) -> tuple[Splits, tuple[LeftOut, ...]]:
    """Read a list of images; files are relative to the folder of the list.

    Identity and camera may be missing, as columns or in all rows. Raises UserError naming the line at fault, or the
    first file that is missing.
    """
    crops: dict[str, list[Crop]] = {"train": [], "query": [], "gallery": [], "val": []}
    names: dict[str, int] = {}
    for number, row in read_rows(file):
        place = f"{file}, line {number}"
        split = SPLITS.get(split_of((row["split"] or "").strip()) or "")
        if split is None:
            raise UserError(f"{place}: split must be train, query, gallery or val, but got {row['split']!r}")
        name = os.path.normpath((row["file"] or "").strip())
        first = names.setdefault(os.path.abspath(file.parent / name), number)
        if first != number:
            raise UserError(f"{place}: {name} is on line {first} too")
        ids = ((row.get(column) or "").strip() or None for column in COLUMNS[2:])
        crops[split].append(Crop(file.parent / name, *ids))
    if not names:
        raise UserError(f"{file}: lists no images")
    check_rows(file, [crop for part in crops.values() for crop in part])
    splits = Splits(*(sorted(crops[split], key=lambda crop: crop.path.as_posix()) for split in Splits._fields))
    val = crops["val"]
    return splits, (LeftOut("images of the split val", len(val), str(val[0].path)),) if val else ()


def read_rows(file: Path) -> list[tuple[int, dict[str, str | None]]]:
    """Return the number and the cells of each line."""
    try:
        table = csv.DictReader(io.StringIO(read_text(file)))
        header = [name.strip() for name in table.fieldnames or ()]
        if not {"file", "split"} <= set(header) <= set(COLUMNS):
            raise UserError(f"{file}: wanted the header {','.join(COLUMNS)}, but got {','.join(header)[:100]!r}")
        table.fieldnames = header
        return [(table.line_num, row) for row in table]
    except OSError as error:
        raise UserError(f"{file}: cannot read the list: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"{file}: no CSV: {error}") from None


def check_rows(file: Path, crops: list[Crop]) -> None:
    """Raise UserError where files are missing, or only some rows have an identity or a camera."""
    missing = [crop.path for crop in crops if not os.path.isfile(crop.path)]
    if missing:
        raise UserError(f"{missing[0]}: named in {file}, but missing ({len(missing)} of {len(crops)} are)")
    for column, values in (("identity", [crop.pid for crop in crops]), ("camera", [crop.camid for crop in crops])):
        known = [value for value in values if value is not None]
        if known and len(known) < len(values):
            path = crops[values.index(None)].path
            raise UserError(f"{file}: {path} has no {column}, which {len(known)} of {len(values)} rows have")
