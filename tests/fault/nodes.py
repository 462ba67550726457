"""Runs on a cluster of several nodes on this machine, one after the other; in a process of its own.

`python -m tests.fault.nodes JOBS.json`: a list of {"recipe": {…}, "kill": TITLE or null}. With a title, the
node that holds the process whose Ray title contains it is killed after the first commit.
Prints, for each, {"items": …, "done": shards done by then, "nodes": {operator: nodes that worked on it}}.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
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


def run(cluster: Any, recipe: dict[str, Any], kill: str | None) -> dict[str, Any]:
    prepared = prepare(validate(RunConfig, recipe), Resources(NODES * CPUS, 0, NODES, CPUS))
    kept: list[Any] = []
    build = pipelines.embed.pipeline
    pipelines.embed.pipeline = lambda *args: kept.append(build(*args)) or kept[-1]
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_node, cluster, prepared.store, kill, ended) if kill else None
        try:
            report = pipelines.embed.embed(prepared)
        finally:
            ended.set()
    pipelines.embed.pipeline = build
    done = killer.result() if killer else None
    return {"items": report["encoders"]["clip"]["items"], "done": done, "nodes": nodes_used(kept[0]._write_ds.stats())}


def kill_node(cluster: Any, store: Store, title: str, ended: threading.Event) -> int:
    """How many shards were done when the node was dead."""
    while not commits(store) and not ended.wait(0.02):
        pass
    raylet = raylet_of(title)
    (node,) = (node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == raylet)
    cluster.remove_node(node, allow_graceful=False)
    return commits(store)


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
