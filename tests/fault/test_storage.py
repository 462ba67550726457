"""A store that is busy, breaks off, lies about lengths, is silent or refuses: the rows are right, or the error is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipelines.storage import Store
from pipelines.verify import problems
from tests.fault.disks import disk_of
from tests.fault.rig import Rig
from tests.flow.command import TIMEOUT_S, Command
from tests.flow.outputs import assert_same
from tests.s3_proxy import PASSING, Chaos

pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)


def of_input(method: str, path: str) -> bool:
    return method in ("GET", "HEAD") and "/in/" in path


def writing(method: str, path: str) -> bool:
    return method in ("PUT", "POST") and "/in/" not in path


@pytest.mark.parametrize("rate", [pytest.param(0.05, marks=pytest.mark.long), 0.3])
def test_a_run_ends_right_although_requests_fail(rig: Rig, rate: float) -> None:
    chaos, output = Chaos(rate, seed=1), f"chaos-{rate}"
    status, printed = rig.run(output, chaos=chaos)
    assert status == 0, printed
    assert rate < 0.1 or set(chaos.made) == set(PASSING)
    rig.require_right(output)


@pytest.mark.long
def test_an_object_that_was_listed_and_is_not_found_for_a_moment_is_read(rig: Rig) -> None:
    chaos = Chaos(0.3, ("missing",), seed=2, matches=of_input)
    status, printed = rig.run("missing", chaos=chaos)
    assert status == 0 and chaos.made["missing"] > 1, printed
    rig.require_right("missing")


@pytest.mark.long
def test_a_store_that_is_silent_for_a_while_is_asked_again(rig: Rig) -> None:
    chaos = Chaos(0.05, ("stall",), seed=3, stall_s=60)
    status, printed = rig.run("stalls", chaos=chaos, storage=rig.impatient(5))
    assert status == 0 and chaos.made["stall"] > 1, printed
    rig.require_right("stalls")


@pytest.mark.parametrize(
    ("kind", "says"), [("refused", "cannot be written"), pytest.param("expired", "access", marks=pytest.mark.long)]
)
def test_an_output_that_may_not_be_written_is_told_before_anything_is_done(rig: Rig, kind: str, says: str) -> None:
    status, printed = rig.run(kind, chaos=Chaos(1.0, (kind,), matches=writing))
    assert status == 2 and says in printed and f"s3://fault/{kind}" in printed and "Traceback" not in printed
    assert rig.store(kind).names("") == []


@pytest.mark.long
def test_credentials_that_expire_on_the_way_end_the_run_and_what_is_committed_stays(rig: Rig) -> None:
    expired: list[str] = []

    def since_the_first_commit(method: str, path: str) -> bool:
        if method == "PUT" and "/commits/clip/" in path:
            expired.append(path)
        return len(expired) > 1

    status, printed = rig.run("expiring", chaos=Chaos(1.0, ("expired",), matches=since_the_first_commit))
    assert status == 2 and "access" in printed and "redentials" in printed and "Traceback" not in printed
    assert rig.store("expiring").names("commits/clip")
    assert rig.run("expiring")[0] == 0
    rig.require_right("expiring")


# -- a local disk --------------------------------------------------------------------------------


@pytest.mark.long
def test_a_disk_that_is_full_ends_the_run_and_room_lets_it_go_on(rig: Rig, tmp_path: Path) -> None:
    with disk_of("150k", tmp_path / "disk") as disk:
        command = rig.command("full", output=str(disk / "out"))
        status, printed = Command(command).wait()
        assert status == 1 and "No space left on device" in printed and "Traceback" not in printed, printed
        assert str(disk / "out") in printed and "run the same command again" in printed
        whole = Store(str(disk / "out"))
        assert not [told for told in problems(whole, deep=True) if "damaged" in told or "bytes" in told]
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        status, printed = Command(command).wait()
        assert status == 0, printed
        assert_same(whole, rig.store("reference"))
