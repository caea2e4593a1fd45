"""The inbox: every event is handled once, by one thread at a time, and nobody waits for a lock."""

import threading
from collections import Counter, deque
from typing import Any

import pytest

from lemcal_async.ratelimit._waiters import Inbox


class Recorder:
    """An inbox of names, and what became of them."""

    def __init__(self) -> None:
        self.handled: list[str] = []
        self.inbox: Inbox[str] = Inbox(self.handled.append)


def nothing() -> None:
    """Be an event that changes nothing."""


def test_events_are_handled_in_order() -> None:
    """The subject of an event is handled right after it."""
    recorder = Recorder()
    seen: list[str] = []
    recorder.inbox.post("a", seen.append, "event")
    assert (["event"], ["a"]) == (seen, recorder.handled)


def test_an_event_may_find_what_it_is_about() -> None:
    """What an event returns counts; if there is nothing, nothing is handled."""
    recorder = Recorder()
    recorder.inbox.post(None, lambda: "found")
    recorder.inbox.post(None, nothing)
    assert ["found"] == recorder.handled


def test_an_event_posted_by_an_event_comes_next() -> None:
    """Its own thread is at work, so it only leaves the event: nothing is handled inside of it."""
    recorder = Recorder()

    def first() -> None:
        recorder.inbox.post("b", nothing)
        assert recorder.inbox.busy
        assert [] == recorder.handled

    recorder.inbox.post("a", first)
    assert ["a", "b"] == recorder.handled
    assert not recorder.inbox.busy


def test_nobody_waits_for_whoever_is_at_work() -> None:
    """While a thread is stuck, others leave their events, which that thread finds when it goes on."""
    recorder = Recorder()
    stuck, go_on = threading.Event(), threading.Event()

    def block() -> None:
        stuck.set()
        assert go_on.wait(30)

    thread = threading.Thread(target=recorder.inbox.post, args=("a", block))
    thread.start()
    assert stuck.wait(30)
    recorder.inbox.post("b", nothing)
    assert [] == recorder.handled
    go_on.set()
    thread.join(30)
    assert ["a", "b"] == recorder.handled


def test_an_event_at_the_last_moment() -> None:
    """What comes when the inbox was found empty, and before the lock is free, is not left behind."""
    recorder = Recorder()

    class LateRelease:
        """A lock of which somebody posts an event just before it is released."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.acquire = self.lock.acquire
            self.late = ["b"]

        def release(self) -> None:
            """Post, and then release."""
            while self.late:
                recorder.inbox.post(self.late.pop(), nothing)
            self.lock.release()

    recorder.inbox._lock = LateRelease()  # type: ignore[assignment]
    recorder.inbox.post("a", nothing)
    assert ["a", "b"] == recorder.handled


def test_deferred_calls_run_with_nothing_held() -> None:
    """A log handler may do anything, and post to the same inbox."""
    recorder = Recorder()
    held: list[bool] = []
    recorder.inbox.post("a", lambda: recorder.inbox.defer(lambda: held.append(recorder.inbox.busy)))
    assert [False] == held


def test_a_deferred_call_that_another_thread_takes() -> None:
    """Two threads that find the same call run it once."""
    recorder = Recorder()

    class Taken(deque[Any]):
        """One call, which somebody else takes between the look and the grasp."""

        def popleft(self) -> Any:
            """Find nothing any more."""
            raise IndexError

    recorder.inbox._deferred = Taken([None])
    recorder.inbox.post("a", nothing)
    assert ["a"] == recorder.handled


def test_after_a_reset_nobody_is_at_work() -> None:
    """As in the child of a fork: the lock that another thread held is free, its events are gone."""
    recorder = Recorder()
    recorder.inbox._lock.acquire()
    recorder.inbox.post("lost", pytest.fail)
    recorder.inbox.reset()
    recorder.inbox.post("a", nothing)
    assert ["a"] == recorder.handled


def test_threads_that_hammer() -> None:
    """Whatever meets, each event is handled exactly once."""
    recorder = Recorder()
    names = [f"{thread}:{number}" for thread in range(4) for number in range(500)]

    def hammer(mine: list[str]) -> None:
        for name in mine:
            recorder.inbox.post(name, nothing)

    threads = [threading.Thread(target=hammer, args=(names[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert Counter(names) == Counter(recorder.handled)
