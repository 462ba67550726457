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
_QUERY = rf"[\w.-]*(?:{_SECRET})[\w.-]*|sig|se|key|auth|jwt|code|policy|key-pair-id"
# In `abfs://container@account` it is a place that stands before the sign.
_USERINFO = re.compile(r"(?<!\babfs)(?<!\babfss)(?<!\bwasb)(?<!\bwasbs)://[^/?#\s\"'<>]+@", re.IGNORECASE)
_PARAMETER = re.compile(rf"([?&;]|%3F|%26)({_QUERY})(=|%3D)([^&#;\s\"'<>)\]}}]+)", re.IGNORECASE)
_HEADER = re.compile(r"(authorization\W{1,4}(?:bearer |basic |token )?)[^\s'\",}]+", re.IGNORECASE)

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
    return _HEADER.sub(rf"\1{MASK}", text)


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


def without_credentials(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The headers that any host may see."""
    return {name: value for name, value in headers.items() if name.lower() in _PLAIN_HEADERS}


def remember(options: Mapping[str, Any]) -> None:
    """`masked` hides, from now on and in this process, the credentials among these file system options."""
    global _known_pattern
    found = {form for secret in _secrets(options) for form in _forms(secret) if len(form) >= LEAST_CHARS}
    if found <= _known:
        return
    _known.update(found)
    longest_first = sorted(_known, key=lambda form: (-len(form), form))
    _known_pattern = re.compile("|".join(map(re.escape, longest_first)))


def _secrets(value: Any, hidden: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if str(name).lower() == "headers" and isinstance(item, Mapping):
                plain = without_credentials(item)
                yield from _secrets([item[header] for header in item if header not in plain], True)
            else:
                yield from _secrets(item, hidden or is_secret(str(name)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _secrets(item, hidden)
    elif hidden and isinstance(value, str):
        yield value


def _forms(secret: str) -> set[str]:
    """As it is, and as URLs and Python's own quotes have it."""
    return {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1]}
