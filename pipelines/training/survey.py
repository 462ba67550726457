"""What a run must know of its training samples before it starts: how many, their words, their identities."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipelines.encoders.matcher_folder import END, PAD, START, UNKNOWN
from pipelines.encoders.matcher_text import words_of

SIGNS = (PAD, UNKNOWN, START, END)


@dataclass(frozen=True)
class Survey:
    """images, captions: numbers of them. vocabulary: words by id. classes: identities by class number, empty where
    nothing classifies. together: images that have what data.together names."""

    images: int
    captions: int
    vocabulary: list[str]
    classes: list[str]
    together: int = 0

    def json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def parse(data: bytes) -> Survey:
        return Survey(**json.loads(data))


@dataclass(frozen=True)
class Count:
    """A table of EXAMPLE to one row, its counts as JSON: a map operator."""

    identities: bool

    def __call__(self, table: pa.Table) -> pa.Table:
        captions = [caption for texts in table.column("captions").to_pylist() for caption in texts]
        words = Counter(word for caption in captions for word in words_of(caption))
        identities = sorted(set(table.column("identity").to_pylist())) if self.identities else []
        counts = {"images": table.num_rows, "captions": len(captions), "words": words, "identities": identities}
        counts["together"] = table.num_rows - table.column("together").null_count
        return pa.table({"counts": [json.dumps(counts)]})


def add_up(counts: Iterable[str], vocabulary_size: int) -> Survey:
    """Memory: the distinct words and identities. Of words as frequent as each other, the alphabet decides."""
    images = captions = together = 0
    words: Counter[str] = Counter()
    identities: set[str] = set()
    for each in counts:
        found: dict[str, Any] = json.loads(each)
        images += found["images"]
        captions += found["captions"]
        together += found["together"]
        words.update(found["words"])
        identities.update(found["identities"])
    known = sorted(words, key=lambda word: (-words[word], word))[: vocabulary_size - len(SIGNS)]
    return Survey(images, captions, [*SIGNS, *known], sorted(identities), together)
