"""What a newcomer runs first, from nothing, and again."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.scenes.shapes import COLOURS, SHAPES
from tests.flow.command import vecmill

SAID = {
    "a green star above a pink heart": (
        "green star (above|over|on top of) .*pink heart", "pink heart (below|under|beneath) .*green star",
    ),
    "a red hexagon inside a blue ring": ("red hexagon inside .*blue ring", "blue ring with .*red hexagon in it"),
    "a black ring right of a red arrow": (
        "black ring (to the )?right of .*red arrow", "red arrow (to the )?left of .*black ring",
    ),
}  # fmt: skip
"""How the captions put what is typed, and not the other way round."""


def test_the_demo_finds_by_words_and_what_it_altered_and_resumes(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    printed = vecmill("demo", "--folder", str(demo))
    assert "8 shards embedded, 0 were done before" in printed
    assert "995 embedded + 5 rejected" in printed
    assert printed.count(" found its original:") == 3
    shown = dict(re.findall(r'^  "(.*)":\n    1  [\d.]+  \S+  (.*)$', printed, re.MULTILINE))
    assert len(shown) == 3
    for text, caption in shown.items():
        said = re.findall(rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})", text)
        assert len(said) == 2 and all(thing in caption for thing in said), (text, caption)
        assert any(re.search(way, caption) for way in SAID[text]), (text, caption)
    # By chance 0.1 and 1.0 %.
    figures = re.search(r"text → image: R@1 ([\d.]+)%.* R@10 ([\d.]+)%", printed)
    assert figures and float(figures[1]) > 60 and float(figures[2]) > 95, printed
    for line in printed.splitlines():
        if line.startswith(f"  {demo}"):
            assert Path(line.split()[0]).exists(), line
    again = vecmill("demo", "--folder", str(demo))
    assert "0 shards embedded, 8 were done before" in again and again.count(" found its original:") == 3
