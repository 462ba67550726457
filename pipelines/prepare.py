"""What a run will do, before it does any of it: settings resolved, encoder described, shards planned."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import TYPE_CHECKING, Any, cast

from pipelines import sources
from pipelines.config import ClusterConfig, EncodeConfig, ImageDecodeConfig, Precision, RunConfig
from pipelines.contracts import MODALITIES, SAMPLES_FAMILY, Modality
from pipelines.encoders import registry
from pipelines.encoders.base import EncoderSpec, Target
from pipelines.errors import ConfigError, PreflightError, StorageError
from pipelines.families import EncoderFamily, Family, SamplesFamily, by_name
from pipelines.ledger import Plan, make_plan
from pipelines.record import EncoderRecord, RunRecord, encoder_record, read_record, require_same, require_same_rows
from pipelines.secrets import masked_values
from pipelines.storage import Store, protocol_of

if TYPE_CHECKING:
    from pipelines.encoders.marian import TranslationSpec


@dataclass(frozen=True)
class Cluster:
    """What Ray has to give, in all. node_cpus, node_gpus, node_memory_mib: the most that a node has."""

    cpus: float
    gpus: float
    nodes: int
    node_cpus: float
    node_gpus: float = 0.0
    node_memory_mib: float = inf


@dataclass(frozen=True)
class Prepared:
    """A run ready to start. config holds no "auto" any more. cpus: all that the cluster has.

    translation: None too where no encoder of the run takes captions.
    """

    config: RunConfig
    store: Store
    targets: tuple[Target, ...]
    record: RunRecord
    plan: Plan
    cpus: float
    translation: TranslationSpec | None = None

    @property
    def folders(self) -> list[str]:
        return [target.folder for target in self.targets]

    @property
    def families(self) -> dict[str, Family]:
        return by_name([SamplesFamily(), *map(encoder_family, self.targets)])

    @property
    def device(self) -> str:
        return "cuda" if self.config.encode.gpus_per_actor else "cpu"

    @property
    def pending(self) -> tuple[Target, ...]:
        """The encoders that some shard still lacks."""
        lacking = {family for work in self.plan.pending for family in work.families}
        return tuple(target for target in self.targets if target.folder in lacking)

    @property
    def pools(self) -> list[tuple[Target, ...]]:
        """The pending encoders that share an actor: all, or one each."""
        together = self.config.encode.pools == "together"
        return [self.pending] if together and self.pending else [(target,) for target in self.pending]


def encoder_family(target: Target) -> EncoderFamily:
    vectors = {modality: target.spec.vectors[modality] for modality in target.modalities}
    translated = "translation" in target.spec.details
    return EncoderFamily(target.folder, target.spec.fingerprint, vectors, target.spec.dtype, translated)


def prepare(config: RunConfig, cluster: Cluster) -> Prepared:
    """Reads, and changes nothing. Raises: ConfigError, InputError, PreflightError, EncoderError."""
    store = Store(config.output, config.storage)
    record = read_record(store)
    encode = resolve_encode(config, cluster)
    translation = resolve_translation(config)
    targets = tuple(
        resolve_target(config, encode, at, recorded_encoder(record, config, at), translation)
        for at in range(len(config.encoder))
    )
    require_different(targets)
    settings = masked_values(config.model_dump(mode="json", exclude={"storage"}))
    require_same_rows(record.settings, settings)
    shards, slices = sources.plan_shards(
        config.input, config.format, config.read, Store(options=config.storage), record.slices
    )
    made = {target.folder: encoder_record(target.spec, target.modalities, target.batch_size) for target in targets}
    record = record.model_copy(
        update={
            "slices": {**record.slices, **slices},
            "encoders": {**record.encoders, **made},
            "settings": settings,
        }
    )
    config = config.model_copy(update={"encode": encode.model_copy(update=_agreed(targets))})
    plan = make_plan(store, shards, [SAMPLES_FAMILY, *made], record.encoders.keys() - made.keys())
    if not any(takes_captions(target.modalities) for target in targets):
        translation = None
    return Prepared(config, store, targets, record, plan, cluster.cpus, translation)


Known = tuple[str, EncoderRecord]


def recorded_encoder(record: RunRecord, config: RunConfig, at: int) -> Known | None:
    """The folder and record of the encoder that this run continues, None where it is new to the output."""
    alias = config.aliases[at]
    if alias:
        known = record.encoders.get(alias)
        return (alias, known) if known else None
    for folder, known in record.encoders.items():
        if known.spec["name"] == config.encoder[at] and folder == folder_name(known.encoder_spec({})):
            return folder, known
    return None


def resolve_target(
    config: RunConfig, encode: EncodeConfig, at: int, known: Known | None, translation: TranslationSpec | None
) -> Target:
    """Precision and batch size as recorded, where they are left open. Raises: PreflightError where the encoder is not
    what the output has under its folder."""
    recorded, given = known[1] if known else None, config.encode
    if recorded and given.precision == "auto":
        encode = encode.model_copy(update={"precision": recorded.spec["precision"]})
    batch_size = recorded.batch_size if recorded and given.batch_size == "auto" else int(encode.batch_size)
    spec = resolve_spec(config, encode, config.encoder[at])
    modalities = resolve_modalities(config, spec)
    if takes_captions(modalities):
        spec = resolve_text(config, spec, translation)
    folder = known[0] if known else config.aliases[at] or folder_name(spec)
    if recorded:
        require_same(folder, recorded, spec)
        require_same_modalities(folder, recorded, modalities)
    return Target(folder, spec, modalities, batch_size)


def _agreed(targets: Sequence[Target]) -> dict[str, Any]:
    """Settings that are taken from the record, where all encoders were made with the same."""
    made = {(target.spec.precision, target.batch_size) for target in targets}
    return dict(zip(("precision", "batch_size"), made.pop(), strict=True)) if len(made) == 1 else {}


def takes_captions(modalities: Sequence[Modality]) -> bool:
    return not {"text", "multimodal"}.isdisjoint(modalities)


def require_different(targets: Sequence[Target]) -> None:
    folders = [target.folder for target in targets]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise ConfigError(f"Two encoders would write to embeddings/{twice[0]}", "Name each once.")


def folder_name(spec: EncoderSpec) -> str:
    """One path component: a slug of the name and 8 hex digits of the fingerprint."""
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", spec.name).strip("-.")
    return f"{slug[-80:].strip('-.')}-{spec.fingerprint[:8]}"


def resolve_encode(config: RunConfig, cluster: Cluster) -> EncodeConfig:
    """The same settings without "auto".

    Encoders get actors of their own where there are GPUs for each, and take turns in the same ones elsewhere.
    """
    encode, encoders = config.encode, len(config.encoder)
    free = cluster.gpus - translator_gpus(config)
    on_gpu = free > 0 if encode.gpus_per_actor == "auto" else encode.gpus_per_actor > 0
    gpus = (1.0 if on_gpu else 0.0) if encode.gpus_per_actor == "auto" else encode.gpus_per_actor
    room = max(1, int(free // gpus)) if on_gpu else 1
    pools = encode.pools
    if pools == "auto":
        pools = "each" if encoders > 1 and on_gpu and room >= encoders else "together"
    sharing = encoders if pools == "each" else 1
    chosen: dict[str, Any] = {
        "gpus_per_actor": gpus,
        "pools": pools,
        "actors": max(1, room // sharing),
        "precision": "fp16" if on_gpu else "fp32",
        "batch_size": 256 if on_gpu else 64,
    }
    resolved = {name: value for name, value in chosen.items() if getattr(encode, name) == "auto"}
    encode = encode.model_copy(update=resolved)
    if encode.threads == "auto":
        actors_per_node = ceil(int(encode.actors) * sharing / cluster.nodes)
        encode = encode.model_copy(update={"threads": max(1, int(cluster.node_cpus) // actors_per_node)})
    return encode


def translator_gpus(config: RunConfig) -> float:
    return config.translate.actors * config.translate.gpus_per_actor if config.translate.pair else 0.0


def resolve_spec(config: RunConfig, encode: EncodeConfig, name: str) -> EncoderSpec:
    """The encoder as this run uses it: precision, normalisation, storage and transparency included."""
    spec = registry.describe(name, config.storage)
    image = spec.image
    if image and config.decode.alpha != "reference":
        image = replace(image, alpha=config.decode.alpha)
    return replace(
        spec,
        image=image,
        precision=cast(Precision, encode.precision),
        normalize=encode.normalize and spec.normalize,
        dtype=config.write.dtype,
        max_aspect=config.decode.max_aspect,
    )


def resolve_text(config: RunConfig, spec: EncoderSpec, translation: TranslationSpec | None) -> EncoderSpec:
    """With what happens to captions before an encoder that takes them."""
    details = {**spec.details, "translation": translation.identity()} if translation else spec.details
    return replace(spec, text_clean=config.decode.text_clean, details=details)


def resolve_translation(config: RunConfig) -> TranslationSpec | None:
    if not config.translate.pair:
        return None
    from pipelines.encoders import marian

    return marian.describe(config.translate.pair, config.translate.model, config.storage)


def resolve_modalities(config: RunConfig, spec: EncoderSpec) -> tuple[Modality, ...]:
    """All that the encoder has, of those that are asked for. With several encoders each gives what it can."""
    if config.modalities == "auto":
        return spec.modalities
    given = tuple(modality for modality in MODALITIES if modality in config.modalities)
    has = tuple(modality for modality in given if modality in spec.modalities)
    if not has or (has != given and len(config.encoder) == 1):
        raise ConfigError(
            f"modalities: {', '.join(config.modalities) or 'none'}: {spec.name} embeds {', '.join(spec.modalities)}",
            "Leave --modalities out for all that the encoder has.",
        )
    return has


def require_same_modalities(folder: str, known: EncoderRecord, modalities: tuple[Modality, ...]) -> None:
    if tuple(known.modalities) != modalities:
        raise PreflightError(
            f"embeddings/{folder} holds {', '.join(known.modalities)}; this run asks for {', '.join(modalities)}",
            "Ask for the same, or give this one a new name with --name.",
        )


def require_resources(run: Prepared, cluster: Cluster) -> None:
    """Raises: PreflightError for what would leave the run waiting for ever."""
    _require_gpus(run, cluster)
    _require_memory(run, cluster)
    _require_cpus(run, cluster)


def _require_gpus(run: Prepared, cluster: Cluster) -> None:
    encode, actors = run.config.encode, all_actors(run.config)
    translating = translator_gpus(run.config) if run.translation else 0.0
    gpus = actors * float(encode.gpus_per_actor) + translating
    if gpus > cluster.gpus:
        others = f" and translation of {translating:g}" if translating else ""
        raise PreflightError(
            f"{actors} actors of {encode.gpus_per_actor:g} GPUs{others} need {gpus:g}; the cluster has "
            f"{cluster.gpus:g}",
            "Lower encode.actors or encode.gpus_per_actor (0 runs on CPU), or add GPUs.",
        )
    if float(encode.gpus_per_actor) > cluster.node_gpus or encode.cpus_per_actor > cluster.node_cpus:
        raise PreflightError(
            f"An actor of {encode.gpus_per_actor:g} GPUs and {encode.cpus_per_actor:g} CPUs fits no node: the largest "
            f"has {cluster.node_gpus:g} and {cluster.node_cpus:g}",
            "Lower encode.gpus_per_actor or encode.cpus_per_actor.",
        )


def _require_memory(run: Prepared, cluster: Cluster) -> None:
    translate = run.config.translate
    translating = translate.memory_mib * ceil(translate.actors / cluster.nodes) if run.translation else 0
    beside = Beside(translating, "translation", "translate.memory_mib")
    require_decode_memory(run.config.decode, run.config.cluster, cluster, beside)


@dataclass(frozen=True)
class Beside:
    """Memory of each node that decode tasks do not get: what takes it, and the setting that says how much."""

    mib: int
    what: str
    setting: str


def require_decode_memory(decode: ImageDecodeConfig, settings: ClusterConfig, cluster: Cluster, beside: Beside) -> None:
    """Raises: PreflightError where a decode task fits no node, or an image no decode task."""
    task_mib = settings.memory_per_decode_task_mib
    if task_mib + beside.mib > cluster.node_memory_mib:
        others = f" beside {beside.what} of {beside.mib:,} MiB" if beside.mib else ""
        raise PreflightError(
            f"A decode task of {task_mib:,} MiB{others} fits no node: the largest gives "
            f"{cluster.node_memory_mib:,.0f} MiB",
            "Lower cluster.memory_per_decode_task_mib" + (f" or {beside.setting}." if beside.mib else "."),
        )
    if decode.peak_mib > task_mib:
        raise PreflightError(
            f"An image of decode.max_pixels = {decode.max_pixels:,} can take {decode.peak_mib:,} MiB; a "
            f"decode task has {task_mib:,} MiB",
            f"Set cluster.memory_per_decode_task_mib to {decode.peak_mib} or more, or lower decode.max_pixels.",
        )


def needed_cpus(run: Prepared) -> float:
    encode = run.config.encode
    return all_actors(run.config) * encode.cpus_per_actor + translators(run) + run.config.cluster.spare_cpus


def translators(run: Prepared) -> int:
    return run.config.translate.actors if run.translation else 0


def _require_cpus(run: Prepared, cluster: Cluster) -> None:
    config, cpus = run.config, needed_cpus(run)
    if cpus > cluster.cpus:
        translating = f", {translators(run)} of translation" if run.translation else ""
        raise PreflightError(
            f"{all_actors(config)} actors of {config.encode.cpus_per_actor:g} CPUs{translating} and "
            f"{config.cluster.spare_cpus:g} to spare for reading, decoding and writing need {cpus:g} CPUs; the "
            f"cluster has {cluster.cpus:g}",
            "Lower encode.actors or encode.cpus_per_actor, or add CPUs: with fewer the run would hang.",
        )


def all_actors(config: RunConfig) -> int:
    pools = len(config.encoder) if config.encode.pools == "each" else 1
    return int(config.encode.actors) * pools


def require_output(store: Store) -> None:
    """Raises: PreflightError where the output cannot be written, or has no create-if-absent."""
    if protocol_of(store.root) in ("memory", "http", "https"):
        raise PreflightError(
            f"{store.root} cannot be an output: its protocol cannot be written by several processes",
            "Use a folder that every node sees, or object storage.",
        )
    token = uuid.uuid4().hex
    probe, first = f"staging/probe-{token}", token.encode()
    try:
        # Not put, and yet ours: its acknowledgement was lost.
        created = store.put_if_absent(probe, first) or store.read(probe) == first
        exclusive = created and not store.put_if_absent(probe, b"")
        store.delete([probe])
    except (OSError, StorageError) as error:
        raise PreflightError(f"{store.root} cannot be written: {error}", "Check the path and permissions.") from None
    if not exclusive:
        raise PreflightError(
            f"{store.root} does not honour create-if-absent, so two runs could both commit a shard",
            "Use AWS S3, Ceph, MinIO, GCS or a local or network file system with hard links.",
        )
