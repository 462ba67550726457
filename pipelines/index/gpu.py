"""Training where the GPUs are: in this process, or in one of the cluster's that has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import ray
from autofaiss.external.metadata import IndexMetadata
from numpy.typing import NDArray

from pipelines.errors import IndexBuildError
from pipelines.index.choose import empty_index
from pipelines.index.parts import Vectors
from pipelines.index.train import train
from pipelines.observe import peak_memory_mib

START_S = 60.0
"""Seconds that a GPU which seems free has to begin."""


def trained(key: str, metric: str, sample: Vectors, dim: int, say: Callable[[str], None]) -> tuple[Any, float]:
    """`train`, and the peak MiB of the process that did it.

    GPUs find the clusters of an IVF: all of this process, else one of the cluster's, where one is free and its node has
    the memory. Raises: IndexBuildError where that process dies.
    """
    if not _free_gpus() or faiss.get_num_gpus() or not _clusters(key, dim, metric):
        return train(key, metric, sample, dim), peak_memory_mib()
    task: Any = ray.remote(num_cpus=1, num_gpus=1, memory=_bytes(key, sample))(_OnGpu)
    actor = task.remote()
    try:
        where = actor.node.remote()
        if not ray.wait([where], timeout=START_S)[0]:
            say(f"no GPU of the cluster was to be had in {START_S:g} s, with the memory beside it: training here")
            return train(key, metric, sample, dim), peak_memory_mib()
        say(f"training on a GPU of node {ray.get(where)}")
        data, peak_mib = ray.get(actor.train.remote(key, metric, sample, dim))
        return faiss.deserialize_index(data), peak_mib
    except ray.exceptions.RayActorError as error:
        raise IndexBuildError(
            f"The process that trained on a GPU died: {str(error).strip().splitlines()[-1]}",
            "Most often its node has too little memory: lower index.train_vectors, then run the same again.",
        ) from None
    finally:
        ray.kill(actor)


def _free_gpus() -> float:
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return free.get("GPU", 0)


def _clusters(key: str, dim: int, metric: str) -> bool:
    """Whether there are clusters to find, which is all that a GPU is used for."""
    index = empty_index(key, dim, metric)
    return not index.is_trained and faiss.try_extract_index_ivf(index) is not None


def _bytes(key: str, sample: Vectors) -> int:
    return int(IndexMetadata(key, *sample.shape).compute_memory_necessary_for_training(len(sample)))


class _OnGpu:
    def node(self) -> str:
        """Where it is, once it is there; it then has all cores that Ray has of its node."""
        mine = ray.get_runtime_context().get_node_id()
        (node,) = (each for each in ray.nodes() if each["NodeID"] == mine)  # type: ignore[no-untyped-call]
        faiss.omp_set_num_threads(max(1, int(node["Resources"].get("CPU", 1))))
        return str(node["NodeManagerAddress"])

    def train(self, key: str, metric: str, sample: Vectors, dim: int) -> tuple[NDArray[np.uint8], float]:
        return np.asarray(faiss.serialize_index(train(key, metric, sample, dim)), np.uint8), peak_memory_mib()
