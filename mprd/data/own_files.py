"""How the folders that mprd writes are recognized.

Nothing that mprd writes may become a training image: `mprd.data.scan` passes over each folder that `is_own`.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from mprd.storage.cache import TAG

RUN_FILES = frozenset({"config.yaml", "run.json"})
STUDY_FILES = frozenset({"study.yaml", "study.json"})


def is_own(folder: str, names: Collection[str]) -> bool:
    """Return whether mprd wrote a folder with these entries: a cache, a run or a study."""
    there = frozenset(names)
    if there >= RUN_FILES or there >= STUDY_FILES:
        return True
    return TAG in there and "mprd" in first_bytes(os.path.join(folder, TAG))


def first_bytes(file: str) -> str:
    """Return the beginning of a text file; nothing where it cannot be read."""
    try:
        with open(file, "rb") as content:
            return content.read(1000).decode(errors="replace")
    except OSError:
        return ""
