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
    """A call has to wait for the rate limit.

    Attributes:
        key: The start of the key's digest.
        priority: The call's priority, ``interactive`` or ``bulk``.
        ahead: How many others go before it.
    """

    key: str
    priority: str
    ahead: int


@attrs.frozen
class Granted:
    """A call may send now.

    Attributes:
        key: The start of the key's digest.
        priority: The call's priority, ``interactive`` or ``bulk``.
        waited: How long it was in the queue.
    """

    key: str
    priority: str
    waited: float


@attrs.frozen
class Paused:
    """A 429 paused the key.

    Attributes:
        key: The start of the key's digest.
        seconds: For how long nothing is sent.
    """

    key: str
    seconds: float


@attrs.frozen
class ForeignUse:
    """Somebody else is using the key.

    Attributes:
        key: The start of the key's digest.
        requests: How many of theirs were in the window that the last answer reported.
    """

    key: str
    requests: int


@attrs.frozen
class FellBack:
    """The shared limiter fell back to a local one.

    Attributes:
        key: The start of the key's digest.
        reason: Why, in words.
    """

    key: str
    reason: str


@attrs.frozen
class AccountSynced:
    """A synchronization has finished an account. The counts are of its meetings, 0 if it failed.

    Attributes:
        user_id: The account.
        seconds: How long it took.
        failed: Whether it failed.
        created: Meetings that are new.
        changed: Meetings that differ from what they were.
        canceled: Meetings that were canceled.
        disappeared: Meetings that are no longer in the list.
        restored: Meetings that are back.
        unchanged: Meetings that are as they were.
    """

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

    Attributes:
        method: The HTTP method.
        route: The path with its ids left out; that of ``request()`` is the path as it was given.
        server_address: The host of the base URL.
        server_port: The port of the base URL.
        status_code: The last answer's, None if there was none.
        error: The name of what was raised: one of ``lemcal_async.errors``, ``"Cancelled"``, or None for a
            success.
        attempts: How many times the request was tried.
        waited: The time spent on the rate limit and between attempts.
        seconds: The time of the whole call.
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
    """An attempt failed and will be repeated.

    Attributes:
        method: The HTTP method.
        route: As in ``CallEnded``.
        attempt: The number of the attempt that failed, from 1.
        reason: The answer's status code, or the name of httpx's error if there was no answer.
        wait: After how long the next one follows.
    """

    method: str
    route: str
    attempt: int
    reason: str
    wait: float


@attrs.frozen
class PoolEntered:
    """A request got a connection.

    Attributes:
        in_use: How many connections are in use with it.
        limit: How many there can be.
        waited: How long it waited for one.
    """

    in_use: int
    limit: int
    waited: float


@attrs.frozen
class WebhookHandled:
    """A delivery was answered.

    Attributes:
        outcome: One of handled, repeated, ignored, unavailable, failed, busy and rejected.
        status_code: The status of the answer.
        seconds: How long after its headers had come in.
    """

    outcome: str
    status_code: int
    seconds: float


@attrs.frozen
class FleetSampled:
    """How a fleet was doing.

    Attributes:
        status: What one of its workers saw.
    """

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
"""What ``subscribe`` takes. What it returns is ignored."""

_listeners: tuple[Listener, ...] = ()


def subscribe(listener: Listener) -> Callable[[], None]:
    """Call ``listener`` with every event of this process; return a function that unsubscribes it.

    Args:
        listener: What to call, where the event happens; it must return at once.
    """
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
