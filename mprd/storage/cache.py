"""Where mprd keeps its own files: packs, drawn pedestrians, working copies of URLs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import platformdirs

from mprd.errors import UserError

VARIABLE = "MPRD_CACHE"
TAG = "CACHEDIR.TAG"
TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# mprd's own files: packs of decoded images and drawn pedestrians. They are made again when they are needed.\n"
)
"""See bford.info/cachedir: backup programs know this file too."""


def cache_folder() -> Path:
    """Return `MPRD_CACHE`, or `mprd` in the user's cache folder, or in the temporary one where that cannot be written.

    The folder may not exist yet; nothing is written. Raises UserError where `MPRD_CACHE` cannot be written.
    """
    given = os.environ.get(VARIABLE)
    if given:
        folder = Path(given).expanduser().absolute()
        if not can_write(folder):
            raise UserError(f"{VARIABLE}: cannot write to {folder}")
        return folder
    folder = platformdirs.user_cache_path("mprd", appauthor=False)
    if folder.is_absolute() and can_write(folder):
        return folder
    return Path(tempfile.gettempdir()) / f"mprd-{os.getuid()}"


def can_write(folder: Path) -> bool:
    """Return whether files can be written to a folder that exists or can be made."""
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)


def make_cache(folder: Path) -> None:
    """Create a cache folder, with the tag that makes scanners pass over it."""
    folder.mkdir(parents=True, exist_ok=True)
    tag = folder / TAG
    if not tag.exists():
        tag.write_text(TAG_TEXT)
