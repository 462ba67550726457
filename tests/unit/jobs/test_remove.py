"""What `vecmill remove` makes of its flags and of who asks."""

import getpass
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from jobs.remove import asked_for, remove, requester
from pipelines.errors import ConfigError, IndexBuildError, InputError
from pipelines.storage import Store
from tests.indexed import key_of
from tests.unit.test_search import write_release


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert requester().startswith(f"{os.getuid()}@")


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes("\ufeffa\r\nb\n".encode())
    assert asked_for(Store(), str(tmp_path / "keys"), None, None, "").keys == ["a", "b"]


def test_keys_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b" a \rb/c\n\nd\te\n")
    assert asked_for(Store(), str(tmp_path / "keys"), None, None, "").keys == [" a \rb/c", "d\te"]


def test_keys_may_come_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys")
    writer = threading.Thread(target=lambda: (tmp_path / "keys").write_bytes(b"a\nb\n"))
    writer.start()
    assert asked_for(Store(), str(tmp_path / "keys"), None, None, "").keys == ["a", "b"]
    writer.join()


def test_keys_may_lie_in_a_bucket(s3_options: dict[str, Any]) -> None:
    inputs = Store(options={"s3": s3_options})
    inputs.put_atomic("s3://bucket/keys.txt", b"a\nb\n")
    assert asked_for(inputs, "s3://bucket/keys.txt", None, None, "").keys == ["a", "b"]
    with pytest.raises(InputError, match=r"s3://bucket/none\.txt cannot be read"):
        asked_for(inputs, "s3://bucket/none.txt", None, None, "")


@pytest.mark.parametrize("reason", ["asked by John Smith", "John Smith.", "(x/y.jpg)", "of x/y.jpg, twice"])
def test_a_reason_may_not_name_a_key(reason: str) -> None:
    with pytest.raises(ConfigError, match="names a key"):
        asked_for(Store(), None, ["John Smith", "x/y.jpg"], None, reason)


def test_a_key_within_a_longer_word_or_number_is_not_named() -> None:
    assert asked_for(Store(), None, ["3", "cat"], None, "catalogue of 2013").keys == ["3", "cat"]


def test_of_keys_that_no_sample_has_and_releases_that_wait_both_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_release(tmp_path)
    with pytest.raises(InputError, match="1 of what was asked for are in no sample"):
        remove(str(tmp_path), key=[key_of(0, 3), "nowhere"], compact=True)
    assert "vectors of what was taken down are in the current release" in capsys.readouterr().err
    with pytest.raises(IndexBuildError, match="are in the current release"):
        remove(str(tmp_path), compact=True)
