"""An inbox for what happens to a limiter, worked off by one thread at a time.

Any thread may post an event, at any moment: in a finalizer, in a signal handler, while its own thread
is at work on the inbox. Nobody ever waits for a lock. Whoever posts works off the inbox, unless somebody
is doing that already.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Events about things of type T, each handled on its own.

    ``handle`` is called after each event with the thing that it was about, ``tidy`` whenever the inbox
    is empty.
    """

    def __init__(self, handle: Callable[[T], None], tidy: Callable[[], None]) -> None:
        self._handle = handle
        self._tidy = tidy
        self._events: deque[tuple[T | None, Callable[..., T | None], tuple[Any, ...]]] = deque()
        self._deferred: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether somebody is at work on it."""
        return self._lock.locked()

    def post(self, subject: T | None, event: Callable[..., T | None], *details: Any) -> None:
        """Have ``event(*details)`` called, by whoever works off the inbox.

        ``event`` may return the thing that it was about, if that is not known yet.
        """
        self._events.append((subject, event, details))
        # Whoever is at work looks into the inbox once more after letting go, so nothing is left behind.
        while self._events and self._lock.acquire(blocking=False):
            try:
                while self._events:
                    subject, event, details = self._events.popleft()
                    subject = event(*details) or subject
                    if subject is not None:
                        self._handle(subject)
                self._tidy()
            finally:
                self._lock.release()
            self._run_deferred()

    def defer(self, function: Callable[..., None], *details: Any) -> None:
        """Have ``function(*details)`` called once no lock is held: a log handler may do anything."""
        self._deferred.append((function, details))

    def reset(self) -> None:
        """Start over, as after a fork: nobody is at work, and all events are the parent's."""
        self._lock = threading.Lock()
        self._events.clear()
        self._deferred.clear()

    def _run_deferred(self) -> None:
        while self._deferred:
            try:
                function, details = self._deferred.popleft()
            except IndexError:  # another thread was quicker
                return
            function(*details)
