"""Protocols on real parts, against the whole table of scores."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest

from pipelines.errors import ConfigError
from pipelines.evaluate.kept import evaluations, kept_in, name_of
from pipelines.evaluate.metrics import of_whole, ranked
from pipelines.evaluate.protocols import Asked
from pipelines.evaluate.ranking import Room
from pipelines.evaluate.retrieval import evaluate
from pipelines.evaluate.through_index import wrong_first
from pipelines.index.cache import Cache
from pipelines.index.recall import Top
from pipelines.index.release import finish, read_release
from pipelines.record import read_record, write_record
from pipelines.storage import Store
from tests.indexed import ENCODER, Item, everything, write_output
from tests.unit.evaluate.outputs import describe, described, label_of, replace_vectors
from tests.unit.index.test_cache import Away
from tests.unit.index.test_rerank import Lossy
from tests.unit.test_search import write_release


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated")
    write_release(root, parts=3)
    describe(root)
    return root


def result(root: Path, asks: str = "", **asked: Any) -> dict[str, Any]:
    """Of the direction that asks with `asks`, or the only one."""
    found = evaluate(Store(str(root)), ENCODER, Asked(**asked))["results"]
    (one,) = [each for each in found if asks in ("", each["asks"])]
    return dict(one)


def expected(root: Path, asks: str, finds: str, same: Any, keep: Any = lambda item: True) -> dict[str, float]:
    """The figures from all scores at once. same: whether two items belong together."""
    questions, queries = kept(root, asks, keep)
    gallery, vectors = kept(root, finds, keep)
    relevant = np.array([[same(one, other) for other in gallery] for one in questions])
    scores = queries @ vectors.T
    if asks == finds:
        np.fill_diagonal(relevant, False)
        np.fill_diagonal(scores, -np.inf)
    answerable = relevant.any(axis=1)
    return of_whole([ranked(scores[answerable], relevant[answerable])])


def kept(root: Path, modality: str, keep: Any) -> tuple[list[Item], np.ndarray]:
    items, vectors = everything(root, modality)
    which = [at for at, item in enumerate(items) if keep(item)]
    return [items[at] for at in which], vectors[which]


def of_one_sample(one: Item, other: Item) -> bool:
    return (one.shard, one.row) == (other.shard, other.row)


def of_one_label(one: Item, other: Item) -> bool:
    return label_of(one.row) is not None and label_of(one.row) == label_of(other.row)


def in_test(item: Item) -> bool:
    return described(item.row)[1]["split"] == "test"


@pytest.mark.parametrize(("asks", "finds"), [("image", "text"), ("text", "image")])
def test_captions_and_images_find_each_other(root: Path, asks: str, finds: str) -> None:
    found = result(root, asks, protocols=("captions",))
    assert found["figures"] == pytest.approx(expected(root, asks, finds, of_one_sample))
    # They are near each other, by construction: it is no table of zeros.
    assert found["figures"]["recall@1"] > 0.3
    images, captions = len(everything(root, "image")[0]), len(everything(root, "text")[0])
    assert found["gallery"] == {"text": captions, "image": images}[finds]
    assert found["queries"] + found["unanswerable"] == found["of"] == {"text": captions, "image": images}[asks]


def test_images_find_others_of_their_label(root: Path) -> None:
    found = result(root, protocols=("label",))
    theirs = expected(root, "image", "image", of_one_label, lambda i: label_of(i.row))
    # Scores nearer to each other than float32 sums are exact count as equal; of 800,000 a few are.
    assert found["figures"] == pytest.approx(theirs, rel=1e-4)


def test_a_caption_finds_any_image_of_its_identity(root: Path) -> None:
    found = result(root, protocols=("identity",), identity="id")
    assert found["figures"] == pytest.approx(expected(root, "text", "image", lambda a, b: a.row // 3 == b.row // 3))


def test_a_split_asks_and_is_found(root: Path) -> None:
    found = result(root, "text", protocols=("captions",), split="test")
    assert found["figures"] == pytest.approx(expected(root, "text", "image", of_one_sample, in_test))


@pytest.mark.parametrize(("asks", "finds"), [("image", "text"), ("text", "image")])
def test_folds_are_ranked_by_themselves_and_averaged(root: Path, asks: str, finds: str) -> None:
    found = result(root, asks, fold=100)
    samples = [(item.shard, item.row) for item in everything(root, "text")[0]]
    has_caption = list(dict.fromkeys(samples))
    folds = [set(has_caption[at : at + 100]) for at in range(0, len(has_caption) - 99, 100)]
    means = [expected(root, asks, finds, of_one_sample, lambda i, f=fold: (i.shard, i.row) in f) for fold in folds]
    captions = sum(sample in folds[0] for sample in samples)
    assert found["folds"] == len(folds) > 2 and found["gallery"] == {"text": captions, "image": 100}[finds]
    assert found["figures"] == pytest.approx({name: np.mean([each[name] for each in means]) for name in means[0]})


@pytest.mark.parametrize("asked", [{"protocols": ("captions", "label")}, {"identity": "id"}])
def test_folds_are_of_captions_alone(root: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Folds are of images with their captions"):
        evaluate(Store(str(root)), ENCODER, Asked(fold=100, **asked))


def test_an_index_that_finds_everything_loses_nothing(root: Path) -> None:
    for found in (result(root, "text", protocols=("captions",)), result(root, protocols=("label",))):
        through = found["through"]
        assert through["release"] == "v0001" and set(through["loss"].values()) == {0.0}
        figures = {name: value for name, value in found["figures"].items() if name in through["found"]}
        # The label's gallery leaves out what has no label, which an index does not.
        assert found["protocol"] == "label" or through["found"] == pytest.approx(figures)


def test_a_release_is_evaluated_that_is_not_current(tmp_path: Path) -> None:
    write_release(tmp_path, parts=1)
    (tmp_path / "index" / ENCODER / "image" / "CURRENT").unlink()
    assert result(tmp_path, "text", sample=50)["through"] is None
    assert result(tmp_path, "text", sample=50, release="v0001")["through"]["release"] == "v0001"
    with pytest.raises(ConfigError, match=r"No index of .* has the release v0007") as refused:
        result(tmp_path, "text", release="v0007")
    assert refused.value.fix == "There are: v0001."


def test_a_release_that_one_of_the_indexes_has_is_told_of_the_others(tmp_path: Path) -> None:
    store = write_release(tmp_path, parts=1)
    made = read_release(store, ENCODER, "image")
    finish(store, made.model_copy(update={"modality": "text", "version": "v0002"}))
    said: list[str] = []
    asked = Asked(protocols=("captions",), sample=50, release="v0001")
    to_text, to_image = evaluate(store, ENCODER, asked, said.append)["results"]
    assert to_text["through"] is None and to_image["through"]["release"] == "v0001"
    assert said[1:2] == ["the index of text vectors is left out: it has no release v0001"]


def test_files_of_an_index_elsewhere_are_kept(tmp_path: Path) -> None:
    away, cache = Away(Lossy(tmp_path / "made")), Cache(tmp_path / "cache", 2**30)
    asked = Asked(protocols=("captions",), sample=50, cache=cache)
    assert evaluate(away.store, ENCODER, asked)["results"][1]["through"]["release"] == "v0001"
    assert {path.name for path in cache.folder.iterdir()} == {file.sha256 for file in away.made.release.files}


def test_of_equal_scores_what_is_wrong_comes_first() -> None:
    scores = np.array([[0.9, 0.5, 0.5, 0.5, 0.1], [0.7, 0.7, 0.7 - 1e-7, 0.2, 0.2]], np.float32)
    hits = np.array([[True, True, False, True, False], [True, False, False, True, False]])
    ids = np.arange(5) + np.zeros((2, 1), np.int64)
    assert wrong_first(hits, Top(ids, scores)).tolist() == [[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]]
    # The smallest first, as of distances.
    assert wrong_first(hits, Top(ids, -scores)).tolist() == wrong_first(hits, Top(ids, scores)).tolist()


@pytest.mark.parametrize("sign", [1, -1], ids=["similarities", "distances"])
def test_places_of_nothing_come_last(sign: int) -> None:
    """Also after a hit of score 0."""
    scores = sign * np.array([[0.9, 0.5, -np.inf, -np.inf], [0.5, 0.0, -np.inf, -np.inf]], np.float32)
    hits = np.array([[False, True, False, False], [True, True, False, False]])
    top = Top(np.where(np.isinf(scores), -1, np.arange(4)), scores)
    assert wrong_first(hits, top).tolist() == hits.tolist()


def test_what_an_index_does_not_find_is_its_loss(root: Path, tmp_path: Path) -> None:
    write_release(tmp_path, parts=3, shards=2)
    broken = tmp_path / "index" / ENCODER / "image" / "v0001" / "manifest.json"
    manifest = json.loads(broken.read_text())
    manifest["shards"] = manifest["shards"][:1]
    broken.write_text(json.dumps(manifest))
    through = result(tmp_path, "text", protocols=("captions",))["through"]
    assert through["loss"]["recall@10"] == pytest.approx(through["exact"]["recall@10"] - through["found"]["recall@10"])
    assert through["loss"]["recall@10"] > 0.1


@pytest.mark.parametrize("asked", [{}, {"fold": 100}])
def test_nearness_is_the_cosine_whatever_the_length(tmp_path: Path, asked: dict[str, Any]) -> None:
    write_output(tmp_path, parts=2, normalize=False)
    one, other = (result(tmp_path, asks, protocols=("captions",), **asked) for asks in ("image", "text"))
    for modality in ("image", "text"):
        replace_vectors(
            tmp_path / "embeddings" / ENCODER / modality,
            lambda vectors: vectors * 2.0 ** (np.arange(len(vectors)) % 5)[:, None],
        )
    assert result(tmp_path, "image", protocols=("captions",), **asked)["figures"] == pytest.approx(one["figures"])
    assert result(tmp_path, "text", protocols=("captions",), **asked)["figures"] == pytest.approx(other["figures"])


def test_a_sample_of_queries_is_near_all_of_them_and_seeded(root: Path) -> None:
    everyone = result(root, "text", protocols=("captions",))["figures"]["recall@10"]
    some = result(root, "text", protocols=("captions",), sample=300)
    assert some["queries"] == 300 and some["figures"]["recall@10"] == pytest.approx(everyone, abs=0.1)
    assert some == result(root, "text", protocols=("captions",), sample=300)


def test_what_fits_is_chosen_and_kept_as_json(root: Path) -> None:
    document = evaluate(Store(str(root)), ENCODER, Asked(sample=50))
    assert [each["protocol"] for each in document["results"]] == ["captions", "captions", "label"]
    captions, label = (
        json.loads((root / kept_in(ENCODER) / f"{name}.json").read_text()) for name in ("captions", "label")
    )
    assert (captions["protocol"], label["protocol"]) == ("captions", "label")
    assert captions["results"] + label["results"] == document["results"]
    assert {**captions, **document} == {**captions, "results": document["results"]}


def test_no_evaluation_takes_the_place_of_another(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=1)
    describe(tmp_path)
    runs: list[dict[str, Any]] = [
        {"protocols": ("captions",)},
        {"protocols": ("captions",), "split": "test"},
        {"fold": 20},
        {"fold": 20, "split": "test", "seed": 3},
        {"identity": "id", "sample": 50},
    ]
    for asked in runs:
        evaluate(store, ENCODER, Asked(index=False, **asked))
    found = {name_of(each["protocol"], each["split"], each["fold"]): each for each in evaluations(store, ENCODER)}
    assert [*found] == [
        "captions.fold-20.json",
        "captions.json",
        "captions.split-test.fold-20.json",
        "captions.split-test.json",
        "identity.json",
        "label.json",
    ]
    assert {path.name for path in (tmp_path / kept_in(ENCODER)).iterdir()} == {*found}
    assert (found["identity.json"]["identity"], found["identity.json"]["sample"]) == ("id", 50)
    assert found["captions.split-test.fold-20.json"]["seed"] == 3


def test_a_split_of_whatever_name_has_a_file_of_its_own() -> None:
    names = [("a", 3), ("a.fold-3", None), ("a/b", None), ("a%2Fb", None), ("", None), (None, None)]
    assert len({name_of("label", *each) for each in names}) == len(names)
    assert name_of("label", "a/b.c ü", 3) == "label.split-a%2Fb%2Ec%20%C3%BC.fold-3.json"


def protocols_of(root: Path, said: list[str], **asked: Any) -> list[str]:
    document = evaluate(Store(str(root)), ENCODER, Asked(sample=50, index=False, **asked), said.append)
    return [each["protocol"] for each in document["results"]]


def test_an_output_without_a_caption_is_evaluated_by_its_labels(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1)
    describe(tmp_path)
    rmtree(tmp_path / "embeddings" / ENCODER / "text")
    assert protocols_of(tmp_path, []) == ["label"]


def test_what_does_not_suit_is_left_out_with_the_reason_unless_it_was_named(tmp_path: Path) -> None:
    write_output(tmp_path, parts=1)
    describe(tmp_path, lambda row: (f"its own {row}", {"split": "test"}))
    said: list[str] = []
    assert protocols_of(tmp_path, said) == ["captions", "captions"]
    assert said[-1].startswith("label: image → image is left out: None of the queries has anything relevant")
    with pytest.raises(ConfigError, match="anything relevant by the protocol label"):
        protocols_of(tmp_path, said, protocols=("captions", "label"))
    describe(tmp_path, lambda row: (label_of(row) if row % 2 else None, {"split": "train" if row % 2 else "test"}))
    assert protocols_of(tmp_path, said, split="test") == ["captions", "captions"]
    with pytest.raises(ConfigError, match="no image vectors of the split dev to ask with"):
        protocols_of(tmp_path, said, split="dev")


def test_memory_decides_nothing_but_the_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tight(Room):
        def tile_rows(self, queries: int, dim: int) -> int:
            return 50

    roomy = result(root, protocols=("label",))
    # Four queries at once.
    monkeypatch.setattr("pipelines.evaluate.through_index.CANDIDATE_BYTES", 4 * 2**20)
    tight = result(root, protocols=("label",), room=Tight(64))
    assert roomy["figures"] == pytest.approx(tight["figures"])
    for name in ("found", "exact"):
        assert roomy["through"][name] == pytest.approx(tight["through"][name])


def test_what_cannot_be_asked_is_said(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--identity id"):
        result(root, protocols=("identity",))
    with pytest.raises(ConfigError, match="no image vectors of the split dev"):
        result(root, protocols=("captions",), split="dev")
    with pytest.raises(ConfigError, match="fewer than 10,000 samples"):
        result(root, protocols=("captions",), fold=10_000)
    with pytest.raises(ConfigError, match=r"5 queries of \d+ dimensions are more than 0 MiB hold"):
        result(root, protocols=("captions",), sample=5, room=Room(0))
    with pytest.raises(ConfigError, match="no text vectors whose metadata have the field pid") as refused:
        result(root, identity="pid")
    assert refused.value.fix == "Check --identity."
    store = write_release(tmp_path, parts=1)
    with pytest.raises(ConfigError, match=r"no image vectors with a label to ask with") as refused:
        result(tmp_path, protocols=("label",))
    assert "sub-folders" in refused.value.fix
    record = read_record(store)
    record.encoders[ENCODER].spec["vectors"]["text"]["space"] = "text"
    record.encoders[ENCODER].fingerprint = "0" * 64
    Path(tmp_path / "run.json").unlink()
    write_record(store, record)
    with pytest.raises(ConfigError, match="image vectors are of the space joint, text vectors of text"):
        result(tmp_path, protocols=("captions",))
    with pytest.raises(ConfigError, match="neither comparable images and captions nor labels"):
        result(tmp_path)
