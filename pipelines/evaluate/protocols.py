"""The protocols of retrieval: what is asked with what, by whom it is answered, and what bars it.

captions: image→text and text→image, a hit is any caption of the image and the image of the caption (Karpathy and
Fei-Fei, CVPR 2015). identity: text→image, a hit is any image of the same person (CUHK-PEDES; Li et al., CVPR 2017).
label: image→image, a hit is any other image of the same label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.contracts import Modality
from pipelines.errors import ConfigError
from pipelines.evaluate.ranking import Room
from pipelines.index.cache import Cache
from pipelines.record import read_record
from pipelines.storage import Store

Protocol = Literal["captions", "identity", "label"]
PROTOCOLS: tuple[Protocol, ...] = ("captions", "identity", "label")
DIRECTIONS: dict[Protocol, list[tuple[Modality, Modality]]] = {
    "captions": [("image", "text"), ("text", "image")],
    "identity": [("text", "image")],
    "label": [("image", "image")],
}
WHERE_LABELS_ARE = "Labels are the sub-folders of an input folder, or its column `label`."
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to evaluate. identity: the metadata's field that says who it is. split: of the samples that ask and are
    found. sample: queries of a direction at most, as many as make 2·10⁹ comparisons (1,000 at least) if None.
    fold: samples in order are cut into folds of so many, each ranked by itself: captions alone, all that there are,
    and exactly. release: that the index figures are of, else the current one; index: whether there are any.
    cache: of its files, as `Searcher` takes it.
    """

    protocols: tuple[Protocol, ...] = ()
    identity: str | None = None
    split: str | None = None
    sample: int | None = None
    fold: int | None = None
    release: str | None = None
    index: bool = True
    seed: int = 0
    room: Room = field(default_factory=Room)
    cache: Cache | None = None


@dataclass(frozen=True)
class Result:
    """The figures of one direction of a protocol. queries: that were ranked, of so many; unanswerable: drawn, but
    nothing is relevant for them. through: what the index finds, exact search beside it, and the loss."""

    protocol: Protocol
    asks: Modality
    finds: Modality
    queries: int
    of: int
    unanswerable: int
    gallery: int
    folds: int
    figures: dict[str, float]
    through: dict[str, Any] | None = None


def require_comparable(store: Store, encoder: str, one: Modality, other: Modality) -> None:
    """Raises: ConfigError where vectors of the two modalities are of different spaces, or there are none."""
    record = read_record(store).encoders[encoder]
    spaces = record.encoder_spec(store.options).vectors
    for modality in (one, other):
        if modality not in record.modalities:
            raise ConfigError(
                f"embeddings/{encoder} has no {modality} vectors", f"It has: {', '.join(record.modalities)}."
            )
    if spaces[one].space != spaces[other].space:
        raise ConfigError(
            f"embeddings/{encoder}: {one} vectors are of the space {spaces[one].space}, {other} vectors of "
            f"{spaces[other].space}: they cannot be compared",
            "Evaluate another protocol, or embed with an option that puts both in one space (`vecmill encoders`).",
        )


def grouped_by(protocol: Protocol, asked: Asked) -> str:
    if protocol == "identity" and not asked.identity:
        raise ConfigError("The identity protocol needs to know who is who", "Name the metadata's field: --identity id.")
    return {"captions": "sample", "label": "label"}.get(protocol) or str(asked.identity)


def require_items(total: int, encoder: str, protocol: Protocol, modality: Modality, asked: Asked) -> None:
    if total:
        return
    of = f" of the split {asked.split}" if asked.split else ""
    having, fix = {
        "captions": ("", "`vecmill status` tells what there is."),
        "identity": (f" whose metadata have the field {asked.identity}", "Check --identity."),
        "label": (" with a label", WHERE_LABELS_ARE),
    }[protocol]
    raise ConfigError(
        f"embeddings/{encoder} has no {modality} vectors{of}{having} to ask with",
        f"Check --queries. {fix}" if asked.split else fix,
    )


def require_answers(answerable: int, protocol: Protocol) -> None:
    if not answerable:
        raise ConfigError(
            f"None of the queries has anything relevant by the protocol {protocol}", "Choose another --protocol."
        )
