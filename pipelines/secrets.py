"""Credentials out of text for people: what URLs carry, and what the storage settings hold.

Data stays as it is: the `uri` of a sample is what its input named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "***"

# Shorter ones are words that stand in every other message; no key that a service gives out is that short.
LEAST_CHARS = 6

_SECRET = r"secret|token|passw|pwd|passphrase|credential|signature|authorization|api[_-]?key|access[_-]?key|private"
# Looked ahead for, and taken without a way back: a long word of secrets' names would take its length squared.
_QUERY = rf"(?=[\w.-]*(?:{_SECRET}))[\w.-]++|sig|se|key|auth|jwt|code|policy|key-pair-id"
# In `abfs://container@account` it is a place that stands before the sign. Last, a password with a slash in it: what
# stands behind the colon is no port.
_USERINFO = re.compile(
    r"(?<!\baz)(?<!\babfs)(?<!\babfss)(?<!\bwasb)(?<!\bwasbs)://"
    r"(?:[^/?#\s\"'<>]+@|[^/?#\s\"'<>@:\[]+:(?!\d{0,5}/|:)[^/?#\s\"'<>@]{0,256}/[^?#\s\"'<>@]{0,256}@)",
    re.IGNORECASE,
)
# A bracket at the end is the text's own, and one within the value is the value's.
_VALUE = r"[^&#;\s\"'<>]*[^&#;\s\"'<>)\]}]"
_PARAMETER = re.compile(rf"([?&;]|%3F|%26)({_QUERY})(=|%3D)({_VALUE})", re.IGNORECASE)
_ACCOUNT = re.compile(r"\b(AccountKey|SharedAccessKey|SharedAccessSignature)=[^;\s\"'<>]+", re.IGNORECASE)
_SCHEME = re.compile(r"(authorization[^\w*]{1,4}(?:AWS4-[\w-]+|digest) )[^\r\n'}]+", re.IGNORECASE)
_HEADER = re.compile(
    r"(authorization[^\w*]{1,4}+(?:bearer |basic |token )?|\bx-[\w-]{0,40}(?:token|key)['\"]?: *['\"]?)"
    r"(?!(?:AWS4-[\w-]+|digest) )[^\s'\",}]+",
    re.IGNORECASE,
)

# Of a URL that is to be known again: the names of what is signed with, whole.
_SIGNED = (
    r"x-(?:amz|goog)-[\w-]+|sig|auth|jwt|[\w.-]*(?:signature|token|secret|passwd|password|pwd|passphrase|credential"
    r"|authorization|api[_-]?key|access[_-]?key(?:[_-]?id)?|private[_-]?key)"
)
_SIGNATURE = re.compile(r"[?&;](?:sig|[\w.-]*signature)=", re.IGNORECASE)
_SIGNED_PARAMETER = re.compile(rf"([?&;])({_SIGNED})=([^&#;]+)", re.IGNORECASE)
_BESIDE_A_SIGNATURE = re.compile(r"([?&;])(se|key|code|policy|expires|key-pair-id)=([^&#;]+)", re.IGNORECASE)

_SETTING = re.compile(rf"{_SECRET}|connection_string|\bsas|auth|cookie|key$", re.IGNORECASE)
_PLAIN_HEADERS = frozenset(("accept", "accept-encoding", "accept-language", "from", "referer", "user-agent"))

_known: set[str] = set()
_known_pattern: re.Pattern[str] | None = None


def masked(text: str) -> str:
    """The text without the credentials of its URLs and without those that were remembered."""
    text = _without_what_urls_carry(text)
    return _known_pattern.sub(MASK, text) if _known_pattern else text


def carries_credentials(url: str) -> bool:
    """Whether a URL has a password or a signature in it."""
    return _without_what_urls_carry(url) != url


def _without_what_urls_carry(text: str) -> str:
    text = _USERINFO.sub(f"://{MASK}@", text)
    text = _PARAMETER.sub(rf"\1\2\3{MASK}", text)
    text = _ACCOUNT.sub(rf"\1={MASK}", text)
    text = _SCHEME.sub(rf"\1{MASK}", text)
    return _HEADER.sub(rf"\1{MASK}", text)


def without_credentials(uri: str) -> str:
    """The URI with what it is signed with hidden: the same in every process and for every signature.

    Unlike `masked`, it knows nothing but the URI, and leaves parameters that only may be secrets, such as `key`: two
    objects keep two names.
    """
    uri = _USERINFO.sub(f"://{MASK}@", uri)
    if _SIGNATURE.search(uri):
        uri = _BESIDE_A_SIGNATURE.sub(rf"\1\2={MASK}", uri)
    return _SIGNED_PARAMETER.sub(rf"\1\2={MASK}", uri)


def masked_values(value: Any, by_name: bool = False) -> Any:
    """A JSON value with every text in it masked. by_name: and hidden whole where its key is a secret's."""
    if isinstance(value, Mapping):
        return {
            key: MASK if by_name and is_secret(str(key)) else masked_values(item, by_name)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [masked_values(item, by_name) for item in value]
    return masked(value) if isinstance(value, str) else value


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a credential."""
    return bool(_SETTING.search(name))


def public_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The headers that any host may see."""
    return {name: value for name, value in headers.items() if name.lower() in _PLAIN_HEADERS}


def remember(options: Mapping[str, Any]) -> None:
    """`masked` hides, from now on and in this process, the credentials among these file system options."""
    global _known, _known_pattern
    found = {form for secret in _secrets(options) for form in _forms(secret) if len(form) >= LEAST_CHARS}
    if found <= _known:
        return
    union = _known | found
    longest_first = sorted(union, key=lambda form: (-len(form), form))
    # The pattern first: whoever finds a secret among the known may rely on its being hidden.
    _known_pattern = re.compile("|".join(map(re.escape, longest_first)))
    _known = union


def _secrets(value: Any, hidden: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if str(name).lower() == "headers" and isinstance(item, Mapping):
                plain = public_headers(item)
                yield from _secrets([item[header] for header in item if header not in plain], True)
            else:
                yield from _secrets(item, hidden or is_secret(str(name)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _secrets(item, hidden)
    elif hidden and isinstance(value, str):
        yield value
        yield from _secrets_of_connection(value)


def _secrets_of_connection(text: str) -> Iterator[str]:
    """Of `AccountName=…;AccountKey=…`."""
    for part in text.split(";"):
        name, _, value = part.partition("=")
        if value and is_secret(name.strip()):
            yield value.strip()


def _forms(secret: str) -> set[str]:
    """As it is, and as URLs and Python's own quotes have it."""
    return {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1]}
