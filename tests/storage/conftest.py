from __future__ import annotations

from collections.abc import Iterator

import pytest
from pyarrow.fs import FileSystem

from mprd.storage import copy

from .server import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Start the server, with an empty bucket, and credentials in the environment."""
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setattr(copy, "PAUSES", (0.0,))
        FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")[0].create_dir("bucket")
        yield server
    server.server.shutdown()
