"""Events reach subscribed listeners; a failing listener affects no other."""

import logging

import pytest

from lemcal_async import events

PAUSED = events.Paused("0123abcd", 1.283)


def test_listener_is_called_until_it_unsubscribes() -> None:
    """Other listeners continue to receive events."""
    first: list[events.Event] = []
    second: list[events.Event] = []
    assert not events.wanted()
    unsubscribe = events.subscribe(first.append)
    unsubscribe_second = events.subscribe(second.append)
    assert events.wanted()
    events.emit(PAUSED)
    unsubscribe()
    events.emit(PAUSED)
    unsubscribe_second()
    events.emit(PAUSED)
    assert ([PAUSED], [PAUSED, PAUSED]) == (first, second)
    assert not events.wanted()


def test_failing_listener(caplog: pytest.LogCaptureFixture) -> None:
    """Its exception is logged with a traceback, and other listeners are called."""
    received: list[events.Event] = []

    def fail(_: events.Event) -> None:
        raise ValueError("no")

    unsubscribe, unsubscribe_second = events.subscribe(fail), events.subscribe(received.append)
    try:
        with caplog.at_level(logging.ERROR, "lemcal_async"):
            events.emit(PAUSED)
    finally:
        unsubscribe()
        unsubscribe_second()
    assert [PAUSED] == received
    assert ["an event listener failed on Paused"] == [record.getMessage() for record in caplog.records]
    assert caplog.records[0].exc_info
