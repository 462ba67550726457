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
from pipelines.prepare import Prepared, prepare
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
            print(json.dumps([run(cluster, **job) for job in jobs]))
        finally:
            ray.shutdown()
            cluster.shutdown()


def run(cluster: Any, recipe: dict[str, Any], kill: str | int | None) -> dict[str, Any]:
    prepared = prepare(validate(RunConfig, recipe), Resources(NODES * CPUS, 0, NODES, CPUS))
    kept: list[Any] = []
    build = pipelines.embed.pipeline
    pipelines.embed.pipeline = lambda *args: kept.append(build(*args)) or kept[-1]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pipelines.embed.embed, prepared)
        # Here, since Ray starts nodes from the main thread only.
        done = kill_nodes(cluster, prepared, kill, running)
        report = running.result()
    pipelines.embed.pipeline = build
    nodes = nodes_used(kept[0]._write_ds.stats())
    return {"items": report["encoders"]["clip"]["items"], "done": done, "nodes": nodes}


def kill_nodes(cluster: Any, prepared: Prepared, kill: str | int | None, running: Future[Any]) -> list[int]:
    """How many shards were done each time that a node was dead."""
    if isinstance(kill, int):
        return list(kill_at_random(cluster, prepared, random.Random(kill), running))
    return [kill_node(cluster, prepared.store, kill, running)] if kill else []


def kill_node(cluster: Any, store: Store, title: str, running: Future[Any]) -> int:
    wait_for(1, store, running)
    raylet = raylet_of(title)
    (node,) = (node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == raylet)
    cluster.remove_node(node, allow_graceful=False)
    return commits(store)


def kill_at_random(cluster: Any, prepared: Prepared, moments: random.Random, running: Future[Any]) -> Iterator[int]:
    """Any node but the head, on which the driver is; another takes its place. By what is done, not by the clock: most
    of a run's time is its start."""
    # The first early, so that the run is not over by then.
    early = moments.randrange(len(prepared.plan.shards) // 3)
    late = moments.sample(range(early + 1, len(prepared.plan.shards)), KILLS - 1)
    for shards in [early, *sorted(late)]:
        wait_for(shards, prepared.store, running)
        if ends_within(moments.uniform(0, 0.3), running):
            return
        cluster.remove_node(moments.choice([*cluster.worker_nodes]), allow_graceful=False)
        yield commits(prepared.store)
        cluster.add_node(**NODE)


def wait_for(shards: int, store: Store, running: Future[Any]) -> None:
    """Until so many are done, or the run is."""
    while commits(store) < shards and not ends_within(0.02, running):
        pass


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
