from __future__ import annotations

import re
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pytest

from pipelines.errors import ConfigError, InputError
from pipelines.evaluate.compare import Wanted, compare, contenders, overlap
from pipelines.index.parts import unit
from pipelines.remove import Asked, remove
from pipelines.storage import Store
from tests.indexed import ENCODER, Item, everything, key_of, write_output
from tests.unit.evaluate.outputs import describe, replace_vectors


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two encoders of one output, of other dimensions, and one of another output."""
    root = tmp_path_factory.mktemp("compared")
    store = write_output(root / "a", parts=2)
    write_output(root / "a", parts=2, dim=8, seed=1, encoder="other-11111111")
    there = write_output(root / "b", parts=3, seed=2)
    return root, compare(
        contenders([store, there]), Wanted(k=5, agreed=40, shown=3), lambda rival: {"images_per_second": 7.0}
    )


def nearest(items: list[Item], vectors: np.ndarray, key: str, k: int) -> list[str]:
    at = [item.key for item in items].index(key)
    order = np.argsort(-(vectors @ vectors[at]), kind="stable")
    return [items[other].key for other in order if other != at][:k]


def test_each_encoder_shows_its_own_nearest(compared: tuple[Path, dict[str, Any]]) -> None:
    root, document = compared
    names = ["other-11111111", f"{ENCODER} (a)", f"{ENCODER} (b)"]
    assert [card["name"] for card in document["encoders"]] == names and len(document["queries"]) == 3
    places = [("a", "other-11111111"), ("a", ENCODER), ("b", ENCODER)]
    for query in document["queries"]:
        for found, name, (folder, encoder) in zip(query["found"], names, places, strict=True):
            assert found["encoder"] == name
            expected = nearest(*everything(root / folder, "image", encoder), query["key"], 5)
            assert [hit["key"] for hit in found["hits"]] == expected


def test_the_table_has_size_and_quality(compared: tuple[Path, dict[str, Any]]) -> None:
    _, document = compared
    other, one, _ = document["encoders"]
    assert (one["dim"], one["bytes_per_vector"], other["dim"], other["bytes_per_vector"]) == (16, 32, 8, 16)
    assert one["quality"]["captions text→image"]["recall@10"] > 0.3 and one["images_per_second"] == 7.0
    assert all(0 <= share <= 1 for share in document["overlap"].values()) and len(document["overlap"]) == 3


def test_nearest_is_by_the_cosine_whatever_the_length(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2, normalize=False)
    write_output(tmp_path, parts=2, dim=8, seed=1, encoder="other-11111111")
    replace_vectors(
        tmp_path / "embeddings" / ENCODER / "image",
        lambda vectors: vectors * 2.0 ** (np.arange(len(vectors)) % 5)[:, None],
    )
    document = compare(contenders([store]), Wanted(k=5, agreed=40, shown=3))
    items, vectors = everything(tmp_path, "image")
    for query in document["queries"]:
        (hits,) = (found["hits"] for found in query["found"] if found["encoder"] == ENCODER)
        assert [hit["key"] for hit in hits] == nearest(items, unit(vectors), query["key"], 5)


def test_overlap_is_the_share_in_common() -> None:
    one = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert overlap(one, one) == 1 and overlap(one, np.array([[4, 9, 1, 10], [0, 0, 0, 5]])) == pytest.approx(3 / 8)


def test_the_page_stands_alone_and_says_what_cannot_be_shown(compared: tuple[Path, dict[str, Any]]) -> None:
    _, document = compared
    html = Path(document["page"]).read_text()
    assert html.count("no image was read") > 10 and "<script" not in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)


def test_a_query_is_chosen_by_key(compared: tuple[Path, dict[str, Any]]) -> None:
    root, _ = compared
    rivals = contenders([Store(str(root / "a"))])
    key = everything(root / "a", "image")[0][17].key
    assert [query["key"] for query in compare(rivals, Wanted(keys=[key], agreed=5))["queries"]] == [key]
    with pytest.raises(ConfigError, match="the key nobody"):
        compare(rivals, Wanted(keys=["nobody"]))


def test_a_key_that_one_output_lacks_is_told_with_the_output(compared: tuple[Path, dict[str, Any]]) -> None:
    root, _ = compared
    rivals = contenders([Store(str(root / "a")), Store(str(root / "b"))], [ENCODER])
    here, there = key_of(1, 17), key_of(2, 17)
    document = compare(rivals, Wanted(keys=[here, here], agreed=5))
    assert [query["key"] for query in document["queries"]] == [here]
    with pytest.raises(ConfigError, match=rf"No sample of {root / 'a'} with an image has the key {there}"):
        compare(rivals, Wanted(keys=[here, there]))


def test_what_was_taken_down_is_shown_by_none(tmp_path: Path) -> None:
    store = write_output(tmp_path, parts=2)
    write_output(tmp_path, parts=2, dim=8, seed=1, encoder="other-11111111")
    rivals = contenders([store])
    key = everything(tmp_path, "image")[0][17].key

    def shown() -> tuple[set[str], list[int]]:
        document = compare(rivals, Wanted(keys=[key], agreed=1))
        hits = {hit["key"] for found in document["queries"][0]["found"] for hit in found["hits"]}
        return hits, [card["images"] for card in document["encoders"]]

    before, images = shown()
    assert remove(store, Asked(sorted(before), []), "", "").samples == len(before)
    after, left = shown()
    assert after and not after & before and left == [count - len(before) for count in images]


def two_encoders(root: Path) -> Store:
    write_output(root, parts=1, rows=60, dim=8, seed=1, encoder="other-11111111")
    return write_output(root, parts=1, rows=60)


def test_quality_has_what_there_is_to_measure(tmp_path: Path) -> None:
    """Labels that are all different, beside captions; then labels, and no caption."""
    rivals = contenders([two_encoders(tmp_path)])
    describe(tmp_path, lambda row: (f"its own {row}", {}))
    directions = [set(card["quality"]) for card in compare(rivals, Wanted(agreed=5, shown=1))["encoders"]]
    assert directions == [{"captions image→text", "captions text→image"}] * 2
    describe(tmp_path)
    for rival in rivals:
        rmtree(tmp_path / "embeddings" / rival.encoder / "text")
    cards = compare(rivals, Wanted(agreed=5, shown=1))["encoders"]
    assert [set(card["quality"]) for card in cards] == [{"label image→image"}] * 2


def test_names_tell_all_apart_and_an_output_named_twice_is_one(tmp_path: Path) -> None:
    stores = [write_output(tmp_path / folder / "out", parts=1, rows=20) for folder in ("x", "y", "z")]
    names = [rival.name for rival in contenders([*stores, stores[0]])]
    assert names == [f"{ENCODER} ({tmp_path}/{folder}/out)" for folder in ("x", "y", "z")]
    assert len(compare(contenders(stores), Wanted(k=2, agreed=3, shown=1))["overlap"]) == 3


def test_what_is_not_there_is_said_though_enough_is(tmp_path: Path) -> None:
    store = two_encoders(tmp_path)
    with pytest.raises(InputError, match="nowhere is not the output of an embed run"):
        contenders([store, Store(str(tmp_path / "nowhere"))])
    with pytest.raises(ConfigError, match="No output has the encoder clap"):
        contenders([store], [ENCODER, "other-11111111", "clap"])


def test_a_small_output_is_asked_for_what_it_has(tmp_path: Path) -> None:
    many, few = write_output(tmp_path / "many", parts=8), write_output(tmp_path / "few", parts=1, rows=9, first=7)
    document = compare(contenders([many, few]), Wanted(k=2, agreed=6, shown=1))
    assert document["agreed_over"] == 6
    assert "own images, which are not as many" in Path(document["page"]).read_text()


def test_one_encoder_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare it with"):
        contenders([write_output(tmp_path, parts=1)])
