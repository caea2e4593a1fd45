"""Events for your own metrics, traces and logs.

Events are plain values without secrets; times are in seconds. Events are only created while someone is
subscribed. Listeners are called where the event occurs, on an event loop or in any thread, so they must
return quickly; their exceptions are logged, not propagated.
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
    """A call must wait for the rate limit.

    Attributes:
        key: The start of the key's digest.
        priority: The call's priority, ``interactive`` or ``bulk``.
        ahead: The number of calls ahead in the queue.
    """

    key: str
    priority: str
    ahead: int


@attrs.frozen
class Granted:
    """A call may send its request.

    Attributes:
        key: The start of the key's digest.
        priority: The call's priority, ``interactive`` or ``bulk``.
        waited: The time the call spent in the queue.
    """

    key: str
    priority: str
    waited: float


@attrs.frozen
class Paused:
    """A 429 paused the key.

    Attributes:
        key: The start of the key's digest.
        seconds: The length of the pause, during which nothing is sent.
    """

    key: str
    seconds: float


@attrs.frozen
class ForeignUse:
    """Another client is using the key.

    Attributes:
        key: The start of the key's digest.
        requests: The number of foreign requests in the window that the last response reported.
    """

    key: str
    requests: int


@attrs.frozen
class FellBack:
    """A limiter fell back to a safer mode.

    A shared limiter works without Redis, or any limiter treats the server as a sliding log because responses
    contradict fixed windows.

    Attributes:
        key: The start of the key's digest.
        reason: The cause, as text.
    """

    key: str
    reason: str


@attrs.frozen
class AccountSynced:
    """The synchronization of an account ended. Counts are numbers of meetings, or 0 after a failure.

    Attributes:
        user_id: The account's user id.
        seconds: The duration of the synchronization.
        failed: Whether the synchronization failed.
        created: Meetings that are new.
        changed: Meetings that differ from the stored ones.
        canceled: Meetings that were canceled.
        disappeared: Meetings that are no longer listed.
        restored: Meetings that had disappeared or were canceled, and are booked again.
        unchanged: Meetings that have not changed.
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
    """A call ended.

    Attributes:
        method: The HTTP method.
        route: The path without ids; for ``request()``, the path as given.
        server_address: The host of the base URL.
        server_port: The port of the base URL.
        status_code: The status code of the last response, or None if there was none.
        error: The class name of the raised error (see ``lemcal_async.errors``), ``"Cancelled"``, or None if
            the call succeeded.
        attempts: The number of requests passed to the transport; 0 if the call was never tried.
        waited: The time spent waiting for the rate limit and between attempts.
        seconds: The duration of the whole call.
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
    """An attempt failed and will be retried.

    Attributes:
        method: The HTTP method.
        route: As in ``CallEnded``.
        attempt: The number of the failed attempt, starting at 1.
        reason: The response's status code, or the class name of the httpx error if there was no response.
        wait: The time until the next attempt.
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
        in_use: The number of connections in use, including this one.
        limit: The maximum number of connections.
        waited: The time the request waited for a connection.
    """

    in_use: int
    limit: int
    waited: float


@attrs.frozen
class WebhookHandled:
    """A webhook delivery was answered.

    Attributes:
        outcome: One of handled, repeated, ignored, unavailable, failed, busy and rejected.
        status_code: The status code of the response.
        seconds: The time from receiving the headers to responding.
    """

    outcome: str
    status_code: int
    seconds: float


@attrs.frozen
class FleetSampled:
    """A worker sampled the status of its fleet.

    Attributes:
        status: The status that the worker observed.
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
"""Any event. More may be added, so listeners should ignore unknown events."""

Listener: TypeAlias = Callable[[Event], object]
"""A function that takes an event. Its return value is ignored."""

_listeners: tuple[Listener, ...] = ()


def subscribe(listener: Listener) -> Callable[[], None]:
    """Call ``listener`` with every event of this process; return a function that unsubscribes it.

    Args:
        listener: The function to call, where the event occurs; it must return quickly.
    """
    global _listeners  # noqa: PLW0603 - replaced, never modified, so that emit needs no lock
    _listeners = (*_listeners, listener)

    def unsubscribe() -> None:
        global _listeners  # noqa: PLW0603
        _listeners = tuple(each for each in _listeners if each is not listener)

    return unsubscribe


def wanted() -> bool:
    """Whether anyone is subscribed. Check this before creating an event."""
    return bool(_listeners)


def emit(event: Event) -> None:
    """Call all listeners with an event."""
    for listener in _listeners:
        try:
            listener(event)
        except Exception:
            logger.exception("an event listener failed on %s", type(event).__name__)
