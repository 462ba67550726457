"""What a newcomer runs first, from nothing, and again."""

from __future__ import annotations

from pathlib import Path

from tests.flow.command import vecmill


def test_the_demo_finds_what_it_altered_and_resumes(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    printed = vecmill("demo", "--folder", str(demo))
    assert "8 shards embedded, 0 were done before" in printed
    assert "995 embedded + 5 rejected" in printed
    assert printed.count(" found its original:") == 3
    for line in printed.splitlines():
        if line.startswith(f"  {demo}"):
            assert Path(line.split()[0]).exists(), line
    again = vecmill("demo", "--folder", str(demo))
    assert "0 shards embedded, 8 were done before" in again and again.count(" found its original:") == 3
