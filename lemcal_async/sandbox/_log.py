"""The request log, for tests and for the page. It never contains an API key."""

import itertools
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import attrs

if TYPE_CHECKING:
    from lemcal_async.sandbox._hooks import Delivery

MAX_REQUESTS: Final = 100_000
"""The number of requests that the log keeps: a sandbox may run for weeks."""

MAX_BODIES: Final = 1_000
"""The number of requests whose bodies the log keeps."""

MAX_BODY_CHARACTERS: Final = 16_384
"""The length at which a logged body is truncated."""

_MAX_CHANGES: Final = 5_000  # entries whose latest change a journal remembers for its followers

_SECRET_HEADERS: Final = frozenset({"authorization", "proxy-authorization"})


@attrs.frozen
class SeenRequest:
    """A request that the sandbox received, and its outcome.

    Bodies are truncated to 16,384 characters, and are None for all but the latest 1,000 requests.

    Attributes:
        at: The time on the sandbox's clock when the request was counted.
        method: The HTTP method.
        path: The path, relative to the API prefix (``/meetings``) for API calls, complete for other requests.
        query: The query string.
        user_id: The user id in the credentials if the sandbox knows it, even if the API key is wrong.
        headers: The headers, with lowercase names and without those that carry credentials.
        status_code: The response's status code; None while there is no response.
        processed: Whether the route processed the request. False if the request was refused or a fault
            replaced the response.
        fault: A description of the fault that applied, if any.
        seconds: The duration of the request; None until it finishes.
        limit: The rate limit; None if the request was not counted.
        remaining: The number of requests left after this one; None if the request was not counted.
        resets_in: Seconds from this request to the end of its window; None if the request was not counted.
        time: The wall-clock time when the request was counted.
        number: The request's number, counting from 1.
        request_body: The request's body; possible tokens in a hook's target are removed.
        response_body: The response's body; possible tokens in a hook's target are removed.
    """

    at: float
    method: str
    path: str
    query: str
    user_id: str | None
    headers: Mapping[str, str]
    status_code: int | None = None
    processed: bool = False
    fault: str | None = None
    seconds: float | None = None
    limit: int | None = None
    remaining: int | None = None
    resets_in: float | None = None
    time: datetime | None = None
    number: int = 0
    request_body: str | None = attrs.field(default=None, repr=False)
    response_body: str | None = attrs.field(default=None, repr=False)


def public_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return ``headers`` without those that carry credentials."""
    return {name: value for name, value in headers.items() if name not in _SECRET_HEADERS}


T = TypeVar("T", bound=attrs.AttrsInstance)


class Journal(Generic[T]):
    """A log of the latest ``max_entries`` entries, numbered from 1. Thread-safe.

    A follower passes its last ``revision`` to ``changed_since`` to get the entries added or changed since.
    """

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._entries: dict[int, T] = {}
        self._changes: dict[int, int] = {}  # number -> revision of its latest change, ordered by revision
        self._revision = 0
        self._dropped_revision = 0  # the latest revision dropped from _changes

    def add(self, make: Callable[[int], T]) -> T:
        """Call ``make`` with the next number, and add the entry that it returns."""
        with self._lock:
            number = next(self._numbers)
            self._entries[number] = entry = make(number)
            self._entries.pop(number - self._max_entries, None)
            self._record_change(number)
        return entry

    def update(self, number: int, **changes: Any) -> None:
        """Replace fields of an entry; do nothing if the journal has already dropped it."""
        with self._lock:
            if number in self._entries:
                self._entries[number] = attrs.evolve(self._entries[number], **changes)  # type: ignore[misc]  # T is bound to attrs classes
                self._record_change(number)

    def get(self, number: int) -> T | None:
        """Return the entry with this number, or None if the journal does not have it."""
        with self._lock:
            return self._entries.get(number)

    def snapshot(self) -> list[T]:
        """Return the entries, oldest first."""
        with self._lock:
            return list(self._entries.values())

    def after(self, number: int, count: int) -> list[T]:
        """Return up to ``count`` entries after this number, oldest first."""
        with self._lock:
            first = max(number + 1, next(iter(self._entries), 1))
            last = min(first + count, next(reversed(self._entries), 0) + 1)
            return [self._entries[at] for at in range(first, last)]

    def before(self, number: int | None, count: int) -> list[T]:
        """Return up to ``count`` entries before this number (None: the latest entries), newest first."""
        with self._lock:
            last = next(reversed(self._entries), 0) + 1
            end = last if number is None else min(number, last)
            first = max(end - count, next(iter(self._entries), 1))
            return [self._entries[at] for at in range(end - 1, first - 1, -1)]

    @property
    def revision(self) -> int:
        """The number of changes so far."""
        return self._revision

    def covers(self, revision: int) -> bool:
        """Whether the journal has reached this revision and remembers every change after it."""
        with self._lock:
            return self._dropped_revision <= revision <= self._revision

    def changed_since(self, revision: int) -> tuple[int, list[T]]:
        """Return the current revision, and the entries changed after the given one, in order of change."""
        with self._lock:
            changed: list[T] = []
            for number in reversed(self._changes):
                if self._changes[number] <= revision:
                    break
                if number in self._entries:
                    changed.append(self._entries[number])
            return self._revision, changed[::-1]

    def _record_change(self, number: int) -> None:
        self._revision += 1
        self._changes.pop(number, None)
        self._changes[number] = self._revision
        if len(self._changes) > _MAX_CHANGES:
            self._dropped_revision = self._changes.pop(next(iter(self._changes)))


class RequestLog(Journal[SeenRequest]):
    """Requests in the order they were counted."""

    def __init__(self, max_entries: int = MAX_REQUESTS) -> None:
        super().__init__(max_entries)

    def add_request(self, request: SeenRequest) -> int:
        """Add a request and return its number."""
        number = self.add(lambda number: attrs.evolve(request, number=number)).number
        with self._lock:  # not recorded as a change: followers do not need it
            old = self._entries.get(number - MAX_BODIES)
            if old is not None:
                self._entries[old.number] = attrs.evolve(old, request_body=None, response_body=None)
        return number


class Follower:
    """Reports requests and deliveries as they finish."""

    def __init__(self, log: RequestLog, deliveries: "Journal[Delivery]") -> None:
        self._log, self._deliveries = log, deliveries
        self._log_revision, self._deliveries_revision = log.revision, deliveries.revision

    def finished(self) -> "list[SeenRequest | Delivery]":
        """Return the requests and then the deliveries that have finished since the previous call."""
        self._log_revision, requests = self._log.changed_since(self._log_revision)
        self._deliveries_revision, deliveries = self._deliveries.changed_since(self._deliveries_revision)
        return [*(entry for entry in requests if entry.seconds is not None), *deliveries]


def body_text(body: bytes) -> str:
    """Decode a body for the log, truncated."""
    return body[: MAX_BODY_CHARACTERS * 4].decode("utf-8", "replace")[:MAX_BODY_CHARACTERS]
