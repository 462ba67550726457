import json
import re
from pathlib import Path

import pytest

from jobs import cli, console
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
        "encoders": 1,
        "rows": {"encode": 310, "write": 200},
        "rows_per_second": 10.0,
        "elapsed_s": 31,
        "eta_s": 93,
    }
    assert second["elapsed_s"] == 62


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    err.print("open_clip:x: [bold]", markup=False)
    assert capsys.readouterr().err == "open_clip:x: [bold]\n"


def test_what_is_not_known_to_go_wrong_is_one_message_with_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    told, where = capsys.readouterr().err.splitlines()
    assert told == "vecmill: failed unexpectedly: RuntimeError: first line"
    log = Path(re.search(r"\S+\.log", where)[0])  # type: ignore[index]
    assert "second line" in log.read_text() and "Traceback" in log.read_text()
    log.unlink()
