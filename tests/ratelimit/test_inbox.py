"""The inbox: every event is handled once, by one thread at a time, and no thread blocks."""

import threading
from collections import Counter, deque
from typing import Any

import pytest

from lemcal_async.ratelimit._waiters import Inbox


class Recorder:
    """An inbox of strings that records what is handled."""

    def __init__(self) -> None:
        self.handled: list[str] = []
        self.inbox: Inbox[str] = Inbox(self.handled.append)


def nothing() -> None:
    """Do nothing: an event without an effect."""


def test_events_are_handled_in_order() -> None:
    """The subject of an event is handled right after it."""
    recorder = Recorder()
    seen: list[str] = []
    recorder.inbox.post("a", seen.append, "event")
    assert (["event"], ["a"]) == (seen, recorder.handled)


def test_event_may_return_its_subject() -> None:
    """The subject returned by an event is handled; without a subject, nothing is handled."""
    recorder = Recorder()
    recorder.inbox.post(None, lambda: "found")
    recorder.inbox.post(None, nothing)
    assert ["found"] == recorder.handled


def test_event_posted_by_an_event_is_handled_afterward() -> None:
    """A nested event is only queued, because its own thread is already processing the inbox."""
    recorder = Recorder()

    def first() -> None:
        recorder.inbox.post("b", nothing)
        assert recorder.inbox.busy
        assert [] == recorder.handled

    recorder.inbox.post("a", first)
    assert ["a", "b"] == recorder.handled
    assert not recorder.inbox.busy


def test_posting_does_not_block_while_another_thread_is_busy() -> None:
    """While one thread is stuck, others queue their events, which that thread handles when it continues."""
    recorder = Recorder()
    stuck, resume = threading.Event(), threading.Event()

    def block() -> None:
        stuck.set()
        assert resume.wait(30)

    thread = threading.Thread(target=recorder.inbox.post, args=("a", block))
    thread.start()
    assert stuck.wait(30)
    recorder.inbox.post("b", nothing)
    assert [] == recorder.handled
    resume.set()
    thread.join(30)
    assert ["a", "b"] == recorder.handled


def test_event_posted_just_before_the_lock_is_released() -> None:
    """An event posted after the inbox was found empty, but before the lock is released, is not lost."""
    recorder = Recorder()

    class LateRelease:
        """A lock that posts an event just before it is released."""

        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.acquire = self.lock.acquire
            self.late = ["b"]

        def release(self) -> None:
            """Post an event, then release the lock."""
            while self.late:
                recorder.inbox.post(self.late.pop(), nothing)
            self.lock.release()

    recorder.inbox._lock = LateRelease()  # type: ignore[assignment]
    recorder.inbox.post("a", nothing)
    assert ["a", "b"] == recorder.handled


def test_deferred_calls_run_without_the_lock() -> None:
    """A log handler may do anything, including post to the same inbox."""
    recorder = Recorder()
    held: list[bool] = []
    recorder.inbox.post("a", lambda: recorder.inbox.defer(lambda: held.append(recorder.inbox.busy)))
    assert [False] == held


def test_deferred_call_taken_by_another_thread() -> None:
    """If two threads find the same deferred call, it runs once."""
    recorder = Recorder()

    class Taken(deque[Any]):
        """A queue whose only call is taken by another thread between the check and ``popleft``."""

        def popleft(self) -> Any:
            """Raise as if the queue were empty."""
            raise IndexError

    recorder.inbox._deferred = Taken([None])
    recorder.inbox.post("a", nothing)
    assert ["a"] == recorder.handled


def test_reset_releases_the_lock_and_drops_events() -> None:
    """As after a fork, the lock held by another thread is free again, and its events are dropped."""
    recorder = Recorder()
    recorder.inbox._lock.acquire()
    recorder.inbox.post("lost", pytest.fail)
    recorder.inbox.reset()
    recorder.inbox.post("a", nothing)
    assert ["a"] == recorder.handled


def test_concurrent_posts_are_handled_exactly_once() -> None:
    """Events posted by four threads at once are each handled exactly once."""
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
