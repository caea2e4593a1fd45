"""An inbox for everything that happens to a limiter, processed by one thread at a time.

An event may be posted by any thread at any moment: in a finalizer, in a signal handler, or while its own
thread is processing the inbox. Nobody ever waits for a lock: whoever posts an event processes the inbox,
unless somebody is doing so already.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Events about subjects of type T.

    ``handle`` is called after each event with its subject.
    """

    def __init__(self, handle: Callable[[T], None]) -> None:
        self._handle = handle
        self._events: deque[tuple[T | None, Callable[..., T | None], tuple[Any, ...]]] = deque()
        self._deferred: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether somebody is processing it."""
        return self._lock.locked()

    def post(self, subject: T | None, event: Callable[..., T | None], *details: Any) -> None:
        """Have ``event(*details)`` called by whoever processes the inbox.

        ``event`` may return its subject if that is not known before.
        """
        self._events.append((subject, event, details))
        # After releasing the lock, look once more, so that nothing is left behind.
        while self._events and self._lock.acquire(blocking=False):
            try:
                while self._events:
                    subject, event, details = self._events.popleft()
                    subject = event(*details) or subject
                    if subject is not None:
                        self._handle(subject)
            finally:
                self._lock.release()
            self._run_deferred()

    def defer(self, function: Callable[..., None], *details: Any) -> None:
        """Have ``function(*details)`` called when no lock is held, because a log handler may do anything."""
        self._deferred.append((function, details))

    def reset(self) -> None:
        """Start over after a fork: nobody holds the lock, and all events are the parent's."""
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
