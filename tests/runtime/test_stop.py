"""SIGTERM and Ctrl-C: the first is a wish, the next one is final."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from raygrow.runtime.stop import stop_wish


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_wish(number: signal.Signals) -> None:
    with stop_wish() as wish:
        assert not wish.made
        signal.raise_signal(number)
        assert wish.made


def test_the_second_is_final() -> None:
    with stop_wish():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_are_as_before_afterwards() -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_wish():
        assert signal.getsignal(signal.SIGTERM) != handlers[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_other_threads_take_no_signals() -> None:
    def wished() -> bool:
        with stop_wish() as wish:
            return wish.made

    with ThreadPoolExecutor() as pool:
        assert not pool.submit(wished).result()
