"""Find images by folder, list or glob, and read the ids in their names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mprd.config.schema import DataConfig
from mprd.data.datasets import to_number
from mprd.data.layouts import MARKET_NAME, read_lines
from mprd.data.recognition import compiled
from mprd.data.scan import IMAGE_SUFFIXES, check_matches, is_image, log_left_out, scan
from mprd.errors import UserError

MSMT17_IDS = re.compile(r"^(?P<pid>\d+)_\d+_(?P<camid>\d+)_")


class ImageList(NamedTuple):
    """Image files in order."""

    paths: list[str]
    """Absolute paths."""
    names: list[str]
    """Paths relative to the folder, as listed in the text file, or as the glob matched."""


def find_images(source: str) -> ImageList:
    """List the images below a folder, in a text file (a path a line, relative to the file's folder) or of a glob.

    Folders and globs are sorted by path; a text file keeps its order, and its entries may have any suffix. Raises
    UserError if there are none.
    """
    suffixes = ", ".join(f"*{suffix}" for suffix in IMAGE_SUFFIXES)
    if os.path.isdir(source):
        found = scan(Path(source))
        base, names = source, found.names
        log_left_out(source, found.left_out)
    elif os.path.isfile(source) and not is_image(source):
        base, names = os.path.dirname(source), read_lines(Path(source))
        suffixes = "a path a line"
    else:
        base = ""
        names, left_out = check_matches(find_matches(source))
        log_left_out(source, left_out)
        if not names and not glob.has_magic(source):
            raise UserError(f"{source}: no such folder, list or image")
    if not names:
        raise UserError(f"{source}: no images; looked for {suffixes}")
    base = os.path.abspath(base)
    return ImageList([os.path.normpath(os.path.join(base, name)) for name in names], names)


def find_matches(pattern: str) -> list[str]:
    """Return the files of a glob; a name that exists as it is, whole or up to a folder, is no pattern."""
    literal = pattern
    while literal and not os.path.lexists(literal):
        literal = os.path.dirname(literal) if os.path.dirname(literal) != literal else ""
    return glob.glob(glob.escape(literal) + pattern[len(literal) :], recursive=True)


def name_patterns(config: DataConfig, pattern: str | None = None) -> list[re.Pattern[str]]:
    """Return the regular expressions for file names: `pattern`, or by default those of the run's data set.

    Raises UserError for an invalid regular expression.
    """
    if pattern is None and config.dataset != "folder":
        return [MARKET_NAME, MSMT17_IDS]
    setting = "data.name_pattern" if pattern is None else "--name-pattern"
    return [compiled(config.name_pattern if pattern is None else pattern, setting=setting)]


def ids_from_name(
    name: str, patterns: Sequence[re.Pattern[str]], camera_number: Callable[[str], int | None] = to_number
) -> tuple[int | None, int | None]:
    """Return pid and camid by the first pattern that matches the path, or else its last part; None if not a number.

    Args:
        camera_number: that of a camera by its name.
    """
    for text in (name, name.rpartition("/")[2]):
        for pattern in patterns:
            match = pattern.search(text)
            if match:
                found = match.groupdict()
                pid, camid = (found.get(group) for group in ("pid", "camid"))
                return to_number(pid) if pid else None, camera_number(camid) if camid else None
    return None, None
