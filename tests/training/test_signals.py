"""Signals wait for the end of a step, or break in where the state is at rest."""

import os
import signal
import threading

import pytest

from pipeline.training.signals import BreakIn, StopSignals


def raise_signal(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_BLOCK, [])  # lets the interpreter run the handler


def test_a_signal_waits_and_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as signals:
        assert signals.received is None
        raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with StopSignals() as signals:
        raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            raise_signal(signal.SIGINT)


def test_at_rest_a_signal_breaks_in() -> None:
    with StopSignals() as signals:
        with pytest.raises(BreakIn), signals.at_rest():
            raise_signal(signal.SIGTERM)
            pytest.fail("the signal did not break in")
        with pytest.raises(BreakIn), signals.at_rest():  # it came before: the rest does not even begin
            pytest.fail("the rest began")


def test_nothing_is_installed_when_disabled_or_in_another_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def look(enabled: bool) -> None:
        with StopSignals(enabled):
            seen.append(signal.getsignal(signal.SIGTERM))

    look(enabled=False)
    thread = threading.Thread(target=look, args=(True,))
    thread.start()
    thread.join()
    assert seen == [before, before]
