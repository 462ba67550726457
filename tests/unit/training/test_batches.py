"""Pairs, their order, and what is made of the samples before they are paired."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import groupby
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.config import DecodeConfig, validate
from pipelines.contracts import SAMPLE
from pipelines.encoders.base import ImageTransform
from pipelines.encoders.pixels import to_pixels
from pipelines.errors import InputError
from pipelines.observe import nowhere
from pipelines.sources.split import SplitConfig, split_of
from pipelines.training.batches import batches, pairs, shuffled
from pipelines.training.examples import EXAMPLE, Examples, Part, pixels_in
from pipelines.training.settings import TrainConfig
from pipelines.training.survey import Count, add_up
from pipelines.training.train import require_together
from tests.unit.encoders.inputs import encoded, picture

SIZE = (8, 6)
TRANSFORM = ImageTransform(
    "squash", SIZE, None, "bilinear", "drop", "first", "torchvision", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
)


def examples(count: int = 10) -> pa.Table:
    rng = np.random.default_rng(0)
    return pa.Table.from_pylist(
        [
            {
                "key": f"k{at}",
                "identity": f"i{at % 4}",
                "captions": [f"c{at}.{each}" for each in range(1 + at % 3)],
                "pixels": rng.integers(0, 256, (*SIZE, 3), np.uint8).tobytes(),
            }
            for at in range(count)
        ],
        EXAMPLE,
    )


def test_each_caption_comes_once_with_its_image() -> None:
    table = examples()
    found = list(pairs([table.slice(0, 6), table.slice(6)], SIZE, "each", 0))
    assert [pair.caption for pair in found] == [text for row in table["captions"].to_pylist() for text in row]
    images = dict(zip(table["key"].to_pylist(), pixels_in(table, SIZE), strict=True))
    for pair in found:
        at = int(pair.caption[1:].split(".")[0])
        assert np.array_equal(pair.pixels, images[f"k{at}"]) and pair.identity == f"i{at % 4}"


def test_a_pair_holds_its_own_image_alone_which_an_images_captions_share() -> None:
    found = list(pairs([examples()], SIZE, "each", 0))
    assert all(pair.pixels.base is None and pair.pixels.flags.owndata for pair in found)
    assert len({id(pair.pixels) for pair in found}) == 10


def test_one_caption_an_epoch_goes_through_all_of_them() -> None:
    table = examples(6)
    epochs = [[pair.caption for pair in pairs([table], SIZE, "one", epoch)] for epoch in range(6)]
    assert all(len(epoch) == 6 for epoch in epochs)
    shown = Counter(caption for epoch in epochs for caption in epoch)
    assert shown == {f"c{at}.{each}": 6 // (1 + at % 3) for at in range(6) for each in range(1 + at % 3)}


def test_shuffling_loses_nothing_and_depends_on_the_seed_alone() -> None:
    stream = list(pairs([examples(40)], SIZE, "one", 0))
    first, again, other = ([pair.caption for pair in shuffled(stream, 7, Random(seed))] for seed in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other) == sorted(pair.caption for pair in stream)
    assert first != [pair.caption for pair in stream]


@pytest.mark.parametrize("buffer", [2, 7, 100])
def test_what_stays_together_is_shuffled_as_one(buffer: int) -> None:
    stream = [replace(pair, together=f"{at // 3}") for at, pair in enumerate(pairs([examples(39)], SIZE, "one", 0))]
    alone = list(pairs([examples(5)], SIZE, "one", 1))
    found = list(shuffled([*stream, *alone], buffer, Random(1)))
    assert sorted(pair.caption for pair in found) == sorted(pair.caption for pair in [*stream, *alone])
    runs = [list(run) for _, run in groupby(filter(lambda pair: pair.together, found), lambda pair: pair.together)]
    assert sorted(runs, key=lambda run: int(str(run[0].together))) == [stream[at : at + 3] for at in range(0, 39, 3)]
    assert [run[0].together for run in runs] != [f"{at}" for at in range(13)] or buffer == 2


def test_only_whole_batches_unless_there_is_no_other() -> None:
    stream = list(pairs([examples(10)], SIZE, "one", 0))
    assert [len(batch) for batch in batches(stream, 4)] == [4, 4]
    assert [len(batch) for batch in batches(stream, 16)] == [10] and not list(batches(stream[:1], 16))
    assert [len(batch) for batch in batches(stream, 4, whole_alone=True)] == [4, 4]
    assert not list(batches(stream, 16, whole_alone=True))


# -- samples -------------------------------------------------------------------------------------


def samples(*rows: dict[str, Any]) -> pa.Table:
    usual = {"shard": "a", "end": False, "has_image": True, "captions": ["a dog"], "metadata": "{}"}
    image = encoded(picture(20, 30), "PNG")
    whole = [{**usual, "image": image, "row": at, "key": f"k{at}", **row} for at, row in enumerate(rows)]
    return pa.Table.from_pylist(whole, SAMPLE)


def taken(table: pa.Table, part: Part) -> list[dict[str, Any]]:
    return Examples(part, DecodeConfig(), TRANSFORM, nowhere)(table).to_pylist()


def test_what_cannot_be_matched_is_left_out_and_counted() -> None:
    told: list[dict[str, Any]] = []
    table = samples(
        {}, {"captions": []}, {"has_image": False, "image": None}, {"image": b"no image"}, {"captions": ["", None]},
        {"end": True, "captions": []}, {"captions": ["x", None, "y"]},
    )  # fmt: skip
    found = Examples(Part("own"), DecodeConfig(), TRANSFORM, lambda **numbers: told.append(numbers))(table)
    assert [row["captions"] for row in found.to_pylist()] == [["a dog"], ["x", "y"]]
    assert told == [{"stage": "decode", "rows": 3, "unreadable": 1}]
    assert np.array_equal(pixels_in(found, SIZE)[0], to_pixels(picture(20, 30), TRANSFORM, 50))


def test_identities_are_ones_own_labels_or_a_field() -> None:
    table = samples(
        {"label": "cats", "metadata": json.dumps({"identity": 7, "split": "train"})},
        {"label": "cats", "metadata": json.dumps({"identity": 7, "split": "val"})},
        {"label": None},
    )
    assert [row["identity"] for row in taken(table, Part("own"))] == ["a 0", "a 1", "a 2"]
    assert [row["identity"] for row in taken(table, Part("label"))] == ["cats", "cats"]
    assert [row["identity"] for row in taken(table, Part("identity"))] == ["7", "7"]
    assert [row["key"] for row in taken(table, Part("identity", named=("val", "dev")))] == ["k1"]
    assert [row["together"] for row in taken(table, Part("own", together="identity"))] == ["7", "7", None]


def test_a_split_by_hash_keeps_groups_whole() -> None:
    shares = SplitConfig(train=0.5, val=0.25, test=0.25, by="identity")
    table = samples(*({"metadata": json.dumps({"identity": at // 3})} for at in range(300)))
    parts = {split: taken(table, Part("identity", hashed=(split, shares))) for split in ("train", "val", "test")}
    identities = {split: {row["identity"] for row in rows} for split, rows in parts.items()}
    assert sum(map(len, parts.values())) == 300 and sum(map(len, identities.values())) == 100
    assert 35 <= len(identities["train"]) <= 65 and all(len(own) > 12 for own in identities.values())


def test_splits_are_of_their_shares_and_of_the_seed() -> None:
    shares = SplitConfig(train=0.8, val=0.1, test=0.1)
    counts = Counter(split_of(f"key-{at}", shares) for at in range(20_000))
    assert {name: round(count / 20_000, 2) for name, count in counts.items()} == {"train": 0.8, "val": 0.1, "test": 0.1}
    moved = sum(split_of(f"key-{at}", shares) != split_of(f"key-{at}", SplitConfig(seed=1)) for at in range(1000))
    assert moved > 200
    assert {split_of(str(at), SplitConfig(train=0, val=0, test=1)) for at in range(50)} == {"test"}
    with pytest.raises(ValueError, match="add up to"):
        SplitConfig(train=0.5, val=0.1, test=0.1)


# -- survey --------------------------------------------------------------------------------------


def test_the_survey_counts_words_and_identities_however_it_is_cut() -> None:
    rows = [
        {"key": "a", "identity": "2", "captions": ["A dog.", "the DOG runs"], "pixels": None},
        {"key": "b", "identity": "1", "captions": ["a cat"], "pixels": None},
        {"key": "c", "identity": "2", "captions": ["a bird"], "pixels": None},
    ]
    table = pa.Table.from_pylist(rows, EXAMPLE)
    whole, cut = (
        add_up([Count(True)(part)["counts"][0].as_py() for part in parts], 7)
        for parts in ([table], [table.slice(0, 1), table.slice(1)])
    )
    assert whole == cut and (whole.images, whole.captions, whole.classes) == (3, 4, ["1", "2"])
    assert whole.vocabulary == ["<pad>", "<unk>", "<start>", "<end>", "a", "dog", "bird"]
    assert add_up([Count(False)(table)["counts"][0].as_py()], 99).classes == []


def test_what_stays_together_is_counted_and_a_name_that_no_sample_has_is_told() -> None:
    table = samples({"metadata": json.dumps({"twins": 1})}, {"metadata": json.dumps({"twins": 1})}, {})
    config = validate(TrainConfig, {"input": "in", "output": "out", "data": {"together": "twins"}})
    found = {
        name: add_up(
            Count(False)(pa.Table.from_pylist(taken(table, Part("own", together=name)), EXAMPLE))["counts"].to_pylist(),
            9,
        )
        for name in ("twins", "twin")
    }
    assert [each.together for each in found.values()] == [2, 0]
    require_together(config, found["twins"])
    with pytest.raises(InputError, match="none of the 3 samples to train on has 'twins'"):
        require_together(config, found["twin"])
