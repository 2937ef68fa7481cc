"""Replace files atomically: a reader sees the old or the new file, never a part."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from mprd.errors import UserError


@contextmanager
def replaced(path: Path, action: str = "write") -> Iterator[Path]:
    """Yield a temporary path that is moved to `path` if the block succeeds, and removed if not.

    Raises UserError `PATH: cannot ACTION: REASON` for an OSError.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot {action}: {disk_reason(error)}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def disk_reason(error: OSError | RuntimeError) -> str:
    """Return why a write failed; torch's writer raises a RuntimeError without the system's reason."""
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return "the disk is full" if full else (error.strerror or str(error))
    return f"the write broke off ({str(error).splitlines()[0]}); is the disk full?"
