"""What `vecmill remove` makes of its flags and of who asks."""

import getpass
import os
from pathlib import Path

import pytest

from jobs.remove import asked_for, requester
from pipelines.errors import ConfigError


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert requester().startswith(f"{os.getuid()}@")


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes("\ufeffa\r\nb\n".encode())
    assert asked_for(tmp_path / "keys", None, None, "").keys == ["a", "b"]


@pytest.mark.parametrize("reason", ["asked by John Smith", "John Smith.", "(x/y.jpg)", "of x/y.jpg, twice"])
def test_a_reason_may_not_name_a_key(reason: str) -> None:
    with pytest.raises(ConfigError, match="names a key"):
        asked_for(None, ["John Smith", "x/y.jpg"], None, reason)


def test_a_key_within_a_longer_word_or_number_is_not_named() -> None:
    assert asked_for(None, ["3", "cat"], None, "catalogue of 2013").keys == ["3", "cat"]
