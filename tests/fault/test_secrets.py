"""A secret that is planted wherever credentials may stand is in nothing that the job says or writes down for people.

What is data stays: the `uri` of a sample, and with it `samples/` and the fragments in `staging/`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
import s3fs

import jobs.status
from jobs.cli import main
from pipelines.scenes import write_shards
from pipelines.storage import Store
from tests.flow.command import TIMEOUT_S, vecmill
from tests.flow.outputs import read_part
from tests.flow.runs import settings, write_recipe
from tests.s3_proxy import S3Proxy

pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)

PLANTED = "planted7f3a"
QUERY = f"X-Amz-Signature={PLANTED}query&sig={PLANTED}sas"
DATA = ("samples/", "staging/")


# -- a web server that wants to know who asks ----------------------------------------------------


@dataclass(frozen=True)
class Site:
    """The files it serves. One that is refused has a size, and no bytes for anyone."""

    url: str
    files: dict[str, bytes]

    def named(self, name: str) -> str:
        return f"{self.url.replace('://', f'://user:{PLANTED}password@')}/{name}?{QUERY}"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            name = self.path.strip("/").partition("?")[0]
            data = files.get(name)
            refused = data is None or (with_body and name.startswith("refused"))
            self.send_response(404 if name.startswith("gone") else 403 if refused else 200)
            self.send_header("Content-Length", str(0 if refused else len(data or b"")))
            self.end_headers()
            if with_body and not refused:
                self.wfile.write(data or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield Site(f"http://127.0.0.1:{server.server_port}", files)
    server.shutdown()
    server.server_close()
    thread.join()


# -- runs, well and in failing ways --------------------------------------------------------------


@dataclass
class Job:
    folder: Path
    site: Site
    storage: dict[str, Any]
    checkpoint: Path
    address: str

    def recipe(self, name: str, inputs: list[str], **more: Any) -> str:
        given = {**settings(inputs, f"s3://planting/{name}", self.checkpoint, storage=self.storage), **more}
        return write_recipe(self.folder / f"{name}.yaml", given)

    @property
    def store(self) -> Store:
        return Store("s3://planting", self.storage)


@pytest.fixture(scope="module")
def job(
    site: Site, object_store: str, checkpoint: Path, ray_local: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("secrets")
    with S3Proxy(object_store) as proxy:
        who = {"key": f"{PLANTED}key", "secret": f"{PLANTED}/secret+", "token": f"{PLANTED}token"}
        yield Job(folder, site, {"s3": {**who, "endpoint_url": proxy.url}}, checkpoint, ray_local)


def filled(job: Job) -> list[str]:
    """A tar in the bucket, one on the web, and a manifest of images there that are good, gone, refused or forbidden."""
    s3fs.S3FileSystem(**job.storage["s3"]).mkdir("planting")
    first, second = write_shards(job.folder / "shards", 20, 2)
    job.store.put_atomic("in/scenes.tar", first)
    job.site.files.update(
        {"good.tar": second.read_bytes(), "refused.tar": second.read_bytes(), "cut.jpg": b"\xff\xd8\xff"}
    )
    images = [job.site.named(name) for name in ("cut.jpg", "gone.jpg", "forbidden.jpg")]
    images += [f"http://user:{PLANTED}@169.254.169.254/x.jpg?{QUERY}", f"s3://other/x.jpg?{QUERY}"]
    rows = [{"key": f"row {at}", "image": image, "caption": "a dog"} for at, image in enumerate(images)]
    job.store.put_atomic("in/photos.jsonl", "\n".join(map(json.dumps, rows)).encode())
    return ["s3://planting/in/scenes.tar", "s3://planting/in/photos.jsonl", job.site.named("good.tar")]


def well(job: Job) -> Iterator[str]:
    recipe = job.recipe("well", filled(job), read={"rows_per_block": 10, "allow": [job.site.url]})
    address = ("--address", job.address)
    yield vecmill("plan", recipe, *address)
    yield vecmill("embed", recipe, *address)
    yield vecmill("status", recipe)
    yield vecmill("index", recipe, "--index-key", "Flat", *address)
    yield vecmill("search", recipe, "--text", "a circle", "-k", "20")


def badly(job: Job) -> Iterator[str]:
    address = ("--address", job.address)
    refused = job.recipe("badly", [job.site.named("refused.tar")])
    yield vecmill("embed", refused, *address, status=1)
    yield vecmill("plan", job.recipe("gone", [job.site.named("gone.tar")]), *address, status=2)
    elsewhere = {"s3": {**job.storage["s3"], "endpoint_url": job.site.url}}
    yield vecmill("status", job.recipe("elsewhere", ["s3://planting/in/*.tar"], storage=elsewhere), status=2)
    nowhere = {"s3": {**job.storage["s3"], "endpoint_url": f"http://user:{PLANTED}@no where"}}
    yield vecmill("status", job.recipe("nowhere", ["s3://planting/in/*.tar"], storage=nowhere), status=1)
    yield vecmill("plan", job.recipe("typo", ["x.tar"], storge=job.storage), status=2)
    yield vecmill("plan", job.recipe("shape", ["x.tar"], storage={"s3": f"{PLANTED}key"}), status=2)
    yield vecmill("plan", refused, "--set", f"storage.s3.secret.of={PLANTED}", status=2)
    yield vecmill("plan", refused, "--set", f"storage.s3.secret=[{PLANTED}", status=2)
    yield vecmill("plan", refused, "--set", f"storage.s3.secret:{PLANTED}", status=2)
    yield vecmill("search", str(job.folder / "well.yaml"), "--image", job.site.named("gone.jpg"), "--exact", status=2)


def written(store: Store) -> Iterator[tuple[str, str]]:
    """Names of the objects of an output, and those that are text, or rejects, as text."""
    for name in store.names(""):
        yield name, name
        if name.endswith(".json"):
            yield name, store.read(name).decode()
        elif "/rejects/" in name and name.endswith(".parquet"):
            yield name, str(read_part(store, name).to_pylist())


def logs() -> Iterator[tuple[str, str]]:
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path), path.read_text(errors="replace")


def tracebacks(folder: Path) -> list[tuple[str, str]]:
    return [(str(path), path.read_text()) for path in folder.glob("vecmill-*.log")]


def test_a_planted_secret_is_nowhere_to_be_read(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    said = [*well(job), *badly(job)]
    told = [(f"printed {at}", text) for at, text in enumerate(said)]
    told += [pair for pair in written(job.store) if not pair[0].partition("/")[2].startswith(DATA)]
    told += [*logs(), *tracebacks(tmp_path)]
    leaks = [f"{name}: …{text[max(0, text.find(PLANTED) - 200) :][:400]}" for name, text in told if PLANTED in text]
    assert leaks == [], "\n\n".join(leaks)
    names = {name for name, _ in told}
    assert {"well/run.json"} < names and all(any(part in name for name in names) for part in ("/reports/", "/rejects/"))
    reasons = str([text for name, text in told if "/rejects/" in name])
    for reason in ("truncated_image", "not_found", "fetch_failed", "forbidden_url"):
        assert reason in reasons
    assert len(tracebacks(tmp_path)) == 1
    assert "3 done, 0 pending" in said[2]
    assert "***@127.0.0.1" in reasons and "X-Amz-Signature=***" in reasons


def test_an_unexpected_failure_tells_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = f"{PLANTED}/unexpected"
    Store("memory:///x", {"memory": {"token": secret}}).exists("y")

    def fail(*_: object) -> None:
        try:
            raise ValueError(f"https://user:{PLANTED}@host/x?{QUERY} with {secret}")
        except ValueError as error:
            raise RuntimeError(f"of all things: {secret}") from error

    monkeypatch.setattr(jobs.status, "named_output", fail)
    monkeypatch.setattr(sys, "argv", ["vecmill", "status", "out"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit):
        main()
    ((_, text),) = tracebacks(tmp_path)
    assert "RuntimeError: of all things: ***" in text and "https://***@host/x?X-Amz-Signature=***" in text
    assert PLANTED not in text + "".join(capfd.readouterr())
