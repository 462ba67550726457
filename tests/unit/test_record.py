"""`run.json`: what made an output, enough to make it again and to show what differs; no secrets."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest

from pipelines.contracts import VectorSpec
from pipelines.encoders.base import EncoderSpec, ImageTransform
from pipelines.errors import LedgerError, PreflightError
from pipelines.record import (
    FILE,
    RunRecord,
    differences,
    encoder_record,
    read_record,
    require_same,
    write_record,
)
from pipelines.storage import Store

RUNS = 6
SPEC = EncoderSpec(
    name="open_clip:ViT-B-32",
    family="open_clip",
    reference="ViT-B-32",
    vectors={"image": VectorSpec(24), "text": VectorSpec(24)},
    image=ImageTransform(
        resize="shortest",
        size=(64, 64),
        crop=(64, 64),
        resample="bicubic",
        alpha="drop",
        rgb="last",
        library="torchvision",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    ),
    context_length=77,
    weights="a" * 64,
    details={"quick_gelu": False, "tokenizer": {"kind": "simple"}},
    options={"s3": {"secret": "hunter2"}},
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_a_new_output_has_an_empty_record(store: Store) -> None:
    assert read_record(store) == RunRecord()


def test_what_another_run_recorded_meanwhile_is_kept(store: Store) -> None:
    write_record(store, RunRecord(encoders={"other": encoder_record(SPEC, ("image",), 64)}, slices={"s3://b/x": 3}))
    write_record(store, RunRecord(encoders={"clip": encoder_record(SPEC, ("text",), 64)}, slices={"s3://b/y": 4}))
    both = read_record(store)
    assert both.encoders.keys() == {"other", "clip"} and both.slices == {"s3://b/x": 3, "s3://b/y": 4}
    half = encoder_record(replace(SPEC, precision="fp16"), ("image",), 64)
    with pytest.raises(PreflightError, match="precision: 'fp32' → 'fp16'"):
        write_record(store, RunRecord(encoders={"clip": half}))
    with pytest.raises(PreflightError, match="Another run has just cut"):
        write_record(store, RunRecord(slices={"s3://b/x": 5}))


def test_of_runs_that_record_at_the_same_moment_none_is_lost(store: Store) -> None:
    record, together = encoder_record(SPEC, ("image",), 64), Barrier(RUNS)

    def run(number: int) -> None:
        together.wait()
        write_record(store, RunRecord(encoders={f"clip{number}": record}))

    with ThreadPoolExecutor(RUNS) as pool:
        list(pool.map(run, range(RUNS)))
    assert read_record(store).encoders.keys() == {f"clip{number}" for number in range(RUNS)}
    assert store.names("leases") == []


def test_of_two_that_read_rows_otherwise_the_second_is_refused(store: Store) -> None:
    write_record(store, RunRecord(settings={"read": {"splits": ["train"]}}))
    with pytest.raises(PreflightError, match=r"read\.splits"):
        write_record(store, RunRecord(settings={"read": {"splits": ["test"]}}))


def test_a_record_is_read_as_it_was_written(store: Store) -> None:
    record = RunRecord(
        encoders={"clip": encoder_record(SPEC, ("image",), 64)}, slices={"s3://b/images": 3}, settings={"output": "x"}
    )
    write_record(store, record)
    again = read_record(store)
    assert again == record
    assert again.encoders["clip"].batch_size == 64 and again.encoders["clip"].modalities == ["image"]
    assert {"vecmill", "torch", "ray", "pillow"} <= again.encoders["clip"].versions.keys()


def test_a_spec_comes_back_from_the_record_as_it_was(store: Store) -> None:
    write_record(store, RunRecord(encoders={"clip": encoder_record(SPEC, ("image",), 64)}))
    spec = read_record(store).encoders["clip"].encoder_spec({"s3": {"anon": True}})
    assert spec == replace(SPEC, options={"s3": {"anon": True}})
    assert spec.fingerprint == SPEC.fingerprint == read_record(store).encoders["clip"].fingerprint


def test_a_record_holds_no_secrets(store: Store) -> None:
    write_record(store, RunRecord(encoders={"clip": encoder_record(SPEC, ("image",), 64)}))
    assert b"hunter2" not in store.read(FILE)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"encoders": 3}', b"\xff"])
def test_another_file_of_that_name_is_told(store: Store, content: bytes) -> None:
    store.put_atomic(FILE, content)
    with pytest.raises(LedgerError, match=r"(?s)run\.json is not a run record.*Is this a vecmill output"):
        read_record(store)


def test_keys_of_a_later_version_do_not_stop_an_earlier_one(store: Store) -> None:
    store.put_atomic(FILE, json.dumps({"encoders": {}, "written_by": "9.0"}).encode())
    assert read_record(store) == RunRecord()


def test_the_same_encoder_passes_under_any_name_or_options() -> None:
    recorded = encoder_record(SPEC, ("image",), 64)
    require_same("clip", recorded, replace(SPEC, name="open_clip:other", reference="other", options={}))


def test_another_encoder_is_refused_with_each_difference() -> None:
    assert SPEC.image
    other = replace(
        SPEC,
        precision="fp16",
        weights="b" * 64,
        image=replace(SPEC.image, resample="bilinear"),
        details={"quick_gelu": True, "tokenizer": {"kind": "simple"}},
    )
    with pytest.raises(PreflightError) as refused:
        require_same("clip", encoder_record(SPEC, ("image",), 64), other)
    lines = str(refused.value).splitlines()
    assert lines[0] == "embeddings/clip was made by another encoder:"
    assert [line.strip() for line in lines[1:-1]] == [
        "details.quick_gelu: False → True",
        "image.resample: 'bicubic' → 'bilinear'",
        "precision: 'fp32' → 'fp16'",
        f"weights: '{'a' * 64}' → '{'b' * 64}'",
    ]
    assert "--name" in lines[-1]


def test_differences_are_lines_of_path_before_and_after() -> None:
    before = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": 0, "same": {"x": 1}}
    after = {"a": 2, "b": {"c": [1, 3], "d": {"e": 1}}, "new": "n", "same": {"x": 1}}
    assert differences(before, after) == [
        "a: 1 → 2",
        "b.c: [1, 2] → [1, 3]",
        "b.d: None → {'e': 1}",
        "gone: 0 → None",
        "new: None → 'n'",
    ]
    assert differences(before, before) == []
