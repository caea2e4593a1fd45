"""Events reach those who subscribed, and cost nothing else."""

import logging

import pytest

from lemcal_async import events

PAUSED = events.Paused("0123abcd", 1.283)


def test_a_listener_hears_until_it_unsubscribes() -> None:
    """Others go on hearing."""
    first: list[events.Event] = []
    second: list[events.Event] = []
    assert not events.wanted()
    leave = events.subscribe(first.append)
    leave_too = events.subscribe(second.append)
    assert events.wanted()
    events.emit(PAUSED)
    leave()
    events.emit(PAUSED)
    leave_too()
    events.emit(PAUSED)
    assert ([PAUSED], [PAUSED, PAUSED]) == (first, second)
    assert not events.wanted()


def test_a_listener_that_fails_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with its traceback."""
    heard: list[events.Event] = []

    def fail(_: events.Event) -> None:
        raise ValueError("no")

    leave, leave_too = events.subscribe(fail), events.subscribe(heard.append)
    try:
        with caplog.at_level(logging.ERROR, "lemcal_async"):
            events.emit(PAUSED)
    finally:
        leave()
        leave_too()
    assert [PAUSED] == heard
    assert ["an event listener failed on Paused"] == [record.getMessage() for record in caplog.records]
    assert caplog.records[0].exc_info
