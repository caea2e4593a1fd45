"""``MemoryStore``: a store for tests that follows the same rules as ``SQLStore``."""

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import attrs

from lemcal_async.sync._columns import columns_of
from lemcal_async.sync._diff import (
    Difference,
    Plan,
    Snapshot,
    StoredMeeting,
    empty_list_error,
    plan,
    snapshot,
    status_of,
)
from lemcal_async.sync._store import Applied, Change, Forgotten, check_aware, check_part, part_of


@attrs.define
class _Account:
    revision: int = 0
    empty_lists: int = 0
    body_hash: str | None = None
    meetings: dict[str, StoredMeeting] = attrs.field(factory=dict[str, StoredMeeting])
    changed_at: dict[str, datetime] = attrs.field(factory=dict[str, datetime])

    def listed(self) -> int:
        return sum(meeting.status != "disappeared" for meeting in self.meetings.values())


class MemoryStore:
    """An in-memory store for one event loop. It does no I/O, so no method can be canceled halfway."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._outbox: dict[int, Change] = {}  # by seq, oldest first
        self._seq = 0

    async def revision(self, user_id: str) -> int:
        """See ``Store``."""
        account = self._accounts.get(user_id)
        return account.revision if account else 0

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
        """See ``Store``."""
        current = snapshot(rows)
        account = self._accounts.setdefault(user_id, _Account())
        if account.revision != revision:
            return None
        account.revision += 1
        if error := empty_list_error(account.meetings, current, account.empty_lists, confirm_empty_after):
            account.empty_lists += 1
            raise error
        todo = plan(account.meetings, current, announce=not (baseline and revision == 0))
        _write(account, todo, current)
        self._announce(user_id, todo.outbox)
        account.empty_lists = 0
        account.body_hash = None if current.bad_rows else body_hash
        return Applied(todo.counts, current.bad_rows)

    async def unchanged(self, user_id: str, body_hash: str) -> int | None:
        """See ``Store``."""
        account = self._accounts.get(user_id)
        if account is None or account.body_hash != body_hash:
            return None
        account.revision += 1
        account.empty_lists = 0
        return account.listed()

    def _announce(self, user_id: str, differences: list[Difference]) -> None:
        found_at = datetime.now(UTC)
        for found in differences:
            self._seq += 1
            self._outbox[self._seq] = Change(
                seq=self._seq,
                user_id=user_id,
                meeting_id=found.meeting_id,
                kind=found.kind,
                fields=found.fields,
                found_at=found_at,
                wire=found.wire,
            )

    async def record_failure(self, user_id: str, message: str) -> None:
        """See ``Store``. Records nothing: the report has the failure, and there is no table for it."""

    async def pending(self, user_id: str, limit: int) -> list[Change]:
        """See ``Store``."""
        own = [c for c in self._outbox.values() if c.user_id == user_id and _is_pending(c)]
        return own[:limit]

    async def mark_delivered(self, changes: Sequence[Change]) -> int:
        """See ``Store``."""
        now = datetime.now(UTC)
        open_changes = self._undelivered(changes)
        for change in open_changes:
            self._outbox[change.seq] = attrs.evolve(change, delivered_at=now)
        return len(open_changes)

    async def record_attempt(self, changes: Sequence[Change], error: str, *, park: bool) -> None:
        """See ``Store``."""
        parked_at = datetime.now(UTC) if park else None
        for change in self._undelivered(changes):
            self._outbox[change.seq] = attrs.evolve(
                change, attempts=change.attempts + 1, error=error, parked_at=parked_at
            )

    async def retry_parked(self, user_id: str | None = None) -> int:
        """See ``Store``."""
        parked = [c for c in self._outbox.values() if _is_parked(c) and user_id in (None, c.user_id)]
        for change in parked:
            self._outbox[change.seq] = attrs.evolve(change, attempts=0, parked_at=None)
        return len(parked)

    def _undelivered(self, changes: Sequence[Change]) -> list[Change]:
        kept = (self._outbox.get(change.seq) for change in changes)
        return [change for change in kept if change is not None and change.delivered_at is None]

    async def changes(
        self,
        *,
        pending: bool = False,
        parked: bool = False,
        after: int = 0,
        of: tuple[int, int] | None = None,
    ) -> AsyncIterator[Change]:
        """See ``Store``."""
        check_part(of)
        for change in list(self._outbox.values()):
            wanted = (pending and _is_pending(change)) or (parked and _is_parked(change))
            is_in_part = of is None or part_of(change.user_id, of[1]) == of[0]
            if change.seq > after and is_in_part and (wanted or not (pending or parked)):
                yield change

    async def forget(self, user_id: str) -> Forgotten:
        """See ``Store``."""
        account = self._accounts.pop(user_id, _Account())
        return Forgotten(len(account.meetings), self._erase(lambda change: change.user_id == user_id))

    async def prune(self, *, before: datetime) -> Forgotten:
        """See ``Store``."""
        check_aware(before)
        meetings = 0
        for account in self._accounts.values():
            for meeting_id, meeting in list(account.meetings.items()):
                columns = columns_of(meeting.wire or {"_id": meeting_id})
                ended_at = columns.end_at or columns.start_at or account.changed_at[meeting_id]
                if meeting.status == "pruned" or ended_at >= before:
                    continue
                meetings += 1
                if meeting.status == "disappeared":
                    del account.meetings[meeting_id]
                else:
                    account.meetings[meeting_id] = StoredMeeting(meeting.digest, "pruned")
        changes = self._erase(lambda change: change.delivered_at is not None and change.found_at < before)
        return Forgotten(meetings, changes)

    def _erase(self, wanted: Callable[[Change], bool]) -> int:
        erased = [seq for seq, change in self._outbox.items() if wanted(change)]
        for seq in erased:
            del self._outbox[seq]
        return len(erased)

    def meetings(self, user_id: str) -> dict[str, dict[str, Any]]:
        """Return the wire rows of an account's listed meetings by id, for assertions in tests.

        Args:
            user_id: The account's user id.
        """
        account = self._accounts.get(user_id, _Account())
        return {
            meeting_id: meeting.wire or {}
            for meeting_id, meeting in account.meetings.items()
            if meeting.status in ("booked", "canceled")
        }


def _write(account: _Account, todo: Plan, current: Snapshot) -> None:
    at = datetime.now(UTC)
    for found in todo.listed:
        account.changed_at[found.meeting_id] = at
        account.meetings[found.meeting_id] = StoredMeeting(
            current.rows[found.meeting_id].digest, status_of(found.wire), found.wire
        )
    for meeting_id in todo.disappeared:
        account.changed_at[meeting_id] = at
        account.meetings[meeting_id] = attrs.evolve(account.meetings[meeting_id], status="disappeared")
    for meeting_id in todo.dropped:
        del account.meetings[meeting_id]


def _is_pending(change: Change) -> bool:
    return change.delivered_at is None and change.parked_at is None


def _is_parked(change: Change) -> bool:
    return change.delivered_at is None and change.parked_at is not None
