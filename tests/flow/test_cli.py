"""Mistakes that show only once a cluster is there, and what the verbs say about an output."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from jobs.signals import received, stoppable
from pipelines.scenes import write_shards
from tests.flow.command import vecmill

NO_ENCODER = "open_clip:local-dir:/no/such/folder"


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """In `shards` of the working folder, which is new."""
    monkeypatch.chdir(tmp_path)
    return write_shards(Path("shards"), samples=20, shards=2, broken=0)


def embedding(
    checkpoint: Path, address: str, input: str = "shards", output: str = "out", encoder: str | None = None
) -> list[str]:
    return [
        input,
        "--encoder",
        encoder or f"open_clip:local-dir:{checkpoint}",
        "--output",
        output,
        "--name",
        "clip",
        "--address",
        address,
    ]


@pytest.mark.usefixtures("shards")
def test_a_mistake_is_one_message_without_a_traceback(checkpoint: Path, ray_local: str) -> None:
    right = embedding(checkpoint, ray_local)
    mistakes = {
        "none/*.tar matches nothing": ["plan", *embedding(checkpoint, ray_local, "none/*.tar")],
        "4 of 6 input objects do not exist": [
            "plan",
            *embedding(checkpoint, ray_local, "shards/scenes-{00000..00005}.tar"),
        ],
        "encoder = clap:x: no encoder of that form": ["plan", *embedding(checkpoint, ray_local, encoder="clap:x")],
        "/no/such/folder is no folder here": ["plan", *embedding(checkpoint, ray_local, encoder=NO_ENCODER)],
        "9 actors of 1 CPUs": ["plan", *right, "--set", "encode.actors=9"],
        "1 actors of 1 GPUs need 1; the cluster has 0": ["embed", *right, "--set", "encode.gpus_per_actor=1"],
        "memory://x cannot be an output": ["embed", *embedding(checkpoint, ray_local, output="memory://x")],
        "Cannot connect to Ray at 127.0.0.1:1": ["plan", *right, "--address", "127.0.0.1:1"],
    }
    for told, words in mistakes.items():
        printed = vecmill(*words, status=2)
        assert told in printed and "Traceback" not in printed, printed
        assert printed.count("vecmill: ") == 1
    assert not Path("out").exists()


def test_an_output_tells_of_itself_from_any_folder(
    shards: list[Path], checkpoint: Path, ray_local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = embedding(checkpoint, ray_local)
    assert "2 shards embedded, 0 were done before" in vecmill("embed", *command)
    assert "pending      0 (0 B)" in vecmill("plan", *command)
    assert "normalize: True → False" in vecmill("plan", *command, "--set", "encode.normalize=false", status=2)

    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    (facts,) = json.loads(vecmill("status", "../out", "--json")).values()
    assert (facts["done"], facts["pending"], facts["items"]["image"]["embedded"]) == (2, 0, 20)
    assert "Run `vecmill index` first" in vecmill("search", "../out", "--text", "a circle", status=1)
    told = vecmill("search", "../out", "--image", "none.jpg", "--exact", status=2)
    assert "The query image none.jpg cannot be read" in told and "Traceback" not in told

    shards = [Path("..", path) for path in shards]
    shards[1].unlink()
    assert "2 done, 0 pending" not in vecmill("status", "../out")
    shards[0].unlink()
    printed = vecmill("status", "../out")
    assert "2 done, unknown pending" in printed and "20 embedded" in printed


def test_a_vanished_shard_is_kept_until_it_is_pruned(shards: list[Path], checkpoint: Path, ray_local: str) -> None:
    command = embedding(checkpoint, ray_local)
    vecmill("embed", *command)
    shards[1].unlink()
    assert "1 shards of the output are not in this input: they are kept; --prune removes them" in vecmill(
        "embed", *command
    )
    assert parts("out") == ["image", "image", "samples", "samples", "text", "text"]
    assert "not in this input: they are removed" in vecmill("embed", *command, "--prune")
    assert parts("out") == ["image", "samples", "text"]
    assert "1 done, 0 pending" in vecmill("status", "out")


def parts(output: str) -> list[str]:
    """The folder of each part."""
    return sorted(path.parent.name for path in Path(output).rglob("part-*.parquet"))


@pytest.mark.usefixtures("ray_local")
def test_a_signal_ends_a_call_of_rays_that_waits() -> None:
    waiting = ray.remote(num_cpus=0)(lambda: time.sleep(600)).remote()
    signalled = threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM))
    with stoppable(), pytest.raises(KeyboardInterrupt):
        signalled.start()
        ray.get(waiting, timeout=60)
    assert received() == signal.SIGTERM
    ray.cancel(waiting, force=True)
