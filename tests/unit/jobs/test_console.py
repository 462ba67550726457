import json

import pytest

from jobs import console
from jobs.console import RunProgress, err


def test_elsewhere_than_on_a_terminal_a_line_is_printed_every_30_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with RunProgress(8) as progress:
        for at in (110, 131, 140, 162):
            now[0] = at
            progress({"encode": {"rows": 310.0}, "write": {"rows": 200.0, "shards": 2.0}})
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first == {
        "event": "progress",
        "shards_done": 2,
        "shards": 8,
        "rows": {"encode": 310, "write": 200},
        "rows_per_second": 10.0,
        "elapsed_s": 31,
        "eta_s": 93,
    }
    assert second["elapsed_s"] == 62


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    err.print("open_clip:x: [bold]", markup=False)
    assert capsys.readouterr().err == "open_clip:x: [bold]\n"
