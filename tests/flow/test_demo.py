"""What a newcomer runs first, from nothing, and again."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.scenes.shapes import COLOURS, SHAPES
from tests.flow.command import vecmill


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
    # By chance 0.1 and 1.0 %.
    figures = re.search(r"text → image: R@1 ([\d.]+)%.* R@10 ([\d.]+)%", printed)
    assert figures and float(figures[1]) > 20 and float(figures[2]) > 70, printed
    for line in printed.splitlines():
        if line.startswith(f"  {demo}"):
            assert Path(line.split()[0]).exists(), line
    again = vecmill("demo", "--folder", str(demo))
    assert "0 shards embedded, 8 were done before" in again and again.count(" found its original:") == 3
