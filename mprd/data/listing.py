"""A data set as a CSV `file,split,identity,camera`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection, Sequence
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
    for number, row in read_rows(file, required=COLUMNS[:2], allowed=COLUMNS):
        place = f"{file}, line {number}"
        split = SPLITS.get(split_of(row["split"]) or "")
        if split is None:
            raise UserError(f"{place}: split must be train, query, gallery or val, but got {row['split']!r}")
        name = os.path.normpath(row["file"])
        first = names.setdefault(os.path.abspath(file.parent / name), number)
        if first != number:
            raise UserError(f"{place}: {name} is on line {first} too")
        crops[split].append(Crop(file.parent / name, row["identity"] or None, row["camera"] or None))
    if not names:
        raise UserError(f"{file}: lists no images")
    check_rows(file, [crop for part in crops.values() for crop in part])
    splits = Splits(*(sorted(crops[split], key=lambda crop: crop.path.as_posix()) for split in Splits._fields))
    val = crops["val"]
    return splits, (LeftOut("images of the split val", len(val), str(val[0].path)),) if val else ()


def read_rows(file: Path, *, required: Collection[str], allowed: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Return line number and stripped cells of each line of a CSV that is not blank; absent cells are empty.

    Args:
        required: the columns that must be there.
        allowed: all columns that may be, in any order.

    Raises UserError where the file cannot be read, for another header, and for a line with more cells than that.
    """
    try:
        table = csv.reader(io.StringIO(read_text(file)))
        header = [name.strip() for name in next(table, ())]
        lines = [(table.line_num, [cell.strip() for cell in cells]) for cells in table if cells]
    except OSError as error:
        raise UserError(f"{file}: cannot read the list: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"{file}: no CSV: {error}") from None
    if not set(required) <= set(header) <= set(allowed):
        raise UserError(f"{file}: wanted the header {','.join(allowed)}, but got {','.join(header)[:100]!r}")
    for number, cells in lines:
        if len(cells) > len(header):
            raise UserError(f"{file}, line {number}: wanted {','.join(header)}, but got {','.join(cells)!r}")
    return [(number, dict.fromkeys(allowed, "") | dict(zip(header, cells, strict=False))) for number, cells in lines]


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
