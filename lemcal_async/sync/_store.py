"""What a synchronization needs of a store, and the values that pass between the two.

A store keeps, per account, the last snapshot and an outbox of changes; it writes both in one transaction.
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
    """The lease of a fleet's account has ended: another worker may hold it. Nothing was written."""


@attrs.frozen
class Lease:
    """The right to synchronize an account, until it ends.

    ``failures`` are the last turns' in a row. ``revision`` is the account's, and ``has_pending`` whether it
    had changes to deliver, when the lease was taken: nobody but its holder adds any.
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
        seq: Grows with time within an account and identifies the change within its store, so that a handler
            can recognize a change that it gets twice.
        user_id: The account.
        meeting_id: The meeting's id.
        kind: What happened to the meeting.
        fields: The wire fields that differ.
        found_at: When the change was seen here.
        wire: The meeting as the service sent it or, if it disappeared, as it last was.
        delivered_at: When a handler took it.
        attempts: How often a handler raised for it.
        error: What a handler raised for it last.
        parked_at: Since when it is no longer delivered, until it is retried on demand.
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
    error: str | None = attrs.field(default=None, repr=False)  # whatever the handler put into its message
    parked_at: datetime | None = None

    @property
    def meeting(self) -> Meeting:
        """The meeting as a model; what could not be read is named in its ``problems``."""
        return from_wire(self.wire, Meeting)


@attrs.frozen
class Applied:
    """What came of a list.

    Attributes:
        counts: How many meetings were created, changed and so on.
        bad_rows: The rows that were not stored.
    """

    counts: Counts
    bad_rows: tuple[BadRow, ...] = ()


@attrs.frozen
class Forgotten:
    """How many rows were erased.

    Attributes:
        meetings: Meetings.
        changes: Changes in the outbox.
    """

    meetings: int
    changes: int


@runtime_checkable
class Store(Protocol):
    """Where the meetings of all accounts are kept. Every method is one transaction.

    Canceled at any moment, a method has done all of its work or none. None leaves a transaction open.

    Raises:
        StoreError: By any method, if the store fails.
    """

    async def revision(self, user_id: str) -> int:
        """Return how many lists were applied to the account. Ask before you fetch its list.

        Args:
            user_id: The account.
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
        """Store a list, and put what changed into the outbox.

        Returns None if the account has another revision by now: somebody else was faster, and this list may
        be older than theirs.

        Args:
            user_id: The account.
            revision: What ``revision`` returned before the list was fetched.
            rows: The list, as it came over the wire. It may be parsed while it is iterated over: do so once,
                before anything is written, and where that may take a few milliseconds.
            baseline: Whether an account that is new here puts nothing into the outbox.
            confirm_empty_after: How many lists in a row must be empty, or less than half of what is stored,
                before one is believed.
            body_hash: Identifies the list for ``unchanged``. A list with bad rows is stored without it, so
                that they are reported each time.

        Raises:
            EmptyListError: For a list that is not believed yet. It is counted, and nothing else is changed.
            ResponseDecodeError: For ``rows`` that turn out to be no list.
        """
        ...

    async def unchanged(self, user_id: str, body_hash: str) -> int | None:
        """Note that the account's list is still the one that was applied last.

        Returns how many meetings are listed, or None if the last list applied had another hash; then nothing
        is noted. It counts as an applied list: it raises the revision, and clears the account's last error
        and its count of lists that were not believed.

        Args:
            user_id: The account.
            body_hash: The list's, as it would be given to ``apply``.
        """
        ...

    async def record_failure(self, user_id: str, message: str) -> None:
        """Note that the account could not be synchronized; nothing else changes.

        Args:
            user_id: The account.
            message: Why not, in words.
        """
        ...

    async def pending(self, user_id: str, limit: int) -> list[Change]:
        """Return the account's first changes that are neither delivered nor parked, oldest first.

        Args:
            user_id: The account.
            limit: How many changes at most.
        """
        ...

    async def mark_delivered(self, changes: Sequence[Change]) -> int:
        """Mark changes as delivered, and return how many were not marked before (and still exist).

        Args:
            changes: The changes that a handler took.
        """
        ...

    async def record_attempt(self, changes: Sequence[Change], error: str, *, park: bool) -> None:
        """Note that a handler raised for these changes.

        Counts an attempt for each that is not delivered.

        Args:
            changes: The changes that the handler got.
            error: What it raised, in words.
            park: Whether to park them.
        """
        ...

    async def retry_parked(self, user_id: str | None = None) -> int:
        """Make parked changes pending again, with their attempts back at 0; return how many.

        They are delivered in their old place: before the account's later changes.

        Args:
            user_id: The only account whose changes are meant; None for all.
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

        To follow the outbox, call it again with the last ``seq`` as ``after``: no change appears later that
        has a lower one.

        Args:
            pending: Only changes that are to be delivered; with ``parked``, all that are not delivered.
            parked: Only changes that are parked; with ``pending``, all that are not delivered.
            after: Only changes with a higher ``seq``.
            of: ``(i, n)`` for the changes of one ``n``-th of the accounts only, the ``i``-th counted from 0;
                an account is always in the same part.

        Raises:
            ConfigurationError: If ``of`` is no such part.
        """
        ...

    async def forget(self, user_id: str) -> Forgotten:
        """Erase all data of an account.

        Args:
            user_id: The account.
        """
        ...

    async def prune(self, *, before: datetime) -> Forgotten:
        """Erase the meetings that ended before a time, and delivered changes found before it.

        Of a meeting that is still listed, the id and a digest stay, so that it is not taken for new; if it
        changes, it comes back as ``changed``, whole.

        Args:
            before: The time, an aware datetime.

        Raises:
            ConfigurationError: For anything else.
        """
        ...


def part_of(user_id: str, parts: int) -> int:
    """Return which of so many parts an account belongs to: the same in every process and store."""
    return int.from_bytes(hashlib.sha256(user_id.encode()).digest()[:4]) % parts


def check_part(of: tuple[int, int] | None) -> None:
    """Refuse a part that there is not."""
    if of is not None and not 0 <= of[0] < of[1]:
        raise ConfigurationError(f"changes(of={of}) must be a part's number, from 0, and how many there are")


def check_aware(before: datetime) -> None:
    """Refuse a time without a time zone."""
    if before.tzinfo is None:
        raise ConfigurationError("prune(before=) must be an aware datetime, such as datetime.now(UTC)")
