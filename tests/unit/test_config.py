"""Settings: what is unknown or bad is refused with its path, its value and what is allowed; flags win."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config import IndexConfig, RunConfig, load_config, validate
from pipelines.errors import ConfigError

LEAST = {"input": "shards/*.tar", "output": "out", "encoder": "open_clip:ViT-B-32"}


def recipe(folder: Path, **settings: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**LEAST, **settings}))
    return path


def refusal(settings: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        validate(RunConfig, {**LEAST, **settings})
    assert refused.value.exit_code == 2
    return str(refused.value)


def test_the_least_recipe_leaves_choices_open(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path))
    assert config.input == ["shards/*.tar"] and config.modalities == "auto"
    assert config.encode.precision == config.encode.batch_size == config.encode.actors == "auto"
    assert config.write.dtype == "float16" and config.encode.normalize


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sharding": 3}, ["sharding: unknown key (value 3)", "known here: input, output, encoder"]),
        (
            {"encode": {"precison": "fp16"}},
            ["encode.precison: unknown key (value 'fp16')", "known here: precision, batch_size"],
        ),
        ({"encode": {"precision": "int8"}}, ["encode.precision", "'int8'", "'fp32', 'fp16' or 'bf16'", "'auto'"]),
        ({"encode": {"batch_size": "many"}}, ["encode.batch_size", "'many'", "integer"]),
        (
            {"encode": {"batch_size": 0}},
            ["encode.batch_size", "encode.batch_size: 0 is not allowed: Input should be greater than 0, or 'auto'"],
        ),
        ({"encode": {"actors": -1}}, ["encode.actors", "-1 is not allowed"]),
        ({"encode": 3}, ["encode: 3 is not allowed"]),
        (
            {"index": {"target_recall": 0.9, "recall_queries": 0, "floor": 0}},
            ["\n  index: target_recall needs queries"],
        ),
        ({"write": {"dtype": "float64"}}, ["write.dtype", "'float64'", "'float16' or 'float32'"]),
        ({"write": {"reject_ceiling": 1.5}}, ["write.reject_ceiling", "1.5", "less than or equal to 1"]),
        ({"decode": {"alpha": "black"}}, ["decode.alpha", "'black'", "'reference', 'white' or 'drop'"]),
        ({"modalities": "image,audio"}, ["modalities", "'audio'", "'image', 'text' or 'multimodal'"]),
        ({"format": "zip"}, ["format", "'zip'", "'tar'", "'manifest'"]),
        ({"name": "a/b"}, ["name", "'a/b'"]),
        ({"name": ".."}, ["name", "'..'"]),
        ({"input": []}, ["input", "[]"]),
        ({"output": "/"}, ["output", "'/'", "must name a folder"]),
        ({"storage": {"s3": "fast"}}, ["storage.s3", "valid dictionary"]),
        ({"read": {"allow": ["images"]}}, ["read.allow", "['images'] is not allowed", "images: a folder from / on"]),
        ({"read": {"allow": "s3://"}}, ["read.allow", "s3://: a folder from / on, or a URL such as s3://bucket"]),
        ({"read": {"allow": "/data/*"}}, ["read.allow", "a folder from / on"]),
    ],
)
def test_a_bad_setting_is_told_with_path_value_and_what_is_allowed(settings: dict[str, Any], told: list[str]) -> None:
    message = refusal(settings)
    assert [words for words in told if words not in message] == [], message


def test_every_bad_setting_is_told_at_once() -> None:
    message = refusal({"read": {"rows_per_block": 0}, "write": {"dtype": "x"}, "tyop": 1})
    assert all(key in message for key in ("read.rows_per_block", "write.dtype", "tyop"))


@pytest.mark.parametrize("key", ["input", "output", "encoder"])
def test_a_missing_setting_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: missing; give it in the recipe or as a flag"):
        validate(RunConfig, {name: value for name, value in LEAST.items() if name != key})


def test_flags_win_over_the_recipe_key_by_key(tmp_path: Path) -> None:
    path = recipe(tmp_path, encode={"precision": "fp32", "batch_size": 8}, output="of the recipe")
    config = load_config(
        path, {"encode.precision": "bf16", "output": "of a flag", "encoder": None, "input": ["a", "b"]}
    )
    assert (config.encode.precision, config.encode.batch_size) == ("bf16", 8)
    assert (config.output, config.encoder, config.input) == ("of a flag", [LEAST["encoder"]], ["a", "b"])


def test_overrides_make_sections_and_reach_any_depth(tmp_path: Path) -> None:
    config = load_config(recipe(tmp_path), {"read.splits": ["val"], "storage.s3.endpoint_url": "http://localhost"})
    assert config.read.splits == ["val"]
    assert config.storage == {"s3": {"endpoint_url": "http://localhost"}}


def test_overrides_alone_are_enough() -> None:
    assert load_config(None, LEAST).encoder == [LEAST["encoder"]]


def test_an_override_of_an_unknown_key_or_into_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encode\.treads: unknown key \(value 2\)"):
        load_config(recipe(tmp_path), {"encode.treads": 2})
    with pytest.raises(ConfigError, match="output: 'out' is not allowed: a mapping is expected"):
        load_config(recipe(tmp_path), {"output.folder": "x"})


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"a: [1", "is not a YAML recipe"), (b"\xff\xfe\xfa", "is not a YAML recipe"), (b"- a\n", "is not a recipe")],
)
def test_a_file_that_is_no_recipe_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        load_config(path)


def test_a_missing_recipe_and_a_folder_in_its_place_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load_config(path)


def test_modalities_are_a_list_or_words_with_commas() -> None:
    for given in ("image,text", ["image", "text"]):
        assert validate(RunConfig, {**LEAST, "modalities": given}).modalities == ["image", "text"]


def test_an_output_loses_its_last_slash() -> None:
    assert validate(RunConfig, {**LEAST, "output": "s3://bucket/emb/"}).output == "s3://bucket/emb"


def test_settings_as_recorded_are_settings_again() -> None:
    config = validate(RunConfig, {**LEAST, "encode": {"batch_size": 7}, "index": {"shards": 3}})
    recorded = config.model_dump(mode="json")
    assert validate(RunConfig, recorded) == config
    assert validate(IndexConfig, recorded["index"]).shards == 3


def test_settings_do_not_change_under_way() -> None:
    with pytest.raises(ValueError, match="frozen"):
        validate(RunConfig, LEAST).output = "elsewhere"  # type: ignore[misc]


def test_allowed_places_are_a_list_or_words_with_commas() -> None:
    places = ["/data/images", "s3://other/images", "http://10.0.0.5"]
    assert validate(RunConfig, {**LEAST, "read": {"allow": ",".join(places)}}).read.allow == places
    assert validate(RunConfig, {**LEAST, "read": {"allow": places}}).read.allow == places


SECRET = "planted-7f3a"


@pytest.mark.parametrize(
    "settings",
    [
        {"storage": SECRET},
        {"storage": {"s3": SECRET}},
        {"storage": {"s3": [{"secret": SECRET}]}},
        {"storge": {"s3": {"secret": SECRET}}},
        {"s3": {"client_kwargs": [{"password": SECRET}]}},
        {"secret": SECRET},
        {"encode": {"token": SECRET}},
        {"encode": {"precision": f"s3://u:{SECRET}@h"}},
        {"input": [], "write": {"dtype": f"https://h/x?sig={SECRET}"}},
        {"storage": {"s3": {"secret": SECRET}}, "format": SECRET},
    ],
)
def test_no_message_shows_a_credential(settings: dict[str, Any]) -> None:
    assert SECRET not in refusal(settings)


@pytest.mark.parametrize("content", ["storage: {s3: {secret: %s", "secret: *%s", "secret: !%s x", "a: b: %s", "a: '%s"])
def test_no_message_shows_a_line_of_a_broken_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content % SECRET)
    with pytest.raises(ConfigError, match="is not a YAML recipe") as refused:
        load_config(path)
    assert SECRET not in str(refused.value)


def test_no_message_shows_what_an_override_goes_into(tmp_path: Path) -> None:
    path = recipe(tmp_path, storage={"s3": {"secret": SECRET}})
    with pytest.raises(ConfigError, match=r"secret: \*\*\* is not allowed") as refused:
        load_config(path, {"storage.s3.secret.of": 1})
    assert SECRET not in str(refused.value)
