"""One S3 server on loopback for the unit tests that speak to a store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, Any]]:
    """File system options of an S3 server that has an empty `bucket`."""
    import s3fs

    from tests.s3_server import s3_server

    with s3_server() as url:
        options = {"endpoint_url": url, "key": "testkey", "secret": "testsecret"}
        s3fs.S3FileSystem(**options).mkdir("bucket")
        yield options
