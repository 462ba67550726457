"""Search parameters: as much of the index as a query may look at within its latency target."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import faiss
import numpy as np
from autofaiss.external.optimize import binary_search_on_param, get_optimal_hyperparameters
from autofaiss.indices.index_utils import speed_test_ms_per_query

from pipelines.errors import ConfigError
from pipelines.index.parts import Vectors

# autofaiss finds these anywhere in a key, and takes an IVF_HNSW for an HNSW; so we ask it only for these.
_AUTOFAISS = r"OPQ\d+_\d+,IVF\d+(_HNSW\d+)?,PQ\d+(x\d+)?|HNSW\d+|IVF\d+,Flat|Flat"
MAX_NPROBE = 6_144
MAX_EF_SEARCH = 16_383
CHEAP_REACH = 32
BATCH_QUERIES, NEIGHBOURS = 32, 40
TIMED_S = 0.3
"""Seconds that each latency is measured for."""


def tune(index: Any, key: str, max_query_ms: float) -> str:
    """The parameters that look furthest within `max_query_ms` a query of one thread, as `apply` reads them.

    Measured by the clock on one index shard, hence not the same twice; what was chosen is recorded.
    autofaiss's choice, which also widens until 20 neighbours are found; for keys it does not know,
    its search over nprobe; "" where there is nothing to tune.
    """
    with one_thread():
        if re.fullmatch(_AUTOFAISS, key):
            return str(get_optimal_hyperparameters(index, key, max_query_ms))
        found = reach_of(key)
        if not found:
            return ""
        probes = list(range(1, found.most + 1))
        return found.params(binary_search_on_param(index, probes, max_query_ms, found.params))


@dataclass(frozen=True)
class Reach:
    """How far a search can look: 1 … most, of which `params` are FAISS's parameters."""

    form: str
    most: int

    def params(self, looked: int) -> str:
        return self.form.format(looked, 2 * looked)


def reach_of(key: str) -> Reach | None:
    """In inverted lists, else in neighbours of a graph; None where every search looks at everything."""
    if lists := re.search(r"IVF(\d+)(_HNSW\d+)?", key):
        return Reach("nprobe={0},efSearch={1}" if lists[2] else "nprobe={0}", min(MAX_NPROBE, int(lists[1])))
    return Reach("efSearch={0}", MAX_EF_SEARCH) if re.search(r"HNSW\d+", key) else None


def least(key: str, enough: Callable[[list[str]], list[bool]]) -> str:
    """The parameters that look least far and are enough, to an eighth; the furthest where none is.

    Doubled until they are, and then between: what looks far costs most to try. `enough` is asked of several at a
    time, since each time every index shard is opened.
    """
    reach = reach_of(key)
    if not reach:
        return ""
    below, above = 0, reach.most
    for steps in _doublings(reach.most):
        held = dict(zip(steps, enough([reach.params(step) for step in steps]), strict=True))
        above = next((step for step in steps if held[step]), above)
        below = max([below, *(step for step in steps if step < above and not held[step])])
        if any(held.values()):
            break
    between = sorted({below + (above - below) * part // 8 for part in range(1, 8)} - {below, above})
    tried = enough([reach.params(step) for step in between]) if between else []
    return reach.params(next((step for step, good in zip(between, tried, strict=True) if good), above))


def _doublings(most: int) -> Iterator[list[int]]:
    """1, 2, 4 … most: the first together, which cost little, each further one by itself."""
    steps = [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]
    cheap = [step for step in steps if step <= CHEAP_REACH] or steps[:1]
    yield cheap
    yield from ([step] for step in steps[len(cheap) :])


def around(key: str, params: str) -> list[str]:
    """The parameters and some that look at less and at more of the index, for a curve; fewest first."""
    chosen = re.search(r"nprobe=(\d+)", params) or re.search(r"efSearch=(\d+)", params)
    if not chosen:
        return [params]
    lists = re.search(r"IVF(\d+)", key)
    looked = int(chosen[1])
    steps = {min(step, int(lists[1])) if lists else step for step in (looked // 16, looked // 4, looked, 4 * looked)}
    return [_with(params, step) if step != looked else params for step in sorted({1, *steps} - {0})]


def _with(params: str, looked: int) -> str:
    """Probes `looked` lists; a graph over their centroids, which finds these, looks at twice as many."""
    probing = "nprobe" in params
    params = re.sub(r"nprobe=\d+", f"nprobe={looked}", params)
    return re.sub(r"efSearch=\d+", f"efSearch={2 * looked if probing else looked}", params)


def apply(index: Any, params: str) -> None:
    """Sets `nprobe=8,efSearch=16`-like parameters. Raises: RuntimeError for one that the index has not."""
    faiss.ParameterSpace().set_index_parameters(index, params)


def require_params(index: Any, key: str, params: str) -> None:
    """Raises: ConfigError for pinned parameters that an index of this key has not."""
    try:
        apply(index, params)
    except RuntimeError as error:
        reason = str(error).rpartition(":")[2].strip()
        raise ConfigError(
            f"index.search_params: {params!r} does not suit {key}: {reason}",
            "Take those of a release's manifest, such as nprobe=16 for IVF and efSearch=64 for HNSW, or leave it out.",
        ) from None


def full_probe(key: str) -> str:
    """The parameters with which an index looks at every list, "" where it always does."""
    lists = re.search(r"IVF(\d+)(_HNSW\d+)?", key)
    if not lists:
        return ""
    return f"nprobe={lists[1]},efSearch={2 * int(lists[1])}" if lists[2] else f"nprobe={lists[1]}"


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS has one here: what one query takes then says what a core can serve, on whatever machine it was measured."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def query_ms(index: Any, queries: Vectors) -> float:
    """Mean milliseconds of one query of one thread for 40 neighbours, one at a time, for TIMED_S at most."""
    with one_thread():
        return float(speed_test_ms_per_query(index, queries, timout_s=TIMED_S))


def batch_query_ms(index: Any, queries: Vectors) -> float:
    """Mean milliseconds of one query for 40 neighbours, BATCH_QUERIES at a time on all threads, for about TIMED_S."""
    batch = np.resize(queries, (BATCH_QUERIES, queries.shape[1]))
    started, asked = perf_counter(), 0
    while not asked or perf_counter() - started < TIMED_S:
        index.search(batch, NEIGHBOURS)
        asked += BATCH_QUERIES
    return 1e3 * (perf_counter() - started) / asked
