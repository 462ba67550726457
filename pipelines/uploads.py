"""What was begun to be sent to S3 in pieces: no listing tells of it, and its bytes are paid for."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Upload:
    """One that was begun. bytes: sent so far, of its first 1,000 pieces. id: the storage's own."""

    path: str
    bytes: int
    id: str


def begun(fs: Any, bucket: str, prefix: str) -> Iterator[tuple[str, int, str]]:
    """Key, bytes and id of each, over all pages; none where a store knows no such listing."""
    after: dict[str, str] = {}
    while True:
        try:
            page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **after)
        except OSError as error:
            if error.errno == errno.ENOSYS:
                return
            raise
        for found in page.get("Uploads", []):
            # One that ends meanwhile is none.
            with suppress(FileNotFoundError):
                pieces = fs.call_s3("list_parts", Bucket=bucket, Key=found["Key"], UploadId=found["UploadId"])
                yield found["Key"], sum(piece["Size"] for piece in pieces.get("Parts", [])), found["UploadId"]
        if not page.get("IsTruncated"):
            return
        after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
