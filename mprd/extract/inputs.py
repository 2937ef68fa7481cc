"""Pictures that a person points at, by folder, list or glob, and the ids in their names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mprd.config.schema import DataConfig
from mprd.data.datasets import to_number
from mprd.data.layouts import IMAGE_SUFFIXES, MARKET_NAME, list_images, read_lines
from mprd.errors import UserError

MSMT17_NAME = re.compile(r"^(?P<pid>\d+)_\d+_(?P<camid>\d+)_")


class Pictures(NamedTuple):
    """Files in order, each named in full and as the person sees it."""

    paths: list[str]
    """Absolute paths."""
    names: list[str]
    """The path below the folder, as listed, or as the glob found it."""


def list_pictures(source: str) -> Pictures:
    """List the images below a folder, in a text file (a path a line, relative to the file's folder) or of a glob.

    Folders and globs are sorted by path; a list keeps its order, and whatever it names. Raises UserError where
    nothing is found.
    """
    suffixes = ", ".join(f"*{suffix}" for suffix in IMAGE_SUFFIXES)
    if os.path.isdir(source):
        base, names = source, list_images(Path(source))
    elif os.path.isfile(source) and not is_image(source):
        base, names = os.path.dirname(source), read_lines(Path(source))
        suffixes = "a path a line"
    else:
        base, names = "", sorted(filter(is_image, glob.glob(source, recursive=True)))
        if not names and not glob.has_magic(source):
            raise UserError(f"{source}: no such folder, list or image")
    if not names:
        raise UserError(f"{source}: no images; looked for {suffixes}")
    base = os.path.abspath(base)
    return Pictures([os.path.normpath(os.path.join(base, name)) for name in names], names)


def is_image(path: str) -> bool:
    """Say whether a file's name is that of an image."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def name_patterns(config: DataConfig, pattern: str | None = None) -> list[re.Pattern[str]]:
    """Return the expressions by which names are read: the given one, or what a run's data set calls for.

    Raises UserError where it is none.
    """
    if pattern is None and config.dataset != "folder":
        return [MARKET_NAME, MSMT17_NAME]
    setting = "data.name_pattern" if pattern is None else "--name-pattern"
    try:
        return [re.compile(config.name_pattern if pattern is None else pattern)]
    except re.error as error:
        raise UserError(f"{setting}: not a regular expression: {error}") from None


def ids_of(name: str, patterns: Sequence[re.Pattern[str]]) -> tuple[int | None, int | None]:
    """Read identity and camera out of a name, or else out of its last part; None where it does not tell a number."""
    for text in (name, name.rpartition("/")[2]):
        for pattern in patterns:
            match = pattern.search(text)
            if match:
                found = match.groupdict()
                pid, camid = (found.get(group) for group in ("pid", "camid"))
                return to_number(pid) if pid else None, to_number(camid) if camid else None
    return None, None
