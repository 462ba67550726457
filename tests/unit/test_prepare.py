"""What a run resolves, takes from the record, and refuses before it starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import RunConfig, validate
from pipelines.errors import ConfigError, EncoderError, InputError, PreflightError
from pipelines.prepare import Cluster, Prepared, prepare, require_output, require_resources
from pipelines.record import write_record
from pipelines.scenes import write_shards
from pipelines.storage import Store
from tests.checkpoints import save_open_clip
from tests.checkpoints_marian import save_marian

LAPTOP = Cluster(cpus=8, gpus=0, nodes=1, node_cpus=8)
FARM = Cluster(cpus=64, gpus=8, nodes=4, node_cpus=16, node_gpus=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("checkpoint") / "clip")


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("other") / "clip", embed_dim=32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, samples=20, shards=2, broken=0)
    return folder


@pytest.fixture
def settings(shards: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("HOME", str(tmp_path))
    return {
        "input": str(shards),
        "output": str(tmp_path / "out"),
        "encoder": f"open_clip:local-dir:{checkpoint}",
    }


def prepared(settings: dict[str, Any], cluster: Cluster = LAPTOP, **more: Any) -> Prepared:
    return prepare(validate(RunConfig, {**settings, **more}), cluster)


def recorded(settings: dict[str, Any], cluster: Cluster = LAPTOP, **more: Any) -> Prepared:
    """As `embed` leaves it in the output."""
    run = prepared(settings, cluster, **more)
    write_record(run.store, run.record)
    return run


# -- what is left open ---------------------------------------------------------------------------


def test_without_gpus_one_actor_takes_every_cpu_in_fp32(settings: dict[str, Any]) -> None:
    run = prepared(settings)
    encode = run.config.encode
    assert (encode.precision, encode.batch_size, encode.actors, encode.gpus_per_actor) == ("fp32", 64, 1, 0)
    assert encode.threads == 8 and run.device == "cpu" and run.targets[0].spec.precision == "fp32"


def test_with_gpus_each_has_an_actor_in_fp16(settings: dict[str, Any]) -> None:
    run = prepared(settings, FARM)
    encode = run.config.encode
    assert (encode.precision, encode.batch_size, encode.actors, encode.gpus_per_actor) == ("fp16", 256, 8, 1)
    assert encode.threads == 8 and run.device == "cuda" and run.targets[0].spec.precision == "fp16"


@pytest.mark.parametrize(
    ("given", "cluster", "expected"),
    [
        ({"gpus_per_actor": 0}, FARM, {"precision": "fp32", "actors": 1, "threads": 16}),
        ({"gpus_per_actor": 0.5}, FARM, {"precision": "fp16", "actors": 16, "threads": 4}),
        ({"gpus_per_actor": 2}, FARM, {"actors": 4, "threads": 16}),
        ({"actors": 4}, LAPTOP, {"actors": 4, "threads": 2, "precision": "fp32"}),
        ({"actors": 20}, LAPTOP, {"actors": 20, "threads": 1}),
        ({"precision": "bf16", "batch_size": 3}, FARM, {"precision": "bf16", "batch_size": 3, "actors": 8}),
        ({"threads": 3}, LAPTOP, {"threads": 3}),
    ],
)
def test_what_is_given_stays_and_the_rest_follows(
    settings: dict[str, Any], given: dict[str, Any], cluster: Cluster, expected: dict[str, Any]
) -> None:
    encode = prepared(settings, cluster, encode=given).config.encode
    assert {name: getattr(encode, name) for name in expected} == expected
    assert "auto" not in encode.model_dump().values()


def test_a_resumed_run_takes_precision_and_batch_from_the_record(settings: dict[str, Any]) -> None:
    first = recorded(settings, LAPTOP)
    resumed = prepared(settings, FARM)
    assert (resumed.config.encode.precision, resumed.config.encode.batch_size) == ("fp32", 64)
    assert resumed.config.encode.actors == 8, "resources are the cluster's of today"
    assert (resumed.folders, resumed.targets[0].spec.fingerprint) == (first.folders, first.targets[0].spec.fingerprint)


def test_settings_reach_the_encoder(settings: dict[str, Any]) -> None:
    run = prepared(
        settings,
        encode={"normalize": False, "precision": "bf16"},
        write={"dtype": "float32"},
        decode={"max_aspect": 9, "alpha": "white"},
        storage={"s3": {"secret": "hunter2"}},
    )
    spec = run.targets[0].spec
    assert (spec.normalize, spec.precision, spec.dtype, spec.max_aspect) == (False, "bf16", "float32", 9)
    assert spec.image and spec.image.alpha == "white"
    assert spec.options == {"s3": {"secret": "hunter2"}} and "hunter2" not in run.record.model_dump_json()
    plain = prepared(settings)
    assert plain.targets[0].spec.image and plain.targets[0].spec.image.alpha == "drop", "as open_clip does"
    assert plain.targets[0].spec.fingerprint != spec.fingerprint


# -- names and modalities ------------------------------------------------------------------------


def test_a_folder_is_named_by_encoder_and_fingerprint_or_by_alias(settings: dict[str, Any]) -> None:
    run = prepared(settings)
    assert (
        run.folders[0].endswith(f"-{run.targets[0].spec.fingerprint[:8]}")
        and "/" not in run.folders[0]
        and len(run.folders[0]) < 100
    )
    named = prepared(settings, name="clip")
    assert named.folders[0] == "clip" and set(named.families) == {"samples", "clip"}
    assert prepared(settings, write={"dtype": "float32"}).folders[0] != run.folders[0]


def test_an_alias_keeps_to_its_encoder(settings: dict[str, Any], other_checkpoint: Path) -> None:
    recorded(settings, name="clip")
    assert prepared(settings, name="clip").folders[0] == "clip"
    other = {**settings, "encoder": f"open_clip:local-dir:{other_checkpoint}"}
    with pytest.raises(PreflightError, match=r"(?s)embeddings/clip was made by another encoder.*weights: .* → "):
        prepared(other, name="clip")
    second = recorded(other, name="quick")
    assert set(second.record.encoders) == {"clip", "quick"}


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"encode": {"precision": "bf16"}}, "precision: 'fp32' → 'bf16'"),
        ({"encode": {"normalize": False}}, "normalize: True → False"),
        ({"write": {"dtype": "float32"}}, "dtype: 'float16' → 'float32'"),
        ({"decode": {"alpha": "white"}}, "image.alpha: 'drop' → 'white'"),
        ({"decode": {"max_aspect": 9}}, "max_aspect: 50.0 → 9.0"),
    ],
)
def test_another_fingerprint_is_refused_with_the_difference(
    settings: dict[str, Any], changed: dict[str, Any], shown: str
) -> None:
    recorded(settings)
    with pytest.raises(PreflightError) as refused:
        prepared(settings, **changed)
    assert shown in str(refused.value) and "--name" in str(refused.value) and refused.value.exit_code == 2
    assert prepared(settings, **changed, name="other").folders[0] == "other"


def test_a_checkpoint_that_changed_under_its_name_is_refused(
    settings: dict[str, Any], checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    link = tmp_path / "clip"
    link.symlink_to(checkpoint)
    settings["encoder"] = f"open_clip:local-dir:{link}"
    recorded(settings)
    link.unlink()
    link.symlink_to(other_checkpoint)
    with pytest.raises(PreflightError, match=r"weights: "):
        prepared(settings)


def test_modalities_are_the_encoders_or_those_asked_for(settings: dict[str, Any]) -> None:
    assert prepared(settings).targets[0].modalities == ("image", "text")
    assert prepared(settings, modalities="text,image").targets[0].modalities == ("image", "text")
    assert prepared(settings, modalities=["text"]).targets[0].modalities == ("text",)
    assert prepared(settings, modalities="image").config.modalities == ["image"]
    with pytest.raises(ConfigError, match="modalities: none"):
        prepared(settings, modalities=[])


def test_other_modalities_than_the_output_holds_are_refused(settings: dict[str, Any]) -> None:
    recorded(settings, modalities="image")
    with pytest.raises(PreflightError, match=r"(?s)holds image; this run asks for image, text.*--name"):
        prepared(settings, modalities="image,text")


# -- the plan ------------------------------------------------------------------------------------


def test_preparing_plans_every_shard_and_changes_nothing(settings: dict[str, Any]) -> None:
    run = prepared(settings)
    assert len(run.plan.shards) == len(run.plan.pending) == 2 and run.plan.done == 0
    assert run.plan.pending[0].families == ("samples", run.folders[0])
    assert not Path(settings["output"]).exists()


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"input": "/no/such/folder"}, InputError, "/no/such/folder"),
        ({"encoder": "clap:x"}, ConfigError, "clap"),
        ({"encoder": "open_clip:local-dir:/no/such/folder"}, (EncoderError, ConfigError), "/no/such/folder"),
    ],
)
def test_what_is_not_there_is_told(
    settings: dict[str, Any], changed: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        prepared({**settings, **changed})


# -- preflight -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encode", "cluster", "told"),
    [
        ({"actors": 9, "gpus_per_actor": 1}, FARM, "9 actors of 1 GPUs need 9; the cluster has 8"),
        ({"gpus_per_actor": 1}, LAPTOP, "1 actors of 1 GPUs need 1; the cluster has 0"),
        ({"actors": 8}, LAPTOP, "8 actors of 1 CPUs and 1 to spare .* need 9 CPUs; the cluster has 8"),
        ({"cpus_per_actor": 8}, LAPTOP, "1 actors of 8 CPUs"),
        ({}, Cluster(cpus=1, gpus=0, nodes=1, node_cpus=1), "need 2 CPUs; the cluster has 1"),
        ({}, Cluster(cpus=8, gpus=8, nodes=1, node_cpus=8, node_gpus=8), "8 actors of 1 CPUs"),
        ({"gpus_per_actor": 4}, FARM, "fits no node: the largest has 2 and 16"),
        ({"actors": 1, "cpus_per_actor": 20}, FARM, "An actor of 1 GPUs and 20 CPUs fits no node"),
    ],
)
def test_a_run_that_would_hang_is_refused(
    settings: dict[str, Any], encode: dict[str, Any], cluster: Cluster, told: str
) -> None:
    run = prepared(settings, cluster, encode=encode)
    with pytest.raises(PreflightError, match=told) as refused:
        require_resources(run, cluster)
    assert "encode." in refused.value.fix


def test_a_decode_task_that_fits_no_node_is_refused(settings: dict[str, Any]) -> None:
    small = replace(LAPTOP, node_memory_mib=2000)
    run = prepared({**settings, "cluster": {"memory_per_decode_task_mib": 3000}}, small)
    with pytest.raises(PreflightError, match=r"A decode task of 3,000 MiB fits no node: the largest gives 2,000 MiB"):
        require_resources(run, small)


def test_images_that_a_decode_task_has_no_memory_for_are_refused(settings: dict[str, Any]) -> None:
    large = {"decode": {"max_pixels": 200_000_000}}
    told = r"decode.max_pixels = 200,000,000 can take 2,673 MiB; a decode task has 1,024 MiB"
    with pytest.raises(PreflightError, match=told) as refused:
        require_resources(prepared(settings, **large), LAPTOP)
    assert "cluster.memory_per_decode_task_mib to 2673" in refused.value.fix
    enough = {**settings, **large, "cluster": {"memory_per_decode_task_mib": 2673}}
    require_resources(prepared(enough), LAPTOP)
    require_resources(prepared(settings), LAPTOP)


def test_rows_read_in_another_way_do_not_mix(settings: dict[str, Any]) -> None:
    run = prepared(settings)
    write_record(run.store, run.record)
    with pytest.raises(PreflightError, match=r"read with other settings:\n  read.caption_column: None → 'title'"):
        prepared(settings, read={"caption_column": "title"})
    prepared(settings, read={"rows_per_block": 7})


@pytest.mark.parametrize(
    ("encode", "cluster"),
    [({}, LAPTOP), ({}, FARM), ({"actors": 7}, LAPTOP), ({"actors": 16, "gpus_per_actor": 0.5}, FARM)],
)
def test_a_run_that_fits_is_let_through(settings: dict[str, Any], encode: dict[str, Any], cluster: Cluster) -> None:
    require_resources(prepared(settings, cluster, encode=encode), cluster)


def test_an_output_is_tried_and_left_as_it_was(s3_options: dict[str, Any], tmp_path: Path) -> None:
    for root in (str(tmp_path / "new" / "out"), "s3://bucket/tried"):
        store = Store(root, {"s3": s3_options})
        require_output(store)
        assert store.names("") == []


@pytest.mark.parametrize("root", ["memory:///out", "http://127.0.0.1:1/out", "https://host/out"])
def test_an_output_that_workers_cannot_write_is_refused(root: str) -> None:
    with pytest.raises(PreflightError, match=r"(?s)cannot be an output.*object storage"):
        require_output(Store(root))


def test_an_output_in_a_bucket_that_is_not_there_is_refused(s3_options: dict[str, Any]) -> None:
    with pytest.raises(PreflightError, match="s3://no-such-bucket/out cannot be written"):
        require_output(Store("s3://no-such-bucket/out", {"s3": s3_options}))


def test_an_output_where_a_file_is_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PreflightError, match="cannot be written"):
        require_output(Store(str(tmp_path / "file" / "out")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_output_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PreflightError, match=r"(?s)cannot be written.*permissions"):
        require_output(Store(str(tmp_path / "out")))
    tmp_path.chmod(0o700)


def test_an_output_on_a_file_system_that_is_never_written_is_refused() -> None:
    """For root too; sysfs takes no new folder from anyone."""
    if not Path("/sys/kernel").is_dir():
        pytest.skip("there is no /sys here")
    with pytest.raises(PreflightError, match="cannot be written"):
        require_output(Store("/sys/kernel/vecmill-out"))


def test_a_store_without_create_if_absent_is_refused(s3_options: dict[str, Any]) -> None:
    """As some S3 servers: a proxy that takes the condition out of the request lets both puts win."""
    from tests.s3_proxy import S3Proxy

    class Unconditional(S3Proxy):
        async def _forward(self, request: Any, path: str) -> Any:
            headers = request.headers.copy()
            headers.pop("If-None-Match", None)
            return await super()._forward(request.clone(headers=headers), path)

    with Unconditional(s3_options["endpoint_url"]) as proxy:
        store = Store("s3://bucket/out", {"s3": {**s3_options, "endpoint_url": proxy.url}})
        with pytest.raises(PreflightError, match="does not honour create-if-absent"):
            require_output(store)


# -- several encoders ----------------------------------------------------------------------------


@pytest.fixture
def two(settings: dict[str, Any], other_checkpoint: Path) -> dict[str, Any]:
    return {**settings, "encoder": [settings["encoder"], f"open_clip:local-dir:{other_checkpoint}"]}


@pytest.mark.parametrize(
    ("given", "cluster", "pools", "actors"),
    [
        ({}, LAPTOP, 1, 1),
        ({}, FARM, 2, 4),
        ({}, replace(FARM, gpus=1), 1, 1),
        ({"pools": "each"}, LAPTOP, 2, 1),
        ({"pools": "together"}, FARM, 1, 8),
    ],
)
def test_encoders_share_actors_or_have_their_own(
    two: dict[str, Any], given: dict[str, Any], cluster: Cluster, pools: int, actors: int
) -> None:
    run = prepared(two, cluster, encode=given)
    assert (len(run.pools), run.config.encode.actors) == (pools, actors)
    assert [target for pool in run.pools for target in pool] == list(run.targets)
    require_resources(run, cluster)


def test_each_has_its_folder_and_its_record(two: dict[str, Any], settings: dict[str, Any]) -> None:
    run = recorded(two, name=["a", "b"])
    assert run.folders == ["a", "b"] and set(run.families) == {"samples", "a", "b"}
    assert run.plan.pending[0].families == ("samples", "a", "b")
    assert [target.spec.vectors["image"].dim for target in run.targets] == [24, 32]
    alone = prepared(settings, name="a")
    assert alone.targets == run.targets[:1] and set(alone.record.encoders) == {"a", "b"}


def test_each_keeps_what_it_was_made_with_whatever_their_order(two: dict[str, Any], settings: dict[str, Any]) -> None:
    first, second = two["encoder"]
    recorded({**settings, "encoder": first}, name="a", encode={"batch_size": 7, "precision": "bf16"})
    recorded({**settings, "encoder": second}, name="b", encode={"batch_size": 33})
    for order in (["a", "b"], ["b", "a"]):
        encoders = [{"a": first, "b": second}[name] for name in order]
        run = recorded({**settings, "encoder": encoders}, name=order)
        made = {target.folder: (target.batch_size, target.spec.precision) for target in run.targets}
        assert made == {"a": (7, "bf16"), "b": (33, "fp32")}
        assert {name: record.batch_size for name, record in run.record.encoders.items()} == {"a": 7, "b": 33}


def test_only_what_is_pending_gets_actors(two: dict[str, Any]) -> None:
    run = recorded(two, name=["a", "b"], encode={"pools": "each"})
    lacking = replace(run, plan=replace(run.plan, pending=[replace(run.plan.pending[0], families=("b",))]))
    assert lacking.pools == [run.targets[1:]] and len(run.pools) == 2
    samples = replace(run, plan=replace(run.plan, pending=[replace(run.plan.pending[0], families=("samples",))]))
    assert samples.pools == [] and samples.pending == ()


# -- translation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_marian(tmp_path_factory.mktemp("marian") / "it-en"))


def test_translation_decides_vectors_of_captions_alone(settings: dict[str, Any], marian: str) -> None:
    translate = {"pair": "it:en", "model": marian}
    plain, translated = prepared(settings), prepared(settings, translate=translate)
    assert translated.targets[0].spec.fingerprint != plain.targets[0].spec.fingerprint
    images = prepared(settings, translate=translate, modalities="image")
    assert images.translation is None
    assert images.targets[0].spec.fingerprint == prepared(settings, modalities="image").targets[0].spec.fingerprint


@pytest.mark.parametrize(
    ("translate", "cluster", "told"),
    [
        ({"gpus_per_actor": 1}, replace(FARM, gpus=1), None),
        ({"gpus_per_actor": 2}, replace(FARM, gpus=1), "translation of 2 need"),
        ({"actors": 8}, LAPTOP, "8 of translation"),
        ({"memory_mib": 3_000}, replace(LAPTOP, node_memory_mib=3_500), "beside translation of 3,000 MiB"),
    ],
)
def test_translation_is_counted(
    settings: dict[str, Any], marian: str, translate: dict[str, Any], cluster: Cluster, told: str | None
) -> None:
    run = prepared(settings, cluster, translate={"pair": "it:en", "model": marian, **translate})
    if told is None:
        assert run.config.encode.gpus_per_actor == 0, "the one GPU translates"
        require_resources(run, cluster)
        return
    with pytest.raises(PreflightError, match=told):
        require_resources(run, cluster)


def test_an_encoder_that_lacks_a_modality_gives_what_it_has(two: dict[str, Any]) -> None:
    assert [target.modalities for target in prepared(two, modalities="image").targets] == [("image",)] * 2
    with pytest.raises(ConfigError, match="multimodal"):
        prepared(two, modalities="multimodal")


def test_names_that_do_not_fit_the_encoders(two: dict[str, Any], settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="as many names as encoders"):
        prepared(two, name="a")
    with pytest.raises(ConfigError, match="Two encoders would write to embeddings/"):
        prepared({**settings, "encoder": [settings["encoder"]] * 2})
