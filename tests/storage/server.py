"""An S3 server of this machine, and what is in it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem, copy_files


class Server:
    """An S3 server; while `broken` is set, it refuses the writing of the objects whose names have it."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.backend = DomainDispatcherApplication(create_backend_app)
        self.broken: str | None = None
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        # the parts of an upload, so that it has begun
        is_part = environ["REQUEST_METHOD"] == "PUT"
        if is_part and self.broken is not None and self.broken in environ["PATH_INFO"]:
            start("403 Forbidden", [("Content-Length", "0")])
            return [b""]
        return self.backend(environ, start)


def names_of(url: str) -> list[str]:
    """List the objects below a URL."""
    filesystem, base = FileSystem.from_uri(url)
    found = filesystem.get_file_info(FileSelector(base, recursive=True, allow_not_found=True))
    return sorted(info.path[len(base) + 1 :] for info in found if info.is_file)


def upload(folder: Path, url: str) -> None:
    filesystem, base = FileSystem.from_uri(url)
    copy_files(str(folder), base, source_filesystem=LocalFileSystem(), destination_filesystem=filesystem)
