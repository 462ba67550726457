"""What may be done to a caption before it is tokenised."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

TextClean = Literal["none", "lavis"]

_LAVIS_MARKS = re.compile(r"[.!\"()*#:;~]")
_LAVIS_WORDS = 50


def lavis(caption: str) -> str:
    """As LAVIS's `blip_caption` processor: lower case, some punctuation gone, at most 50 words.

    https://github.com/salesforce/LAVIS, lavis/processors/blip_processors.py
    """
    caption = _LAVIS_MARKS.sub(" ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    words = caption.split(" ")
    return " ".join(words[:_LAVIS_WORDS])


CLEANERS: dict[TextClean, Callable[[str], str]] = {"none": lambda caption: caption, "lavis": lavis}
