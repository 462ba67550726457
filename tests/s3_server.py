"""moto's S3 server on loopback, made atomic where S3 is: it checks `If-None-Match` and then puts, in many threads,
so that two of sixteen writers at once may both win."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server


class OnePutAtATime:
    """A WSGI application around another."""

    def __init__(self, app: Any) -> None:
        self._app, self._lock = app, threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        with self._lock if environ["REQUEST_METHOD"] == "PUT" else nullcontext():
            return self._app(environ, start_response)


@contextmanager
def s3_server() -> Iterator[str]:
    """Yields its URL; any key and secret are taken."""
    app = OnePutAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
