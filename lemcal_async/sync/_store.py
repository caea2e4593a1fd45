"""The protocol that a store implements, and the values that it exchanges with a synchronization.

For each account, a store keeps the last snapshot and an outbox of changes. It writes both in one transaction.
"""

import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime
from typing import Any, Protocol, runtime_checkable

import attrs

from lemcal_async._codec import from_wire
from lemcal_async.errors import BadRow, ConfigurationError, StoreError
from lemcal_async.models import Meeting
from lemcal_async.sync._diff import Counts, Kind


class LeaseLostError(StoreError):
    """The lease on a fleet's account has ended, so another worker may hold it. Nothing was written."""


@attrs.frozen
class Lease:
    """The exclusive right to synchronize an account, until the lease ends.

    ``failures`` counts the consecutive failed turns. ``revision`` and ``has_pending`` (whether the account
    had pending changes) date from when the lease was acquired; only its holder adds changes.
    """

    user_id: str
    token: str = attrs.field(repr=False)
    interval: float
    failures: int
    revision: int
    has_pending: bool


@attrs.frozen
class Change:
    """A change in the outbox.

    Attributes:
        seq: Identifies the change within its store and increases over time within an account. A handler can
            use it to recognize a change that is delivered twice.
        user_id: The account's user id.
        meeting_id: The meeting's id.
        kind: What happened to the meeting.
        fields: The wire fields that differ.
        found_at: When a synchronization found the change.
        wire: The meeting as the service sent it or, if it disappeared, its last known state.
        delivered_at: When the change was marked as delivered.
        attempts: How many times a handler raised for the change.
        error: The last error that a handler raised for the change.
        parked_at: When the change was parked. A parked change is only delivered after ``retry_parked``.
    """

    seq: int
    user_id: str
    meeting_id: str
    kind: Kind
    fields: tuple[str, ...]
    found_at: datetime
    wire: dict[str, Any] = attrs.field(repr=False)
    delivered_at: datetime | None = None
    attempts: int = 0
    error: str | None = attrs.field(default=None, repr=False)  # the handler wrote its message
    parked_at: datetime | None = None

    @property
    def meeting(self) -> Meeting:
        """The meeting as a model; its ``problems`` name the values that could not be read."""
        return from_wire(self.wire, Meeting)


@attrs.frozen
class Applied:
    """The result of applying a list.

    Attributes:
        counts: How many meetings were created, changed, and so on.
        bad_rows: The rows that were not stored.
    """

    counts: Counts
    bad_rows: tuple[BadRow, ...] = ()


@attrs.frozen
class Forgotten:
    """The number of rows that were erased.

    Attributes:
        meetings: Erased meetings.
        changes: Erased changes of the outbox.
    """

    meetings: int
    changes: int


@runtime_checkable
class Store(Protocol):
    """Storage for the meetings of all accounts. Every method is one transaction.

    A canceled method has done either all of its work or none, and leaves no transaction open.

    Raises:
        StoreError: If the store fails. Any method can raise it.
    """

    async def revision(self, user_id: str) -> int:
        """Return how many lists were applied to the account. Call this before fetching its list.

        Args:
            user_id: The account's user id.
        """
        ...

    async def apply(
        self,
        user_id: str,
        revision: int,
        rows: Iterable[Any],
        *,
        baseline: bool,
        confirm_empty_after: int,
        body_hash: str | None = None,
    ) -> Applied | None:
        """Store a list, and add its changes to the outbox.

        Returns None if the account's revision has changed: another process applied a list first, and this
        list may be older.

        Args:
            user_id: The account's user id.
            revision: The value that ``revision`` returned before the list was fetched.
            rows: The list in wire form. Iterating may parse it: iterate once, before writing anything, and
                where blocking for a few milliseconds is acceptable.
            baseline: Whether to leave the outbox unchanged if the account is new to the store.
            confirm_empty_after: How many lists in a row must be empty, or less than half of what is stored,
                before one is accepted.
            body_hash: Identifies the list for ``unchanged``. A list with bad rows is stored without its hash,
                so that every run reports them.

        Raises:
            EmptyListError: If the list is not accepted yet. It is counted; nothing else changes.
            ResponseDecodeError: If ``rows`` turns out not to be a list.
        """
        ...

    async def unchanged(self, user_id: str, body_hash: str) -> int | None:
        """Record that the account's list is identical to the last list applied.

        Returns how many meetings are listed, or None if the last list applied has another hash; then nothing
        is recorded. This counts as applying a list: it increments the revision, and clears the account's last
        error and its count of rejected lists.

        Args:
            user_id: The account's user id.
            body_hash: The hash of the list, as passed to ``apply``.
        """
        ...

    async def record_failure(self, user_id: str, message: str) -> None:
        """Record that the account could not be synchronized; nothing else changes.

        Args:
            user_id: The account's user id.
            message: The reason, as text.
        """
        ...

    async def pending(self, user_id: str, limit: int) -> list[Change]:
        """Return the account's first changes that are neither delivered nor parked, oldest first.

        Args:
            user_id: The account's user id.
            limit: The maximum number of changes.
        """
        ...

    async def mark_delivered(self, changes: Sequence[Change]) -> int:
        """Mark changes as delivered, and return how many were not marked before (and still exist).

        Args:
            changes: The changes that a handler accepted.
        """
        ...

    async def record_attempt(self, changes: Sequence[Change], error: str, *, park: bool) -> None:
        """Record that a handler raised for these changes.

        Adds one attempt to each change that is not delivered.

        Args:
            changes: The changes that were passed to the handler.
            error: The error that it raised, as text.
            park: Whether to park the changes.
        """
        ...

    async def retry_parked(self, user_id: str | None = None) -> int:
        """Make parked changes pending again and reset their attempts to 0; return how many.

        They keep their place in the order: before the account's later changes.

        Args:
            user_id: The account's user id; None for all accounts.
        """
        ...

    def changes(
        self,
        *,
        pending: bool = False,
        parked: bool = False,
        after: int = 0,
        of: tuple[int, int] | None = None,
    ) -> AsyncIterator[Change]:
        """Iterate over the outbox, oldest first.

        To follow the outbox, call this again with the last ``seq`` as ``after``: no change with a lower
        ``seq`` appears later.

        Args:
            pending: Only pending changes; with ``parked``, all undelivered changes.
            parked: Only parked changes; with ``pending``, all undelivered changes.
            after: Only changes with a higher ``seq``.
            of: ``(i, n)``: only the accounts of partition ``i``, from 0, out of ``n``. An account is always
                in the same partition.

        Raises:
            ConfigurationError: If ``of`` is not a valid partition.
        """
        ...

    async def forget(self, user_id: str) -> Forgotten:
        """Erase all data of an account.

        Args:
            user_id: The account's user id.
        """
        ...

    async def prune(self, *, before: datetime) -> Forgotten:
        """Erase the meetings that ended before a time, and delivered changes found before it.

        A meeting that is still listed keeps its id and a digest, so that it is not reported as new. If it
        changes, it is stored in full again and reported as ``changed``.

        Args:
            before: The time, an aware datetime.

        Raises:
            ConfigurationError: If ``before`` has no time zone.
        """
        ...


def part_of(user_id: str, parts: int) -> int:
    """Return the partition of an account, from 0: the same in every process and store."""
    return int.from_bytes(hashlib.sha256(user_id.encode()).digest()[:4]) % parts


def check_part(of: tuple[int, int] | None) -> None:
    """Raise ConfigurationError unless the partition is valid."""
    if of is not None and not 0 <= of[0] < of[1]:
        raise ConfigurationError(f"changes(of={of}): pass (i, n), where i is a partition from 0 to n - 1")


def check_aware(before: datetime) -> None:
    """Raise ConfigurationError unless the time has a time zone."""
    if before.tzinfo is None:
        raise ConfigurationError("prune(before=) must be an aware datetime, such as datetime.now(UTC)")
