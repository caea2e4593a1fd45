"""What happens inside, told to whoever subscribes: for metrics, traces and logs of one's own.

Every event is a plain value that holds no secret; times are in seconds. Nothing is made while nobody
listens. A listener is called where the event happens, in an event loop or in any thread, so it must
return at once; what it raises is logged and goes no further.
"""

import logging
from collections.abc import Callable
from typing import TypeAlias

import attrs

logger = logging.getLogger("lemcal_async")


@attrs.frozen
class Queued:
    """A call has to wait for the rate limit; ``ahead`` others go before it. ``key`` is a digest's start."""

    key: str
    priority: str
    ahead: int


@attrs.frozen
class Granted:
    """A call may send now, after so many seconds in the queue."""

    key: str
    priority: str
    waited: float


@attrs.frozen
class Paused:
    """The server refused the key (429): nobody sends for so many seconds."""

    key: str
    seconds: float


@attrs.frozen
class ForeignUse:
    """Somebody else uses the key: ``requests`` in the window that the last answer spoke of."""

    key: str
    requests: int


@attrs.frozen
class FellBack:
    """The limiter goes on with less than it had; ``reason`` says why (in words)."""

    key: str
    reason: str


@attrs.frozen
class AccountSynced:
    """An account's turn in a synchronisation is over; the counts are of its meetings, 0 if it failed."""

    user_id: str
    seconds: float
    failed: bool
    created: int
    changed: int
    canceled: int
    disappeared: int
    restored: int
    unchanged: int


Event: TypeAlias = Queued | Granted | Paused | ForeignUse | FellBack | AccountSynced
"""Any of them; more may come, so a listener leaves alone what it does not know."""

Listener: TypeAlias = Callable[[Event], object]

_listeners: tuple[Listener, ...] = ()


def subscribe(listener: Listener) -> Callable[[], None]:
    """Have ``listener`` called with every event of this process; return what ends that."""
    global _listeners  # noqa: PLW0603 - replaced whole, so that emit needs no lock
    _listeners = (*_listeners, listener)

    def unsubscribe() -> None:
        global _listeners  # noqa: PLW0603
        _listeners = tuple(other for other in _listeners if other is not listener)

    return unsubscribe


def wanted() -> bool:
    """Whether anybody listens: to be asked before an event is made."""
    return bool(_listeners)


def emit(event: Event) -> None:
    """Tell all listeners."""
    for listener in _listeners:
        try:
            listener(event)
        except Exception:
            logger.exception("a listener failed at %s", type(event).__name__)
