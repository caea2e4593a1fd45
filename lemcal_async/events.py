"""Events for metrics, traces and logs of your own.

Every event is a plain value that holds no secret; times are in seconds. Events are only created while
someone is subscribed. A listener is called where the event happens, in an event loop or in any thread, so
it must return at once; what it raises is logged and goes no further.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from lemcal_async.fleet import FleetStatus

__all__ = [
    "AccountSynced",
    "CallEnded",
    "Event",
    "FellBack",
    "FleetSampled",
    "ForeignUse",
    "Granted",
    "Listener",
    "Paused",
    "PoolEntered",
    "Queued",
    "Retried",
    "WebhookHandled",
    "subscribe",
]

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
    """A 429 paused the key: sending is paused for so many seconds."""

    key: str
    seconds: float


@attrs.frozen
class ForeignUse:
    """Somebody else is using the key: ``requests`` of theirs in the window that the last answer reported."""

    key: str
    requests: int


@attrs.frozen
class FellBack:
    """The shared limiter fell back to a local one; ``reason`` says why, in words."""

    key: str
    reason: str


@attrs.frozen
class AccountSynced:
    """A synchronization has finished an account; the counts are of its meetings, 0 if it failed."""

    user_id: str
    seconds: float
    failed: bool
    created: int
    changed: int
    canceled: int
    disappeared: int
    restored: int
    unchanged: int


@attrs.frozen
class CallEnded:
    """A call has ended.

    ``route`` is the path with its ids left out; that of ``request()`` is the path as it was given.
    ``status_code`` is the last answer's, None if there was none, and ``error`` the name of what was
    raised: one of ``lemcal_async.errors``, ``"Cancelled"``, or None for a success. ``waited`` is the time
    spent on the rate limit and between attempts, ``seconds`` that of the whole call.
    """

    method: str
    route: str
    server_address: str
    server_port: int
    status_code: int | None
    error: str | None
    attempts: int
    waited: float
    seconds: float


@attrs.frozen
class Retried:
    """An attempt failed and will be repeated after ``wait`` seconds.

    ``reason`` is the answer's status code, or the name of httpx's error if there was no answer.
    """

    method: str
    route: str
    attempt: int
    reason: str
    wait: float


@attrs.frozen
class PoolEntered:
    """A request got a connection after ``waited`` seconds; ``in_use`` of ``limit`` are in use with it."""

    in_use: int
    limit: int
    waited: float


@attrs.frozen
class WebhookHandled:
    """A delivery was answered with ``status_code``, ``seconds`` after its headers had come in.

    ``outcome`` is handled, repeated, ignored, unavailable, failed, busy or rejected.
    """

    outcome: str
    status_code: int
    seconds: float


@attrs.frozen
class FleetSampled:
    """How a fleet was doing, as one of its workers saw it."""

    status: "FleetStatus"


Event: TypeAlias = (
    Queued
    | Granted
    | Paused
    | ForeignUse
    | FellBack
    | AccountSynced
    | FleetSampled
    | CallEnded
    | Retried
    | PoolEntered
    | WebhookHandled
)
"""Any of them. More may be added, so a listener ignores what it does not know."""

Listener: TypeAlias = Callable[[Event], object]

_listeners: tuple[Listener, ...] = ()


def subscribe(listener: Listener) -> Callable[[], None]:
    """Call ``listener`` with every event of this process; return a function that unsubscribes it."""
    global _listeners  # noqa: PLW0603 - replaced whole, so that emit needs no lock
    _listeners = (*_listeners, listener)

    def unsubscribe() -> None:
        global _listeners  # noqa: PLW0603
        _listeners = tuple(other for other in _listeners if other is not listener)

    return unsubscribe


def wanted() -> bool:
    """Whether anyone is subscribed: to be asked before an event is created."""
    return bool(_listeners)


def emit(event: Event) -> None:
    """Tell all listeners."""
    for listener in _listeners:
        try:
            listener(event)
        except Exception:
            logger.exception("a listener failed at %s", type(event).__name__)
