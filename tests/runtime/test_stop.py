"""SIGTERM and Ctrl-C: the first is a wish, the next one is final."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from raygrow.runtime.stop import stop_wish


@pytest.fixture(autouse=True)
def _python_listens_to_ctrl_c() -> Iterator[None]:
    """As in a terminal; a process started in the background may be told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
