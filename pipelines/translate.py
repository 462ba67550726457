"""The translate operator: captions in another language get a translation, which is embedded in their place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import REJECT_ITEM, SAMPLE, Reject
from pipelines.observe import Clock, Observe, nowhere, peak_memory_mib

STAGE = "translate"
REMEMBERED = 100_000
"""Captions whose translation is kept: photos come with the same few words again and again."""

SHORT = 1_000
"""Letters of a caption that is worth remembering."""
FAULTS_OF_A_TEXT = (ValueError, TypeError, LookupError, OverflowError)

TranslateAll = Callable[[list[str]], list[str]]


class Translate:
    """Tables of schema SAMPLE with their `translations`. An actor: the model is loaded once.

    spec: of `encoders.marian`. A caption that cannot be translated is a reject; blank ones stay as they are.
    """

    def __init__(self, spec: Any, batch_size: int, device: str, observe: Observe = nowhere) -> None:
        import torch

        from pipelines.encoders.marian import Translator

        self._translated = Remembering(Translator(spec, torch.device(device), batch_size))
        self._observe = observe

    def __call__(self, table: pa.Table) -> pa.Table:
        clock = Clock()
        with clock.running():
            translated = with_translations(table, self._translated)
        rows = table.num_rows - pc.sum(table["end"], min_count=0).as_py()
        self._observe(stage=STAGE, rows=rows, seconds=clock.seconds, peak_mib=peak_memory_mib())
        return translated


class Remembering:
    """Translates what it has not translated lately. Equal captions of a batch are translated once."""

    def __init__(self, translate: TranslateAll, size: int = REMEMBERED) -> None:
        self._translate, self._size = translate, size
        self._known: OrderedDict[str, str] = OrderedDict()

    def __call__(self, texts: list[str]) -> list[str | Exception]:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        fresh = dict(zip(new, one_by_one(self._translate, new), strict=True))
        found = [fresh[text] if text in fresh else self._known[text] for text in texts]
        for text, translation in zip(texts, found, strict=True):
            if isinstance(translation, str) and len(text) <= SHORT:
                self._known[text] = translation
                self._known.move_to_end(text)
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return found


def one_by_one(translate: TranslateAll, texts: list[str]) -> list[str | Exception]:
    """All at once; one by one where that fails, to know which. A device that fails is no fault of a caption's."""
    if not texts:
        return []
    try:
        return list(translate(texts))
    except FAULTS_OF_A_TEXT as error:
        if len(texts) == 1:
            return [error]
        return [found for text in texts for found in one_by_one(translate, [text])]


def with_translations(table: pa.Table, translate: Callable[[list[str]], list[str | Exception]]) -> pa.Table:
    rows: list[list[str | None]] = [captions or [] for captions in table["captions"].to_pylist()]
    rejects: list[list[dict[str, Any]]] = [row or [] for row in table["rejects"].to_pylist()]
    places = [(row, at) for row, texts in enumerate(rows) for at, text in enumerate(texts) if text and text.strip()]
    found = translate([rows[row][at] or "" for row, at in places])
    translations: list[list[str | None]] = [[None] * len(texts) for texts in rows]
    for (row, at), text in zip(places, found, strict=True):
        if isinstance(text, Exception):
            detail = f"{type(text).__name__}: {text}"[:300]
            rejects[row].append(asdict(Reject("text", STAGE, "translation_failed", detail, at)))
        else:
            translations[row][at] = text
    new = {
        "translations": pa.array(translations, SAMPLE.field("translations").type),
        "rejects": pa.array(rejects, pa.list_(REJECT_ITEM)),
    }
    return pa.Table.from_arrays([new.get(name, table[name]) for name in SAMPLE.names], schema=SAMPLE)
