"""URLs of object storage, and the local paths of their working copies.

`s3://bucket/runs/a` has its copy at `CACHE/remote/s3/bucket/runs/a`, so that either follows from the other: code works
on local paths, settings and messages name the URL.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

from mprd.errors import UserError
from mprd.storage.cache import cache_folder

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
URL = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
COLLAPSED = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/(?!/)")
"""A URL that has been made a `Path`, which joins its slashes."""


def copies_folder() -> Path:
    """Return the folder of all working copies."""
    return cache_folder().resolve() / "remote"


def is_url(text: str) -> bool:
    """Return whether a text is a URL of a file system that pyarrow knows."""
    match = URL.match(text)
    return match is not None and match["scheme"].lower() in (*SCHEMES, "file")


def local_path(place: Path | str) -> Path:
    """Return a path as it is, with `~` expanded, and of a URL the path of its working copy; nothing is read.

    Raises UserError for a URL of another kind, and for one without a bucket or with a password.
    """
    text = str(place)
    if isinstance(place, Path) and (match := COLLAPSED.match(text)) and not os.path.lexists(f"{match[1]}:"):
        text = text.replace(":/", "://", 1)
    url = URL.match(text)
    if url is None:
        return Path(os.path.expanduser(place))
    scheme, rest = url["scheme"].lower(), url["rest"]
    if scheme == "file":
        return Path(unquote(rest))
    if scheme not in SCHEMES:
        raise UserError(f"{text}: cannot read or write {scheme}://; known are {', '.join(SCHEMES)} and file")
    rest, mark, query = rest.partition("?") if "=" in rest.rpartition("?")[2] else (rest, "", "")
    authority, *parts = (part for part in rest.split("/") if part)
    if ":" in authority.partition("@")[0] and "@" in authority:
        host = authority.rpartition("@")[2]
        raise UserError(f"{scheme}://{host}: give credentials by the environment, not in the URL")
    if any(part.startswith(".") for part in (authority, *parts)):
        raise UserError(f"{text}: no part of the URL may begin with a dot")
    return copies_folder() / scheme / f"{authority}{mark}{quote(query, safe='=&')}" / "/".join(parts)


def split_copy(path: Path) -> tuple[str, list[str]] | None:
    """Return the URL of the bucket that a working copy belongs to, and the parts of its name; None for other paths."""
    folder = copies_folder()
    if not path.is_relative_to(folder):
        return None
    scheme, authority, *parts = path.relative_to(folder).parts
    authority, mark, query = authority.partition("?")
    return f"{scheme}://{authority}{mark}{unquote(query)}", parts


def place_of(path: Path) -> str:
    """Return the URL of a working copy, and any other path as it is."""
    found = split_copy(path)
    if found is None:
        return str(path)
    bucket, mark, query = found[0].partition("?")
    return "/".join([bucket, *found[1]]) + mark + query


def shown(text: str) -> str:
    """Replace the paths of working copies in a text by URLs."""
    if "/remote/" in text:
        with suppress(UserError):
            folder = re.escape(str(copies_folder()))
            return re.sub(rf"{folder}/({'|'.join(SCHEMES)})/", r"\1://", text)
    return text
