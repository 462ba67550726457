"""`run.json`: what an output was made with. What a recipe leaves open is resolved once and kept here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipelines.contracts import Modality
from pipelines.encoders.base import EncoderSpec
from pipelines.errors import LedgerError, PreflightError
from pipelines.lease import in_turn
from pipelines.storage import Store, is_whole_json

FILE = "run.json"
_LIBRARIES = ("vecmill", "ray", "torch", "transformers", "open_clip_torch", "timm", "pyarrow", "pillow", "numpy")
_ROW_SETTINGS = (
    "read.image_column",
    "read.caption_column",
    "read.key_column",
    "read.splits",
    "read.max_caption_bytes",
    "read.max_image_bytes",
    "decode.max_pixels",
)


class EncoderRecord(BaseModel):
    """One encoder of an output, under the name of its folder in `embeddings/`."""

    fingerprint: str
    spec: dict[str, Any]
    modalities: list[Modality]
    batch_size: int
    versions: dict[str, str]

    def encoder_spec(self, options: dict[str, dict[str, Any]]) -> EncoderSpec:
        try:
            return replace(TypeAdapter(EncoderSpec).validate_python(self.spec), options=options)
        except ValidationError:
            raise LedgerError(
                f"{FILE} describes the encoder {self.spec.get('name')} as another version of vecmill does",
                "Go on with that version, or start a new output.",
            ) from None


class RunRecord(BaseModel):
    """The whole of `run.json`. slices: how many slices each folder or manifest (by uri) is cut into,
    which stays as first resolved."""

    encoders: dict[str, EncoderRecord] = {}
    slices: dict[str, int] = {}
    settings: dict[str, Any] = {}


def read_record(store: Store) -> RunRecord:
    """Empty where the output is new."""
    try:
        data = store.read(FILE, is_whole_json)
    except (FileNotFoundError, NotADirectoryError):
        return RunRecord()
    try:
        return RunRecord.model_validate_json(data)
    except ValueError as error:
        raise LedgerError(f"{store.uri(FILE)} is not a run record: {error}", "Is this a vecmill output?") from None


def write_record(store: Store, record: RunRecord) -> None:
    """Keeps what other runs have recorded since `record` was read, also at the same moment.

    Raises: PreflightError where that contradicts it.
    """
    with in_turn(store, "record", "embed"):
        there = read_record(store)
        _require_agreement(store, there, record)
        merged = record.model_copy(
            update={
                "encoders": {**there.encoders, **record.encoders},
                "slices": {**there.slices, **record.slices},
            }
        )
        store.put_atomic(FILE, json.dumps(merged.model_dump(), indent=2, sort_keys=True).encode())


def _require_agreement(store: Store, there: RunRecord, record: RunRecord) -> None:
    for folder in record.encoders.keys() & there.encoders.keys():
        if there.encoders[folder].fingerprint != record.encoders[folder].fingerprint:
            require_same(folder, there.encoders[folder], record.encoders[folder].encoder_spec({}))
    if any(record.slices.get(uri, count) != count for uri, count in there.slices.items()):
        raise PreflightError(
            f"Another run has just cut the same input into shards for {store.root}", "Run the same command again."
        )
    require_same_rows(there.settings, record.settings)


def require_same_rows(recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    """The settings that decide which rows a shard gives and what is in them must be those of the shards done so far.

    recorded, settings: of a RunRecord. Raises: PreflightError that shows the difference.
    """
    before, after = ({key: _at(one, key) for key in _ROW_SETTINGS} for one in (recorded, settings))
    changed = differences(before, after)
    if recorded and changed:
        shown = "\n  ".join(changed)
        raise PreflightError(
            f"The shards in this output were read with other settings:\n  {shown}",
            "Rows of the two do not mix. Give this run another --output, or restore the settings above.",
        )


def _at(settings: dict[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        settings = (settings or {}).get(key)  # type: ignore[assignment]
    return settings


def encoder_record(spec: EncoderSpec, modalities: tuple[Modality, ...], batch_size: int) -> EncoderRecord:
    fields = asdict(replace(spec, options={}))
    return EncoderRecord(
        fingerprint=spec.fingerprint,
        spec=json.loads(json.dumps(fields)),
        modalities=list(modalities),
        batch_size=batch_size,
        versions={library: version(library) for library in _LIBRARIES},
    )


def require_same(folder: str, recorded: EncoderRecord, spec: EncoderSpec) -> None:
    """Raises: PreflightError that shows how `spec` differs from what made the output's `folder`."""
    if recorded.fingerprint == spec.fingerprint:
        return
    before = recorded.encoder_spec(spec.options).identity()
    shown = "\n  ".join(differences(before, spec.identity()))
    raise PreflightError(
        f"embeddings/{folder} was made by another encoder:\n  {shown}",
        "Vectors of the two do not mix. Give this one a new name with --name, or restore the settings above.",
    )


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """`path: before → after`, a line for each value that differs between two JSON values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [
            line for key in keys for line in differences(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if before == after else [f"{path}: {before!r} → {after!r}"]
