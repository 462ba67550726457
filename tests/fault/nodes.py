"""Runs on a cluster of several nodes on this machine, one after the other; in a process of its own.

`python -m tests.fault.nodes JOBS.json`: a list of {"recipe": {…}, "kill": TITLE, SEED or null}. With a title, the
node that holds the process whose Ray title contains it is killed after the first commit; with a seed, nodes drawn at
random are killed at random moments, and each is replaced.
Prints, for each, {"items": …, "done": shards done at each kill, "nodes": {operator: nodes that worked on it}}.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

import pipelines.embed
from pipelines.config import RunConfig, validate
from pipelines.prepare import Cluster as Resources
from pipelines.prepare import prepare
from pipelines.storage import Store

NODES, CPUS = 3, 2
NODE: dict[str, Any] = {"num_cpus": CPUS, "object_store_memory": 150 * 2**20}
KILLS = 3
"""Of one run at most, at random moments."""


def main(jobs: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory(prefix="vm", ignore_cleanup_errors=True) as folder:
        head = {"num_cpus": 0, "object_store_memory": 150 * 2**20, "temp_dir": folder, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(NODES):
            cluster.add_node(**NODE)
        ray.init(cluster.address, log_to_driver=False)
        try:
            print(json.dumps(run_all(cluster, jobs)))
        finally:
            ray.shutdown()
            cluster.shutdown()


def run_all(cluster: Any, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One after the other; random moments are drawn from as long as the first took."""
    ended, span_s = [], 0.0
    for job in jobs:
        began = time.monotonic()
        ended.append(run(cluster, span_s=span_s, **job))
        span_s = span_s or time.monotonic() - began
    return ended


def run(cluster: Any, recipe: dict[str, Any], kill: str | int | None, span_s: float) -> dict[str, Any]:
    prepared = prepare(validate(RunConfig, recipe), Resources(NODES * CPUS, 0, NODES, CPUS))
    kept: list[Any] = []
    build = pipelines.embed.pipeline
    pipelines.embed.pipeline = lambda *args: kept.append(build(*args)) or kept[-1]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pipelines.embed.embed, prepared)
        # Here, since Ray starts nodes from the main thread only.
        done = kill_nodes(cluster, prepared.store, kill, span_s, running)
        report = running.result()
    pipelines.embed.pipeline = build
    nodes = nodes_used(kept[0]._write_ds.stats())
    return {"items": report["encoders"]["clip"]["items"], "done": done, "nodes": nodes}


def kill_nodes(cluster: Any, store: Store, kill: str | int | None, span_s: float, running: Future[Any]) -> list[int]:
    """How many shards were done each time that a node was dead."""
    if isinstance(kill, int):
        return list(kill_at_random(cluster, store, random.Random(kill), span_s, running))
    return [kill_node(cluster, store, kill, running)] if kill else []


def kill_node(cluster: Any, store: Store, title: str, running: Future[Any]) -> int:
    while not commits(store) and not ends_within(0.02, running):
        pass
    raylet = raylet_of(title)
    (node,) = (node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == raylet)
    cluster.remove_node(node, allow_graceful=False)
    return commits(store)


def kill_at_random(
    cluster: Any, store: Store, moments: random.Random, span_s: float, running: Future[Any]
) -> Iterator[int]:
    """Any node but the head, on which the driver is; another takes its place."""
    for _ in range(KILLS):
        if ends_within(moments.uniform(0, span_s / 2), running):
            return
        cluster.remove_node(moments.choice([*cluster.worker_nodes]), allow_graceful=False)
        yield commits(store)
        cluster.add_node(**NODE)


def ends_within(seconds: float, running: Future[Any]) -> bool:
    return bool(wait([running], seconds).done)


def commits(store: Store) -> int:
    return len(store.names("commits/clip"))


def raylet_of(title: str) -> int:
    """The one that started the process of this session whose title contains `title`."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                return process.ppid()
    raise LookupError(title)


def nodes_used(stats: str) -> dict[str, int]:
    """By operator, from Ray Data's own account of a run."""
    pattern = r"^Operator \d+ ([^:]+):.*?Tasks per node:[^\n]*?(\d+) nodes used"
    return {name: int(count) for name, count in re.findall(pattern, stats, re.MULTILINE | re.DOTALL)}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
