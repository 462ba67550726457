"""Images that a row names by path or URL: where they are, which are allowed, and their bytes, a few at a time."""

from __future__ import annotations

import errno
import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fsspec.registry import known_implementations, registry

from pipelines.config import ReadConfig
from pipelines.contracts import Sample
from pipelines.errors import InputError, StorageError
from pipelines.sources import web
from pipelines.sources.members import reject_image
from pipelines.sources.places import ALLOWING, allowing, is_bucket, is_web, lies_in, own_place, place_of
from pipelines.sources.text import Fault, printable
from pipelines.storage import Store, is_local, protocol_of, whole_uri

A = TypeVar("A")
B = TypeVar("B")

FETCH_THREADS = 16
# References that a listing is judged by before it is read: one bad row says nothing of the others.
PROBED_REFERENCES = 32
_IPV6_HOST = re.compile(r"(?<=^http://)\[[0-9a-f:.]+\]|(?<=^https://)\[[0-9a-f:.]+\]", re.IGNORECASE)


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


def resolve(reference: str, listing: str, allow: Sequence[str] = ()) -> str | Fault:
    """The address of an image that `listing` (a manifest or Parquet file) names.

    A relative path is meant from the listing's folder. Whoever wrote the listing chooses what is read here, so
    that it may name what lies in its own folder, bucket or web host, what lies in the places of `allow`, and what
    the web has for everyone, which web.get sees to.
    """
    reference = reference.strip()
    uri = _address(reference, listing)
    if uri is None:
        return Fault("forbidden_url", printable(f"{reference} in {listing} is no address that an input may have"))
    if is_web(uri) or lies_in(uri, trusted_by(listing, allow)):
        return uri
    return Fault("forbidden_url", printable(f"{reference} in {listing} leads to {place_of(uri)}: {ALLOWING}"))


def trusted_by(listing: str, allow: Sequence[str]) -> tuple[str, ...]:
    """The places that a listing may name, whatever they are."""
    return own_place(listing), *allow


def require_allowed(references: Sequence[str], listing: str, allow: Sequence[str]) -> None:
    """references: the first few of a listing; those that are no address are left to become rejects.

    Raises: InputError where none of the others may be named, with the setting that lets them.
    """
    addresses = [(given, at) for given in references if (at := _address(given.strip(), listing)) is not None]
    if not addresses or any(_is_allowed(given, listing, allow) for given, _ in addresses):
        return
    reference, address = addresses[0]
    place = printable(place_of(address))
    raise InputError(
        f"{printable(reference)} in {listing} leads to {place}, which an input may not name by itself",
        f"If that is meant, allow it: {allowing(place, allow)}",
    )


def _is_allowed(reference: str, listing: str, allow: Sequence[str]) -> bool:
    uri = resolve(reference, listing, allow)
    if isinstance(uri, Fault):
        return False
    return not is_web(uri) or lies_in(uri, trusted_by(listing, allow)) or not web.is_known_inside(uri)


def _address(reference: str, listing: str) -> str | None:
    """The one spelling of what a reference names, allowed or not; None where it names nothing, by a protocol that
    nothing here speaks, or a file system within another, whose address hides what it leads to."""
    if "\0" in reference or "::" in _IPV6_HOST.sub("", reference):
        return None
    is_path = "://" not in reference and not reference.startswith(("file:", "local:"))
    if not is_path:
        if is_local(reference):
            return whole_uri(reference)
        protocol = protocol_of(reference)
        return reference if is_web(reference) or protocol in known_implementations or protocol in registry else None
    if reference.startswith("/") or is_local(listing):
        return posixpath.join(posixpath.dirname(listing), reference)
    protocol, _, path = listing.partition("?")[0].partition("://")
    return f"{protocol}://{posixpath.normpath(posixpath.join(posixpath.dirname(path), reference))}"


def read_bounded(store: Store, uri: str, max_bytes: int, trusted: Sequence[str] = ()) -> bytes | Fault:
    """The bytes of an image, never more than max_bytes and one of them in memory.

    trusted: places of the web that need not be public.
    A web server that is gone is a fault of the URL: lists of URLs are full of them. Raises: StorageError where a
    disk or an object store fails or refuses, since it may well have the image; InputError where the client of
    a store is not installed or set up.
    """
    most_bytes = max_bytes + 1
    data = web.get(uri, store.options, most_bytes, trusted) if is_web(uri) else _stored(store, uri, most_bytes)
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
    return not is_bucket(uri) or bool(bucket and key)


def _is_of_the_name(error: BaseException | None) -> bool:
    """Whether no store, in whatever state, has such an object; botocore looks at names before it asks."""
    is_unusable = isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
    return is_unusable or type(error).__name__ == "ParamValidationError"


def fetch_image(sample: Sample, reference: str | None, listing: str, settings: ReadConfig, store: Store) -> Sample:
    """The sample with the image its row refers to, or with the reject that says why not."""
    if reference is None:
        return sample
    uri = resolve(reference, listing, settings.allow)
    trusted = trusted_by(listing, settings.allow)
    data = uri if isinstance(uri, Fault) else read_bounded(store, uri, settings.max_image_bytes, trusted)
    sample.has_image = True
    sample.uri = printable(reference) if isinstance(uri, Fault) else printable(uri)
    if isinstance(data, Fault):
        reject_image(sample, data)
    else:
        sample.image, sample.offset, sample.length = data, 0, len(data)
    return sample
