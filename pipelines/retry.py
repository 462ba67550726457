"""Storage calls, again where the fault is one that passes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential

from pipelines.errors import AccessError, StorageError

T = TypeVar("T")

# With the waits below, about half a minute in all, on top of what the clients themselves try.
ATTEMPTS = 8
# Of a store that takes connections and says nothing each attempt lasts more than a minute: after this, no more than
# LEAST_ATTEMPTS. What takes long because it is large gets as many, too.
PATIENCE_S, LEAST_ATTEMPTS = 60, 3
# For an object that was listed a moment ago, about two seconds.
LISTED_ATTEMPTS = 5

# An answer, not a fault: asking again gives the same.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_ERRNO = {errno.ENOSPC, errno.EROFS, errno.EINVAL, errno.EACCES, errno.ENAMETOOLONG}
_PASSING_STATUS = {408, 425, 429}
# Of what was sent and did not come whole, which s3fs tells as a call that is wrong.
_PASSING_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}
_CLIENTS = {"aiohttp", "botocore", "aiobotocore", "urllib3"}


def _is_of_storage(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS


def _fault(error: BaseException) -> BaseException:
    """fsspec tells whatever goes wrong while it looks up a web page as a file that is not there."""
    cause = error.__cause__
    hidden = isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp")
    return cause if hidden and cause else error


def _code(error: BaseException) -> str | None:
    """Of S3's answer; "400" where a HEAD was refused, whose answer has no body to say why."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code")) if isinstance(response, dict) else None


def _is_transient(error: BaseException) -> bool:
    error = _fault(error)
    if _code(error) in _PASSING_CODES:
        return True
    if isinstance(error, _FINAL) or (isinstance(error, OSError) and error.errno in _FINAL_ERRNO):
        return False
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS
    return _is_of_storage(error) and not refused


def retrying(call: Callable[[], T], what: str, listed: bool = False) -> T:
    """call(), again with backoff and jitter while the fault is one that passes.

    listed: the object is known to be there; a store that has yet to find it is asked again for a moment.
    Raises: StorageError naming `what` when it does not pass, AccessError (a PermissionError too) where
    storage refuses; other final answers (FileNotFoundError, …) as they are.
    """
    missed = 0

    def is_worth_another(error: BaseException) -> bool:
        nonlocal missed
        missed += isinstance(error, FileNotFoundError)
        return _is_transient(error) or (listed and 0 < missed < LISTED_ATTEMPTS)

    attempts = Retrying(
        retry=retry_if_exception(is_worth_another),
        stop=stop_after_attempt(ATTEMPTS) | (stop_after_delay(PATIENCE_S) & stop_after_attempt(LEAST_ATTEMPTS)),
        wait=wait_random_exponential(multiplier=0.3, max=20),
        reraise=True,
    )
    try:
        return attempts(call)
    except PermissionError as error:
        raise AccessError(
            f"{what}: access was refused: {error}", "Check the credentials and what they allow."
        ) from error
    except Exception as error:
        if _code(error) == "400":
            raise AccessError(
                f"{what}: access was refused without a reason (400), as S3 refuses credentials that have expired",
                "Check the credentials, the endpoint and the region.",
            ) from error
        is_answer = isinstance(error, _FINAL) and not _is_transient(error)
        if is_answer or not _is_of_storage(error):
            raise
        fault = _fault(error)
        raise StorageError(
            f"{what}: {type(fault).__name__}: {fault}",
            "Check that the storage is reachable and has room, then run the same command again.",
        ) from error
