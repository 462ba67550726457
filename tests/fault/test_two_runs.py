"""Two runs at once on one output: one waits its turn, and where it does not, the output is right all the same."""

from __future__ import annotations

import os
import re
import signal

import pytest

from pipelines.errors import HeldError
from tests.fault.rig import Rig
from tests.flow.command import TIMEOUT_S, Command, vecmill
from tests.s3_proxy import Trap

pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)


def at_the_first_fragment(what: object) -> Trap:
    return Trap("PUT", lambda path: path.endswith(".arrow"), what, after=True, apart=True)  # type: ignore[arg-type]


def test_the_second_is_told_who_is_at_work_and_the_first_ends_right(rig: Rig) -> None:
    seconds: list[Command] = []
    first = Command(rig.command("held"))
    with rig.proxy.set(at_the_first_fragment(lambda: seconds.append(Command(rig.command("held"))))):
        status, printed = first.wait()
    assert status == 0, printed
    status, printed = seconds[0].wait()
    assert status == HeldError.exit_code, printed
    assert re.search(rf"s3://fault/held is held by another run: embed on \S+, process {first.pid}, since", printed)
    rig.require_right("held")


@pytest.mark.long
def test_collecting_waits_for_a_run_and_a_dry_run_does_not(rig: Rig) -> None:
    told: list[str] = []

    def collect() -> None:
        recipe = rig.recipe("collected")
        told.append(vecmill("collect", recipe))
        told.append(vecmill("collect", recipe, "--apply", status=HeldError.exit_code))

    first = Command(rig.command("collected"))
    with rig.proxy.set(Trap("PUT", lambda path: "/commits/clip/" in path, collect, apart=True)):
        status, printed = first.wait()
    assert status == 0, printed
    assert "staging" in told[0] and "Nothing was changed" in told[0] and "held by another run" in told[1]
    rig.require_right("collected")


@pytest.mark.long
def test_two_that_know_nothing_of_each_other_are_right_together(rig: Rig) -> None:
    """The lease is taken away from a run that lives, so that for a while both write; the first then ends itself."""
    seconds: list[Command] = []

    def rob() -> None:
        rig.store("both").delete(f"leases/{name}" for name in rig.store("both").names("leases"))
        seconds.append(Command(rig.command("both")))

    first = Command(rig.command("both"))
    with rig.proxy.set(at_the_first_fragment(rob)):
        ended = [first.wait()]
    ended.append(seconds[0].wait())
    assert {status for status, _ in ended} <= {0, HeldError.exit_code} and 0 in {status for status, _ in ended}, ended
    rig.require_right("both")


@pytest.mark.long
def test_the_lease_of_one_that_was_killed_is_taken_at_once(rig: Rig) -> None:
    first = Command(rig.command("dead"))
    with rig.proxy.set(at_the_first_fragment(lambda: os.kill(first.pid, signal.SIGKILL))):
        assert first.wait()[0] == -signal.SIGKILL
    assert rig.store("dead").names("leases")
    status, printed = rig.run("dead")
    assert status == 0 and "held" not in printed, printed
    rig.require_right("dead")
