"""Credentials in text: what is masked, and what is not."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines import secrets
from pipelines.contracts import Reject
from pipelines.errors import AccessError, InputError
from pipelines.secrets import masked, masked_values, remember, without_credentials
from pipelines.storage import Store

SECRET = "planted/7f3a+c"


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setattr(secrets, "_known_pattern", None)
    yield


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pass@host/x.jpg is gone", "https://***@host/x.jpg is gone"),
        ("https://token@host/x", "https://***@host/x"),
        ("sftp://u:p@ss@host/x", "sftp://***@host/x"),
        ("http://u:p/w@h/x and http://u:1/2/w@h/x", "http://***@h/x and http://u:1/2/w@h/x"),
        ("http://h:8080/a@b/x http://[::1]:80/a@b", "http://h:8080/a@b/x http://[::1]:80/a@b"),
        ("zip://a::s3://b/x@y, az://container@account/x", "zip://a::s3://b/x@y, az://container@account/x"),
        ("https://h/x?password=a)b&w=3", "https://h/x?password=***&w=3"),
        ("Authorization: abc", "Authorization: ***"),
        ("x-amz-security-token: FwoG/abc=, x-own: 1", "x-amz-security-token: ***, x-own: 1"),
        ("{'X-Amz-Security-Token': 'FwoG/abc='}", "{'X-Amz-Security-Token': '***'}"),
        ("AccountName=n;AccountKey=abc/d==;EndpointSuffix=e", "AccountName=n;AccountKey=***;EndpointSuffix=e"),
        ("Authorization: AWS4-HMAC-SHA256 Credential=AK/2, SignedHeaders=host, Signature=ab\nnext",
         "Authorization: AWS4-HMAC-SHA256 ***\nnext"),
        ("{'authorization': 'AWS4-HMAC-SHA256 Credential=A, Signature=b', 'n': 1}",
         "{'authorization': 'AWS4-HMAC-SHA256 ***', 'n': 1}"),
        ("https://h/x?X-Amz-Signature=abc&w=3", "https://h/x?X-Amz-Signature=***&w=3"),
        ("https://h/x?w=3&x-amz-security-token=abc)", "https://h/x?w=3&x-amz-security-token=***)"),
        ("https://h/x?X-Amz-Credential=AK%2F2&X-Amz-Date=1", "https://h/x?X-Amz-Credential=***&X-Amz-Date=1"),
        ("https://h/x?AWSAccessKeyId=A&Signature=b&Expires=3", "https://h/x?AWSAccessKeyId=***&Signature=***&Expires=3"),
        ("https://h/x?sv=1&se=2026&sig=abc%3D", "https://h/x?sv=1&se=***&sig=***"),
        ("url='https://h/x?token=abc', status", "url='https://h/x?token=***', status"),
        ("https://h/?to=https%3A%2F%2Fg%3Faccess_token%3Dabc", "https://h/?to=https%3A%2F%2Fg%3Faccess_token%3D***"),
        ("https://h/x?api_key=a&apikey=b&key=c&password=d&secret=e",
         "https://h/x?api_key=***&apikey=***&key=***&password=***&secret=***"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("s3://bucket/a@b/c.tar and https://h/x?width=3#key", "s3://bucket/a@b/c.tar and https://h/x?width=3#key"),
        ("hf:org/model@revision, encode.index_key=3", "hf:org/model@revision, encode.index_key=3"),
    ],
)  # fmt: skip
def test_what_urls_carry_is_masked(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert masked(expected) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"s3": {"secret": SECRET}},
        {"s3": {"key": SECRET}},
        {"gs": {"token": {"private_key": SECRET}}},
        {"abfs": {"connection_string": SECRET}},
        {"abfs": {"connection_string": f"AccountName=planted;AccountKey={SECRET};EndpointSuffix=core"}},
        {"http": {"client_kwargs": {"auth": ["user", SECRET]}}},
        {"http": {"client_kwargs": {"headers": {"X-Own": SECRET}}}},
    ],
)
def test_what_the_storage_settings_hold_is_masked_in_every_spelling(options: dict[str, Any]) -> None:
    remember(options)
    for spelling in (SECRET, "planted%2F7f3a%2Bc", "planted/7f3a%2Bc"):
        assert masked(f"Cannot open {spelling}!") == "Cannot open ***!"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("https://u:p@h/x.tar", "https://***@h/x.tar"),
        ("az://container@account/x", "az://container@account/x"),
        ("https://h/x?key=train&code=7&policy=a&se=b", "https://h/x?key=train&code=7&policy=a&se=b"),
        ("https://h/x?tokenizer=a&signed=b", "https://h/x?tokenizer=a&signed=b"),
        ("https://h/x?token=abc&n=1", "https://h/x?token=***&n=1"),
        ("https://h/x?sv=1&se=2026&sig=abc%3D", "https://h/x?sv=1&se=***&sig=***"),
        ("https://h/x?AWSAccessKeyId=A&Signature=b&Expires=3&key=c",
         "https://h/x?AWSAccessKeyId=***&Signature=***&Expires=***&key=***"),
        ("https://h/x?X-Amz-Date=1&X-Amz-Signature=c&w=3", "https://h/x?X-Amz-Date=***&X-Amz-Signature=***&w=3"),
    ],
)  # fmt: skip
def test_a_uri_is_known_again_whatever_signs_it(uri: str, expected: str) -> None:
    remember({"s3": {"secret": "container@account", "key": "tokenizer"}})
    assert without_credentials(uri) == expected
    assert without_credentials(expected) == expected


@pytest.mark.parametrize("piece", ["://a:b/", "x-", "?token=", "x-amz-token: ", "://a@", "authorization: ", "&sig=)"])
def test_a_long_text_takes_no_time_of_its_square(piece: str) -> None:
    begun = time.process_time()
    masked(piece * 50_000)
    without_credentials(piece * 50_000)
    assert time.process_time() - begun < 3


@pytest.mark.timeout(60)
def test_a_long_name_of_secrets_names_does_not_hang() -> None:
    name = "token" * 50_000
    assert masked(f"https://a.org/?{name}=abc") == f"https://a.org/?{name}=***"
    assert masked(f"https://a.org/?{name}") == f"https://a.org/?{name}"


def test_no_one_meets_a_known_secret_that_is_not_yet_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread remembers, another may ask: the pattern is there before the secret is known."""

    def fail(*_: object) -> None:
        raise RuntimeError("in between")

    with monkeypatch.context() as patched:
        patched.setattr(secrets.re, "compile", fail)
        with pytest.raises(RuntimeError):
            remember({"s3": {"secret": SECRET}})
    remember({"s3": {"secret": SECRET}})
    assert masked(SECRET) == "***"


def test_what_is_no_credential_stays() -> None:
    headers = {"User-Agent": "vecmill/1.0", "Accept": "image/*"}
    remember({"s3": {"endpoint_url": "http://localhost:9000", "key": "ab"}, "http": {"headers": headers}})
    text = "http://localhost:9000 ab vecmill/1.0 image/*"
    assert masked(text) == text


def test_a_store_remembers_the_credentials_it_is_used_with() -> None:
    Store("memory:///x", {"s3": {"secret": SECRET}}).exists("y")
    assert SECRET not in str(InputError(f"{SECRET} is wrong", f"Change {SECRET}."))


def test_errors_and_rejects_are_masked_wherever_they_go() -> None:
    remember({"s3": {"secret": SECRET}})
    error = AccessError(f"Cannot read https://u:p@h/x: {SECRET}", f"Check {SECRET}.")
    shown = [str(error), repr(error), error.what, error.fix, str(pickle.loads(pickle.dumps(error)))]
    assert shown[0] == "Cannot read https://***@h/x: ***\n  Check ***."
    assert not [text for text in shown if SECRET in text or "u:p" in text]
    assert Reject("image", "read", "fetch_failed", f"https://h/x?sig={SECRET}").detail == "https://h/x?sig=***"


def test_values_are_masked_however_deep() -> None:
    settings = {"input": ["https://u:p@h/x"], "index": {"index_key": "Flat"}, "n": 3, "none": None}
    assert masked_values(settings) == {**settings, "input": ["https://***@h/x"]}
    assert masked_values({"a": [{"secret": "x", "b": 1}]}, by_name=True) == {"a": [{"secret": "***", "b": 1}]}
