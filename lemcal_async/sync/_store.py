"""What a synchronisation needs of a store, and the values that pass between the two.

A store keeps, per account, the last snapshot and an outbox of changes; both are written in one transaction.
How, is the business of ``memory.py`` and ``sql.py``.
"""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Final, Protocol, runtime_checkable

import attrs

from lemcal_async._codec import from_wire
from lemcal_async.errors import BadRow, ConfigurationError, LemcalError
from lemcal_async.models import Meeting
from lemcal_async.sync._diff import Difference, Kind

EMPTY_LIST_GRACE: Final = 3
"""So many meetings may vanish from a list at once, down to none, without a question."""


class StoreError(LemcalError):
    """The store failed: the disk is full, the database is locked or cannot be reached. It is unharmed."""


class EmptyListError(LemcalError):
    """The service sent an empty list for an account that had meetings; nothing was taken from it."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


@attrs.frozen
class Change:
    """A change as it stands in the outbox.

    ``fields`` are the wire fields that differ. ``wire`` is the meeting as the service sent it, or as it
    last was if it has disappeared; ``found_at`` is when the change was seen here. ``seq`` grows with
    time within an account, and identifies the change within its store: a handler that may see a change
    twice can go by it.
    """

    seq: int
    user_id: str
    meeting_id: str
    kind: Kind
    fields: tuple[str, ...]
    found_at: datetime
    wire: dict[str, Any] = attrs.field(repr=False)
    delivered_at: datetime | None = None

    @property
    def meeting(self) -> Meeting:
        """The meeting as a model; ResponseDecodeError if the service sent what cannot be read."""
        return from_wire(self.wire, Meeting)


@attrs.frozen
class Counts:
    """How many meetings of an account, or of all, fared how in a run."""

    created: int = 0
    changed: int = 0
    canceled: int = 0
    disappeared: int = 0
    restored: int = 0
    unchanged: int = 0


@attrs.frozen
class Applied:
    """What came of a list that was taken over. ``bad_rows`` were not, or not with their columns."""

    counts: Counts
    bad_rows: tuple[BadRow, ...] = ()


@attrs.frozen
class Forgotten:
    """How many rows of each kind were erased."""

    meetings: int
    changes: int


@runtime_checkable
class Store(Protocol):
    """Where the meetings of all accounts are kept. Every method is one transaction: all of it or nothing.

    Cancelled, a method has done its work whole or not at all. All raise StoreError, and none leaves a
    transaction open.
    """

    async def revision(self, user_id: str) -> int:
        """Return how often the account was taken over, to be asked before its list is fetched."""
        ...

    async def apply(
        self, user_id: str, revision: int, rows: list[Any], *, baseline: bool, believe_empty_after: int
    ) -> Applied | None:
        """Take a list over, and put what changed into the outbox.

        None if the account has another revision by now: somebody else was faster, and this list may be
        older than theirs. With ``baseline``, an account that is new here puts nothing into the outbox.
        Raises EmptyListError until so many lists in a row were empty.
        """
        ...

    async def record_failure(self, user_id: str, message: str) -> None:
        """Note that the account could not be synchronised; nothing else changes."""
        ...

    async def pending(self, user_id: str, limit: int) -> list[Change]:
        """Return the account's first changes that were not delivered, the oldest first."""
        ...

    async def mark_delivered(self, change: Change) -> bool:
        """Mark a change as delivered; False if it was already, or is gone."""
        ...

    def changes(self, *, pending: bool = False) -> AsyncIterator[Change]:
        """Go over the outbox, the oldest first, or over those only that were not delivered."""
        ...

    async def forget(self, user_id: str) -> Forgotten:
        """Erase all data of an account."""
        ...

    async def prune(self, *, before: datetime) -> Forgotten:
        """Erase the meetings that ended before a time (aware), and the delivered changes found before it.

        Of a meeting that is still listed, the id and a digest stay, so that it is not taken for new;
        should it change, it comes back as ``changed``, whole.
        """
        ...


def check_aware(before: datetime) -> None:
    """Refuse a time that is another moment in each place."""
    if before.tzinfo is None:
        raise ConfigurationError("prune(before=) must be an aware datetime, such as datetime.now(UTC)")


def counted(differences: list[Difference], listed: int) -> Counts:
    """Count the differences; ``listed`` is the number of rows in the list."""
    kinds = [difference.kind for difference in differences]
    return Counts(
        created=kinds.count("created"),
        changed=kinds.count("changed"),
        canceled=kinds.count("canceled"),
        disappeared=kinds.count("disappeared"),
        restored=kinds.count("restored"),
        unchanged=listed - (len(kinds) - kinds.count("disappeared")),
    )


def empty_list(held: int, believe_empty_after: int) -> EmptyListError:
    """Return the error for an empty list that is not believed yet."""
    return EmptyListError(
        f"GET /meetings: an empty list, while {held} meetings are stored; nothing was changed. It is "
        f"believed if {believe_empty_after} lists in a row are empty; else check the account and base_url"
    )
