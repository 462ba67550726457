"""Images that a row names by path or URL: where they are, which are allowed, and their bytes, a few at a time."""

from __future__ import annotations

import errno
import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pipelines.contracts import Sample
from pipelines.errors import InputError, StorageError
from pipelines.sources import web
from pipelines.sources.members import reject_image
from pipelines.sources.text import Fault, printable
from pipelines.storage import Store, is_local, protocol_of

A = TypeVar("A")
B = TypeVar("B")

FETCH_THREADS = 16
_BUCKETS = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"))
_REMOTE = frozenset(("http", "https", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hdfs", "hf", "memory"))


def in_order(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """work(item) of each item, FETCH_THREADS at a time, in the order of the items."""
    pending: deque[Future[B]] = deque()
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= FETCH_THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def resolve(reference: str, listing: str) -> str | Fault:
    """The address of an image that `listing` (a manifest or Parquet file) names.

    A relative path is meant from the listing's folder. A listing that came over the network may not point at
    this machine's files: whoever wrote it would choose what is read here.
    """
    reference = reference.strip()
    forbidden = Fault("forbidden_url", printable(f"{reference} in {listing}"))
    if "\0" in reference or "::" in reference:
        return forbidden
    if "://" in reference or reference.startswith(("file:", "local:")):
        allowed = is_local(listing) if is_local(reference) else protocol_of(reference) in _REMOTE
        return reference if allowed else forbidden
    if is_local(listing):
        return posixpath.join(posixpath.dirname(listing), reference)
    return forbidden if reference.startswith("/") else _beside(reference, listing, forbidden)


def _beside(reference: str, listing: str, forbidden: Fault) -> str | Fault:
    protocol, _, path = listing.partition("?")[0].partition("://")
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(path), reference))
    bucket = path.lstrip("/").partition("/")[0]
    inside = protocol == "memory" or joined.lstrip("/").partition("/")[0] == bucket
    return f"{protocol}://{joined}" if inside else forbidden


def read_bounded(store: Store, uri: str, max_bytes: int) -> bytes | Fault:
    """The bytes of an image, never more than max_bytes and one of them in memory.

    A web server that is gone is a fault of the URL: lists of URLs are full of them. Raises: StorageError where a
    disk or an object store fails or refuses, since it may well have the image; InputError where the client of
    a store is not installed or set up.
    """
    is_web = protocol_of(uri) in ("http", "https")
    data = web.get(uri, store.options, max_bytes + 1) if is_web else _stored(store, uri, max_bytes + 1)
    if isinstance(data, bytes) and len(data) > max_bytes:
        return Fault("image_too_large", f"more than the {max_bytes} bytes allowed")
    return data


def _stored(store: Store, uri: str, most_bytes: int) -> bytes | Fault:
    if not _names_an_object(uri):
        return Fault("fetch_failed", printable(f"{uri} names no object"))
    try:
        with store.open(uri) as file:
            return file.read(most_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return Fault("not_found", printable(uri))
    except IsADirectoryError:
        return Fault("not_a_file", printable(f"{uri} is a folder"))
    except UnicodeError as error:
        return Fault("fetch_failed", printable(f"{uri} is no address: {error}"))
    except (ImportError, ValueError) as error:
        fix = "Install what it needs on every node, and check the storage settings."
        raise InputError(f"{printable(uri)} cannot be opened: {error}", fix) from error
    except StorageError as error:
        if not _is_of_the_name(error.__cause__):
            raise
        return Fault("not_found", printable(f"{uri}: {error.__cause__}"))


def _names_an_object(uri: str) -> bool:
    bucket, _, key = uri.partition("://")[2].partition("/")
    return protocol_of(uri) not in _BUCKETS or bool(bucket and key)


def _is_of_the_name(error: BaseException | None) -> bool:
    """Whether no store, in whatever state, has such an object; botocore looks at names before it asks."""
    is_unusable = isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
    return is_unusable or type(error).__name__ == "ParamValidationError"


def fetch_image(sample: Sample, reference: str | None, listing: str, store: Store, max_bytes: int) -> Sample:
    """The sample with the image its row refers to, or with the reject that says why not."""
    if reference is None:
        return sample
    uri = resolve(reference, listing)
    data = uri if isinstance(uri, Fault) else read_bounded(store, uri, max_bytes)
    sample.has_image = True
    sample.uri = printable(reference) if isinstance(uri, Fault) else printable(uri)
    if isinstance(data, Fault):
        reject_image(sample, data)
    else:
        sample.image, sample.offset, sample.length = data, 0, len(data)
    return sample
