"""Id for id what open_clip's own tokenizer gives, whatever the caption."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from pipelines.encoders.clip_bpe import clip_bpe

LENGTH = 32
ours, library = clip_bpe(LENGTH), SimpleTokenizer(context_length=LENGTH)
PIECES = [
    "<start_of_text>",
    "<END_OF_TEXT>",
    "!!<end_of_text>",
    "'s",
    "'LL",
    "'ſ",
    "İ",
    "K",
    "Ã©",
    "&amp;lt;",
    "\u2028",
]

captions = st.lists(st.one_of(st.text(), st.sampled_from(PIECES), st.text("abc '1é9_-"))).map("".join)


def same(caption: str) -> bool:
    return np.array_equal(ours([caption])[0], library([caption])[0].numpy())


@given(captions)
@example("")
@example("a photo of two children, 12 years old, on Børre's château 🏰…")
def test_any_caption(caption: str) -> None:
    assert same(caption)


@pytest.mark.parametrize("words", [LENGTH - 3, LENGTH - 2, LENGTH - 1, 4 * LENGTH])
def test_a_long_caption_is_cut_as_the_library_cuts_it(words: int) -> None:
    assert same("dog " * words)
    assert ours(["dog " * words]).shape == (1, LENGTH) and ours(["a"]).dtype == np.int32


def test_the_library_is_not_imported() -> None:
    heavy = (
        "import sys, pipelines.encoders.open_clip_text as m; m.clip_bpe(8)(['a dog']); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "False"
