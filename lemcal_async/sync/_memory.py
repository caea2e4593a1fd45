"""``MemoryStore``: the store for tests, by the same rules as ``SQLStore``, and gone with its object."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import attrs

from lemcal_async.errors import BadRow
from lemcal_async.sync._columns import columns_of
from lemcal_async.sync._diff import Difference, Snapshot, StoredMeeting, compare, snapshot, status_of
from lemcal_async.sync._store import (
    EMPTY_LIST_GRACE,
    Applied,
    Change,
    Forgotten,
    check_aware,
    counted,
    empty_list,
)


@attrs.define
class _Account:
    revision: int = 0
    empty_lists: int = 0
    meetings: dict[str, StoredMeeting] = attrs.field(factory=dict[str, StoredMeeting])


class MemoryStore:
    """A store in memory. For one event loop; it does no I/O, so nothing in it can be cancelled half-way."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._outbox: list[Change] = []
        self._seq = 0

    async def revision(self, user_id: str) -> int:
        """See ``Store``."""
        account = self._accounts.get(user_id)
        return account.revision if account else 0

    async def apply(
        self, user_id: str, revision: int, rows: list[Any], *, baseline: bool, believe_empty_after: int
    ) -> Applied | None:
        """See ``Store``."""
        now = snapshot(rows)
        account = self._accounts.setdefault(user_id, _Account())
        if account.revision != revision:
            return None
        account.revision += 1
        held = sum(known.status in ("booked", "canceled") for known in account.meetings.values())
        is_empty = now.complete and not now.rows and not now.present
        if is_empty and held > EMPTY_LIST_GRACE and account.empty_lists + 1 < believe_empty_after:
            account.empty_lists += 1
            raise empty_list(held, believe_empty_after)
        differences = compare(account.meetings, now)
        self._take_over(account, differences, now)
        if not (baseline and revision == 0):
            self._announce(user_id, differences)
        account.empty_lists = 0
        problems = ((row, columns_of(row.wire).problem) for row in now.rows.values())
        unreadable = [BadRow(row.index, row.wire, problem) for row, problem in problems if problem]
        return Applied(counted(differences, len(now.rows)), (*now.bad_rows, *unreadable))

    def _take_over(self, account: _Account, differences: list[Difference], now: Snapshot) -> None:
        for difference in differences:
            meeting_id = difference.meeting_id
            if difference.kind == "disappeared":
                account.meetings[meeting_id] = attrs.evolve(
                    account.meetings[meeting_id], status="disappeared"
                )
            else:
                account.meetings[meeting_id] = StoredMeeting(
                    now.rows[meeting_id].digest, status_of(difference.wire), difference.wire
                )
        if now.complete:
            for meeting_id, known in list(account.meetings.items()):
                if known.status == "pruned" and meeting_id not in now:
                    del account.meetings[meeting_id]

    def _announce(self, user_id: str, differences: list[Difference]) -> None:
        found_at = datetime.now(UTC)
        for found in differences:
            self._seq += 1
            self._outbox.append(
                Change(
                    seq=self._seq,
                    user_id=user_id,
                    meeting_id=found.meeting_id,
                    kind=found.kind,
                    fields=found.fields,
                    found_at=found_at,
                    wire=found.wire,
                )
            )

    async def record_failure(self, user_id: str, message: str) -> None:
        """See ``Store``. Nothing is kept: the report says it, and no table here shows it."""

    async def pending(self, user_id: str, limit: int) -> list[Change]:
        """See ``Store``."""
        own = [c for c in self._outbox if c.user_id == user_id and c.delivered_at is None]
        return own[:limit]

    async def mark_delivered(self, change: Change) -> bool:
        """See ``Store``."""
        for index, kept in enumerate(self._outbox):
            if kept.seq == change.seq and kept.delivered_at is None:
                self._outbox[index] = attrs.evolve(kept, delivered_at=datetime.now(UTC))
                return True
        return False

    async def changes(self, *, pending: bool = False) -> AsyncIterator[Change]:
        """See ``Store``."""
        for change in list(self._outbox):
            if not (pending and change.delivered_at):
                yield change

    async def forget(self, user_id: str) -> Forgotten:
        """See ``Store``."""
        account = self._accounts.pop(user_id, _Account())
        kept = [change for change in self._outbox if change.user_id != user_id]
        erased = Forgotten(len(account.meetings), len(self._outbox) - len(kept))
        self._outbox = kept
        return erased

    async def prune(self, *, before: datetime) -> Forgotten:
        """See ``Store``. A meeting without times that can be read stays."""
        check_aware(before)
        meetings = 0
        for account in self._accounts.values():
            for meeting_id, known in list(account.meetings.items()):
                columns = columns_of(known.wire or {"_id": meeting_id})
                ended_at = columns.end_at or columns.start_at
                if ended_at is None or ended_at >= before:
                    continue
                meetings += 1
                if known.status == "disappeared":
                    del account.meetings[meeting_id]
                else:
                    account.meetings[meeting_id] = StoredMeeting(known.digest, "pruned")
        kept = [c for c in self._outbox if c.delivered_at is None or c.found_at >= before]
        erased = Forgotten(meetings, len(self._outbox) - len(kept))
        self._outbox = kept
        return erased

    def meetings(self, user_id: str) -> dict[str, dict[str, Any]]:
        """Return the wire rows of an account's listed meetings, by id; for tests to look at."""
        account = self._accounts.get(user_id, _Account())
        return {
            meeting_id: known.wire or {}
            for meeting_id, known in account.meetings.items()
            if known.status in ("booked", "canceled")
        }
