"""Uploads that were begun, of a store that has no listing of them."""

from __future__ import annotations

from aiohttp import web

from tests.s3_proxy import S3Proxy
from tests.unit.test_storage_faults import Refusals, behind, proxy

__all__ = ["proxy"]


class Unknown(web.HTTPNotImplemented):
    def __init__(self) -> None:
        told = "<Error><Code>NotImplemented</Code><Message>It knows no such thing</Message></Error>"
        super().__init__(text=told, content_type="application/xml")


def test_a_store_that_lists_none_has_none(proxy: S3Proxy) -> None:
    store = behind(proxy)
    proxy.trap = Refusals("GET", "/bucket", Unknown, 9)
    assert store.uploads(["index"]) == [] and proxy.trap.seen == 1
