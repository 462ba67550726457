import pytest

from pipelines.config import IndexConfig
from pipelines.errors import ConfigError, IndexBuildError
from pipelines.index.choose import (
    choose_key,
    clusters,
    cut,
    empty_index,
    largest_rows,
    parse_bytes,
    shard_bytes,
    shard_count,
)
from pipelines.index.plan import make_plan
from tests.unit.index.test_parts import of_rows


def test_sizes() -> None:
    assert parse_bytes("4G") == 4 * 2**30 and parse_bytes("500MB") == 500 * 2**20
    with pytest.raises(ConfigError, match="shard_memory: '4 gigs'"):
        parse_bytes("4 gigs")


def test_autofaiss_chooses_by_count_and_memory() -> None:
    assert choose_key(900, 64, 1, IndexConfig()) == "Flat"
    assert choose_key(5_000, 64, 1, IndexConfig()) == "HNSW15"
    small = IndexConfig(shard_memory="100M")
    assert choose_key(100_000, 768, 1, small) == "OPQ256_1024,IVF1024_HNSW32,PQ256x8"
    assert choose_key(100_000, 768, 4, small) == "HNSW32", "the budget is of one index shard"


def test_what_does_not_fit_says_so() -> None:
    with pytest.raises(IndexBuildError, match="fits 1 × 1M"):
        choose_key(1_000_000, 768, 1, IndexConfig(shard_memory="1M"))
    with pytest.raises(IndexBuildError, match="100,000 vectors as Flat needs about"):
        choose_key(100_000, 768, 1, IndexConfig(shard_memory="100M", index_key="Flat"))


@pytest.mark.parametrize("key", ["IVF16,PQ8x8", "IVF1024_HNSW32,Flat", "SQ8", "OPQ8_32,IVF16,PQ8x8,RFlat"])
def test_ip_refuses_keys_that_faiss_would_build_wrong(key: str) -> None:
    with pytest.raises(ConfigError, match="OPQ<m>_<d>,IVF<n>,PQ<m>"):
        choose_key(20_000, 32, 1, IndexConfig(index_key=key))


@pytest.mark.parametrize("key", ["IVF16,PQ8x8,RFlat", "SQ8,Refine(SQ8)", "NSG16", "IVF16,PQ8x4fs"])
def test_kinds_that_are_not_known_to_work_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)is of a kind .* do not work with.*Flat, HNSW"):
        choose_key(20_000, 32, 1, IndexConfig(index_key=key, metric="l2"))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("key", ["OPQ7_32,IVF16,PQ8x8", "IVF16,Flit"])
def test_keys_that_cannot_be_built_are_refused(key: str, metric: str) -> None:
    with pytest.raises(ConfigError, match="index_key"):
        choose_key(20_000, 32, 1, IndexConfig(index_key=key, metric=metric))


@pytest.mark.parametrize(
    ("key", "metric"),
    [
        ("Flat", "ip"),
        ("HNSW15", "l2"),
        ("IVF16,Flat", "ip"),
        ("OPQ4_16,IVF16,PQ4x8", "ip"),
        ("Pad32,IVF16_HNSW8,PQ4x8", "ip"),
        ("IVF16,PQ4x4", "l2"),
        ("PCA8,Flat", "l2"),
        ("SQ8", "l2"),
        ("IDMap,Flat", "l2"),
    ],
)
def test_every_index_takes_ids_and_the_metric(key: str, metric: str) -> None:
    import numpy as np

    vectors = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = empty_index(key, 16, metric)
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(len(vectors)) + 2**40)
    scores, ids = index.search(vectors[:5], 10)
    assert (ids >= 2**40).all()
    ascending = np.diff(scores, axis=1) >= -1e-6
    assert ascending.all() if metric == "l2" else (~ascending).any()


def test_clusters_count_lists_and_codes() -> None:
    assert clusters("OPQ8_32,IVF1024,PQ8x8") == 1024
    assert clusters("OPQ8_32,IVF16,PQ8x8") == 256
    assert clusters("IVF16,PQ8") == 256
    assert clusters("IVF16,Flat") == 16
    assert clusters("IVF16,PQ8x4fs") == 16


def test_cut_is_contiguous_whole_and_even() -> None:
    parts = of_rows(*[100] * 20, 0, 0, *[50] * 40)
    runs = cut(parts, 4)
    assert len(runs) == 4
    assert [at for run in runs for at in run] == list(range(len(parts.ranges)))
    assert all(900 <= parts.run(run.start, run.stop).rows <= 1100 for run in runs)


def test_there_are_never_more_index_shards_than_parts() -> None:
    parts = of_rows(0, 10, 0, 1000, 5)
    assert shard_count(parts, IndexConfig(shards=9)) == 3
    runs = cut(parts, 3)
    assert all(parts.run(run.start, run.stop).rows for run in runs)
    assert sum(parts.run(run.start, run.stop).rows for run in runs) == 1015
    assert shard_count(parts, IndexConfig()) == 1


def test_memory_holds_for_the_largest_run_of_parts() -> None:
    parts = of_rows(*[1_000] * 10)
    settings = IndexConfig(index_key="Flat", shard_memory=f"{shard_bytes('Flat', 3_400, parts.dim)}B")
    plan = make_plan(parts, settings)
    assert largest_rows(parts, plan.runs) == 3_000 and len(plan.runs) == 4
    with pytest.raises(IndexBuildError, match=r"(?s)5,000 vectors as Flat needs about .* one part, .* never cut"):
        make_plan(of_rows(1_000, 5_000, 1_000), settings)


def test_memory_says_how_many_index_shards_a_key_needs() -> None:
    parts = of_rows(*[1_000] * 50)
    whole = shard_bytes("Flat", 50_000, parts.dim)
    for share, count in ((1, 1), (2, 2), (5, 5), (12.5, 13), (1_000, 50)):
        budget = f"{int(whole / share) + 1}B"
        settings = IndexConfig(index_key="Flat", shard_memory=budget)
        assert shard_count(parts, settings) == count
    assert shard_count(parts, settings.model_copy(update={"shards": 3})) == 3, "a number that is given stands"
    assert shard_count(parts.run(0, 0), settings) == 0, "an update may have nothing but what is gone"


@pytest.mark.parametrize("budget", ["4G", "200K", "60K"])
def test_memory_says_how_many_index_shards_autofaiss_needs_for_a_key(budget: str) -> None:
    parts, settings = of_rows(*[1_000] * 40), IndexConfig(shard_memory=budget)
    plan = make_plan(parts, settings)
    assert shard_bytes(plan.key, largest_rows(parts, plan.runs), parts.dim) <= parse_bytes(budget)
    assert (len(plan.runs) == 1) == (budget == "4G")


def test_where_more_index_shards_do_not_help_that_is_said() -> None:
    with pytest.raises(IndexBuildError, match=r"(?s)fits 40 × 1K.*no more of them than parts"):
        make_plan(of_rows(*[1_000] * 40), IndexConfig(shard_memory="1K"))
