"""A signal ends what is being done, once; whoever comes after has the handlers that there were."""

import os
import signal

import pytest

from jobs.signals import SIGNALS, Stopped, handlers_kept, received, stoppable


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_ends_the_block_and_a_second_does_nothing(number: signal.Signals) -> None:
    with stoppable():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
        for again in SIGNALS:
            os.kill(os.getpid(), again)
        assert received() == number
    with stoppable():
        assert received() is None


def test_handlers_are_those_of_before() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stoppable():
        ours = [signal.getsignal(number) for number in SIGNALS]
        with handlers_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert [signal.getsignal(number) for number in SIGNALS] == ours != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
