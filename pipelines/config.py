"""The run's settings: one validated model per section, and `load_config(path, overrides)`.

A recipe is a YAML file of these keys; command-line flags override it. Unknown keys and bad values
are refused with the key's path, the value and what is allowed; values of storage settings, and of unknown
keys that are called like a secret, are never shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from yaml.parser import ParserError
from yaml.scanner import ScannerError

from pipelines.contracts import SAMPLES_FAMILY, Modality
from pipelines.errors import ConfigError
from pipelines.secrets import MASK, is_secret, masked_values, remember

Auto = Literal["auto"]
Precision = Literal["fp32", "fp16", "bf16"]
Loc = tuple[int | str, ...]


def _as_list(value: Any) -> Any:
    """`image,text` and a bare string are lists too."""
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


def one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Alias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


class ReadConfig(Section):
    samples_per_slice: int = Field(10_000, ge=1, description="samples a folder or manifest is cut into")
    rows_per_shard: int = Field(50_000, ge=1, description="rows above which a Parquet file is cut, at row groups")
    rows_per_block: int = Field(256, ge=1, description="samples read into one block")
    block_mib: int = Field(32, ge=1, description="bytes of images, captions and metadata read into one block, MiB")
    image_column: str | None = Field(None, description="Parquet or manifest column of image bytes, path or URL")
    caption_column: str | None = Field(None, description="Parquet or manifest column of a caption or a list of them")
    key_column: str | None = Field(None, description="Parquet or manifest column of the sample's key")
    splits: list[str] | None = Field(None, description="splits of a Karpathy JSON to take; all where unset")
    allow: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        [],
        description="places beyond the input's own folder or bucket that it may name: "
        "folders (/data/images), buckets or prefixes (s3://other/images), hosts (http://10.0.0.5)",
    )
    max_caption_bytes: int = Field(1_000_000, ge=1, description="a longer caption is a reject")
    max_image_bytes: int = Field(256 * 2**20, ge=1, description="a larger image file is a reject")

    @field_validator("allow")
    @classmethod
    def _whole_places(cls, places: list[str]) -> list[str]:
        for place in places:
            if "*" in place or not re.match(r"/|\w[\w+.-]*://.", place):
                raise ValueError(f"{place}: a folder from / on, or a URL such as s3://bucket/prefix, is expected")
        return places


BYTES_PER_PIXEL = 12
BLOCK_BYTES = 32 * 2**20
DECODE_BASE_MIB = 384
"""Of a decode task, apart from the pixels of one image: Python and its libraries, tokenizer, a block in and one out."""


class ImageDecodeConfig(Section):
    max_pixels: int = Field(
        50 * 2**20,
        ge=1,
        description="an image of more pixels is a reject (decompression bomb), as is one of less whose format takes "
        "more memory; a decode task needs 12 bytes for each and 384 MiB",
    )
    max_aspect: float = Field(50.0, gt=1, description="above this aspect ratio an image is cropped before resizing")

    @property
    def peak_mib(self) -> int:
        """Memory that a decode task may take."""
        return DECODE_BASE_MIB + ceil(self.max_pixels * BYTES_PER_PIXEL / 2**20)


class DecodeConfig(ImageDecodeConfig):
    alpha: Literal["reference", "white", "drop"] = Field(
        "reference", description="transparency: as the encoder's own library, on white, or dropped"
    )
    text_clean: Literal["none", "lavis"] = Field(
        "none", description="what is done to captions before they are tokenised: nothing, or as LAVIS does"
    )
    rows_per_block: int = Field(128, ge=1, description="samples decoded into one block")


class TranslateConfig(Section):
    pair: str | None = Field(
        None, pattern=r"^[\w-]+:[\w-]+$", description="languages of the captions and of the encoder, as in it:en"
    )
    model: str | None = Field(
        None, description="Marian model: a hub name, folder or URL; Helsinki-NLP's of the pair where unset"
    )
    batch_size: int = Field(32, ge=1, description="captions translated at once")
    actors: int = Field(1, ge=1)
    gpus_per_actor: float = Field(0.0, ge=0, description="0 translates on CPUs, one an actor")
    memory_mib: int = Field(2_048, ge=64, description="memory that Ray reserves for an actor")


class EncodeConfig(Section):
    precision: Precision | Auto = Field("auto", description="auto: fp16 on GPUs, fp32 on CPU")
    batch_size: PositiveInt | Auto = Field(
        "auto", description="items in one forward pass; auto: 256 on GPUs, 64 on CPU"
    )
    pools: Literal["auto", "together", "each"] = Field(
        "auto",
        description="several encoders in one actor, in turn, or in actors of their own; auto: their own where there "
        "are GPUs for each",
    )
    actors: PositiveInt | Auto = Field("auto", description="actors of each pool; auto: one a GPU, one in all on CPU")
    gpus_per_actor: NonNegativeFloat | Auto = Field("auto", description="auto: 1 where the cluster has GPUs, else 0")
    cpus_per_actor: float = Field(1.0, ge=0, description="CPUs Ray reserves for an actor")
    threads: PositiveInt | Auto = Field(
        "auto", description="torch threads of a CPU actor; auto: the node's CPUs over its actors"
    )
    normalize: bool = Field(True, description="L2-normalise vectors")


class WriteConfig(Section):
    dtype: Literal["float16", "float32"] = "float16"
    compression: Literal["zstd", "snappy", "none"] = "zstd"
    rows_per_row_group: int = Field(16_384, ge=1)
    rows_per_task: int = Field(2_048, ge=1, description="rows one write task takes at least")
    reject_ceiling: float = Field(
        0.05, ge=0, le=1, description="share of rejected items above which the run ends with exit code 3"
    )


class IndexConfig(Section):
    index_key: str | None = Field(None, description="FAISS factory string; unset: autofaiss chooses")
    metric: Literal["ip", "l2"] = "ip"
    shard_memory: str = Field("4G", description="most memory that one index shard may take when loaded")
    max_query_ms: float = Field(10.0, gt=0, description="latency target of one query on one thread")
    shards: PositiveInt | Auto = Field(
        "auto",
        description="index shards; auto: one per 10 million vectors, and of an index.index_key as many more as it "
        "takes for each to be within index.shard_memory",
    )
    train_vectors: PositiveInt | Auto = Field("auto", description="vectors sampled for training; auto: 100 per cluster")
    target_recall: float | None = Field(
        None, gt=0, le=1, description="recall@10, re-ranked, to look just far enough for, in place of max_query_ms"
    )
    search_params: str | None = Field(
        None, description="pinned, as in nprobe=16: nothing is tuned by the clock, and the same build gives the same"
    )
    recall_queries: int = Field(1_000, ge=0, description="queries that recall is measured with; 0: it is not measured")
    rerank: Literal["auto", "float16", "int8", "none"] = Field(
        "auto", description="stored vectors that search re-scores with; auto: float16 where the index holds codes alone"
    )
    rerank_factor: int = Field(10, ge=1, description="candidates re-scored for each hit asked for")
    floor: float = Field(
        0.9, ge=0, le=1, description="recall@10, re-ranked, below which a release is built and not published"
    )
    variants: list[str] | Literal["auto", "none"] = Field(
        "none", description="keys to compare on a sample, in the report; auto: Flat, PCA, SQ, PQ and IVF ones"
    )
    variant_vectors: PositiveInt = Field(10_000, description="vectors sampled for index.variants")
    drift_warning: float = Field(
        1.5, gt=0, description="error of new vectors over that of the old, above which an update says to train anew"
    )
    keep: int = Field(3, ge=1, description="releases older than the current one that publishing leaves")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _settings_that_agree(self) -> IndexConfig:
        if self.floor and not self.recall_queries:
            raise ValueError(
                "recall_queries is 0, so that no recall is known to be above the floor: set floor to 0 too"
            )
        if self.target_recall and not self.recall_queries:
            raise ValueError("target_recall needs queries to measure recall with: raise recall_queries")
        if self.target_recall and self.search_params:
            raise ValueError("search_params are pinned, so that there is nothing to tune: leave target_recall out")
        return self


RENAMED = {"max_index_memory": "shard_memory"}
"""Index settings that outputs were written with, and what they are called today."""


def index_settings_of(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What an output of an earlier version was told of an index, under today's names, without what is gone since."""
    named = {RENAMED.get(name, name): value for name, value in recorded.items()}
    return {name: value for name, value in named.items() if name in IndexConfig.model_fields}


class ClusterConfig(Section):
    address: str | None = Field(
        None, description="Ray cluster; unset: RAY_ADDRESS's or a local one started for the run"
    )
    spare_cpus: float = Field(
        1.0, ge=1, description="CPUs that actors leave for reading, decoding and writing: without one a run would hang"
    )
    no_progress_timeout_s: int = Field(900, ge=10)
    memory_per_decode_task_mib: int = Field(1_024, ge=64)


class InputConfig(Section):
    """What a verb that only reads is told of its input."""

    input: Annotated[list[str], BeforeValidator(one_or_more)] = Field(min_length=1)
    format: Literal["auto", "tar", "parquet", "folder", "manifest"] = "auto"
    read: ReadConfig = ReadConfig()
    storage: dict[str, dict[str, Any]] = Field({}, description="file system options by protocol")


class RunConfig(Section):
    """Everything an `embed` run is told."""

    input: Annotated[list[str], BeforeValidator(one_or_more)] = Field(min_length=1)
    output: str
    encoder: Annotated[list[str], BeforeValidator(one_or_more)] = Field(min_length=1)
    name: Annotated[list[Alias] | None, BeforeValidator(one_or_more)] = Field(
        None, description="alias of the encoder's folder, of each where there are several"
    )
    format: Literal["auto", "tar", "parquet", "folder", "manifest"] = "auto"
    modalities: Annotated[list[Modality], BeforeValidator(_as_list)] | Auto = "auto"
    read: ReadConfig = ReadConfig()
    translate: TranslateConfig = TranslateConfig()
    decode: DecodeConfig = DecodeConfig()
    encode: EncodeConfig = EncodeConfig()
    write: WriteConfig = WriteConfig()
    index: IndexConfig = IndexConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: dict[str, dict[str, Any]] = Field(
        {}, description="file system options by protocol: {s3: {endpoint_url: …}}"
    )

    @property
    def aliases(self) -> list[str | None]:
        """One an encoder."""
        return list(self.name) if self.name else [None] * len(self.encoder)

    @field_validator("name")
    @classmethod
    def _one_an_encoder(cls, names: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if SAMPLES_FAMILY in (names or []):
            raise ValueError(f"{SAMPLES_FAMILY} is the name of the samples' own family; any other name is allowed")
        encoders = info.data.get("encoder") or []
        if names and len(names) != len(encoders):
            raise ValueError(f"as many names as encoders are expected, which are {len(encoders)}")
        return names

    @field_validator("output")
    @classmethod
    def _no_trailing_slash(cls, value: str) -> str:
        if not value.strip("/"):
            raise ValueError("must name a folder")
        return value.rstrip("/")


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The settings of an embed run's recipe: `load_settings` of a RunConfig."""
    return load_settings(RunConfig, path, overrides)


def load_settings(section: type[S], path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> S:
    """The settings of a recipe with dotted `overrides` (`{"encode.precision": "bf16"}`) on top.

    Values of None are not overrides. Raises: ConfigError with the key's path, the value and what is
    allowed.
    """
    settings = _read_recipe(Path(path)) if path else {}
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _set(settings, dotted.split("."), value)
    return validate(section, settings)


def validate(section: type[S], settings: Mapping[str, Any]) -> S:
    """`section` from plain settings. Raises: ConfigError that lists every bad key."""
    remember({"storage": settings.get("storage")})
    try:
        return section.model_validate(settings)
    except ValidationError as error:
        problems = "\n  ".join(_problems(section, error))
        raise ConfigError(f"The settings are not valid:\n  {problems}") from None


def _problems(section: type[Section], error: ValidationError) -> list[str]:
    """A line a key; of a setting of several types, what each of them would allow."""
    told: dict[str, list[str]] = {}
    for detail in error.errors():
        problem, allowed = _problem(section, dict(detail))
        told.setdefault(f"{_key(section, detail['loc'])}: {problem}", []).append(allowed)
    joined = {problem: ", or ".join(allowed) for problem, allowed in told.items()}
    return [
        f"{problem} {allowed.replace(', or Input should be ', ', or ')}".rstrip() for problem, allowed in joined.items()
    ]


def _problem(section: type[Section], detail: dict[str, Any]) -> tuple[str, str]:
    if detail["type"] == "extra_forbidden":
        return f"unknown key (value {_shown(detail)});", f"known here: {', '.join(_keys_at(section, detail['loc']))}"
    if detail["type"] == "missing":
        return "missing;", "give it in the recipe or as a flag"
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):
        # Of settings that do not agree: the message names them.
        return detail["msg"].removeprefix("Value error, "), ""
    return f"{_shown(detail)} is not allowed:", detail["msg"]


def _shown(detail: dict[str, Any]) -> str:
    """The value that was given, unless it may be a credential."""
    first, *_ = loc = detail["loc"] or ("",)
    hidden = first == "storage" or (detail["type"] == "extra_forbidden" and is_secret(str(loc[-1])))
    return MASK if hidden else repr(masked_values(detail["input"], by_name=True))


def _sections(section: type[BaseModel], loc: Loc) -> list[type[BaseModel]]:
    """`section` and those that the first parts of `loc` lead into."""
    field = section.model_fields.get(str(loc[0])) if loc else None
    inner = field.annotation if field else None
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        return [section, *_sections(inner, loc[1:])]
    return [section]


def _keys_at(section: type[BaseModel], loc: Loc) -> list[str]:
    return list(_sections(section, loc)[-1].model_fields)


def _key(section: type[BaseModel], loc: Loc) -> str:
    """Dotted. After a setting of several types pydantic names the type that it tried, which is no key."""
    sections = _sections(section, loc)
    depth = len(sections)
    field = sections[-1].model_fields.get(str(loc[depth - 1])) if len(loc) >= depth else None
    of_several_types = field is not None and get_origin(field.annotation) is Union
    rest = [part for part in loc[depth:] if isinstance(part, int) or not of_several_types]
    return ".".join(map(str, (*loc[:depth], *rest))) or "(recipe)"


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no recipe {path}", "Check the path.") from None
    except OSError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error.strerror}", "Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML recipe: {yaml_problem(error)}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is not a recipe: a mapping of settings is expected", "See jobs/recipes/.")
    return settings


def yaml_problem(error: Exception) -> str:
    """What is wrong and where, without anything of the text itself, which may hold a credential."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return type(error).__name__
    mark, is_syntax = error.problem_mark, isinstance(error, (ScannerError, ParserError))
    return f"{error.problem if is_syntax else type(error).__name__} in line {mark.line + 1}, column {mark.column + 1}"


def _set(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = settings.setdefault(key, {})
        if not isinstance(inner, dict):
            shown = _shown({"loc": tuple(keys[: depth + 1]), "type": "extra_forbidden", "input": inner})
            raise ConfigError(f"{key}: {shown} is not allowed: a mapping is expected")
        settings = inner
    settings[keys[-1]] = value
