"""Stores an account's list of meetings: the hot path.

Each function runs its own transaction on a driver's connection. The account's row is the lock: the first
process that increments its revision stores its list. Other processes wait for that transaction, or find that
the revision has changed.
"""

from datetime import datetime
from typing import Any, Final

import attrs

from lemcal_async._gc import paused
from lemcal_async.errors import EmptyListError
from lemcal_async.sync import _leases
from lemcal_async.sync._columns import columns_of, load, storable_json
from lemcal_async.sync._diff import (
    ListedMeeting,
    Snapshot,
    StoredMeeting,
    empty_list_error,
    needed_rows,
    plan,
    status_of,
)
from lemcal_async.sync._drivers import MEETING_COLUMNS, Announced, Driver, driver_of
from lemcal_async.sync._store import Applied, Lease

_NEW_ACCOUNT: Final = (
    "INSERT INTO accounts (user_id, revision, empty_lists, first_run_at, last_run_at) VALUES (?, 0, 0, ?, ?) "
    "ON CONFLICT DO NOTHING"
)
_ACCOUNT: Final = "SELECT revision, empty_lists, synced_at FROM accounts WHERE user_id = ?"
_STORED: Final = "SELECT meeting_id, digest, status FROM meetings WHERE user_id = ?"
_UNCHANGED: Final = (
    "UPDATE accounts SET revision = revision + 1, body_hash = (revision + 1) || ?, empty_lists = 0, "
    "last_error = NULL, last_run_at = ?, synced_at = ?"
)
_REJECTED: Final = (
    "UPDATE accounts SET revision = ?, last_run_at = ?, empty_lists = ?, last_error = ? WHERE user_id = ?"
)
_APPLIED: Final = (
    "UPDATE accounts SET revision = ?, last_run_at = ?, empty_lists = 0, last_error = NULL, synced_at = ?, "
    "body_hash = ?, listed = ? WHERE user_id = ?"
)


def revisions(raw: Any, user_ids: list[str]) -> dict[str, int]:
    """Return the revisions of accounts; new accounts are left out."""
    placeholders = ", ".join("?" * len(user_ids))
    sql = f"SELECT user_id, revision FROM accounts WHERE user_id IN ({placeholders})"  # noqa: S608  # placeholders only
    return dict(driver_of(raw).rows(sql, tuple(user_ids)))


def unchanged(
    raw: Any, user_id: str, body_hash: str, at: datetime, *, lease: Lease | None, spread: float | None
) -> int | None:
    """Record that the last list is unchanged and return its length; None if the last list differs.

    With ``spread``, the same statement releases the lease: see ``Schedule.release``.
    """
    driver = driver_of(raw)
    suffix, now = f":{body_hash}", driver.time(at)
    settings, values = _UNCHANGED, (suffix, now, now)
    if spread is not None:
        ended, more = _leases.ended(_leases.next_time(driver, spread))
        settings, values = f"{settings}, {ended}", (*values, *more)
    held, token = _leases.held(driver, lease)
    found = driver.update_account(
        user_id,
        f"{settings} WHERE user_id = ? AND body_hash = revision || ?{held}",
        (*values, user_id, suffix, *token),
        "listed",
    )
    return None if found is None else int(found[0])


def apply(
    raw: Any,
    user_id: str,
    expected: int,
    current: Snapshot,
    at: datetime,
    *,
    baseline: bool,
    confirm_empty_after: int,
    body_hash: str | None,
    lease: Lease | None,
) -> Applied | EmptyListError | None:
    """Store a snapshot; return None if the revision has changed or the lease has ended."""
    driver = driver_of(raw)
    at_text = driver.time(at)
    held, token = _leases.held(driver, lease)
    reads = [(f"{_ACCOUNT}{held}{driver.for_update}", (user_id, *token)), (_STORED, (user_id,))]
    if expected == 0 and lease is None:
        reads.insert(0, (_NEW_ACCOUNT, (user_id, at_text, at_text)))
    account, found = driver.begin_and_read(reads)[-2:]
    if not account or account[0][0] != expected:
        driver.rollback()
        return None
    _, empty_lists, synced_at = account[0]
    stored = {meeting_id: StoredMeeting(digest, status) for meeting_id, digest, status in found}
    if error := empty_list_error(stored, current, empty_lists, confirm_empty_after):
        driver.commit(_REJECTED, (expected + 1, at_text, empty_lists + 1, str(error), user_id))
        return error
    for meeting_id, wire in driver.wires(user_id, needed_rows(stored, current)):
        stored[meeting_id] = attrs.evolve(stored[meeting_id], wire=load(wire))
    with paused():
        todo = plan(stored, current, announce=not (baseline and expected == 0))
        rows = {
            found.meeting_id: _row(current.rows[found.meeting_id], user_id, driver, at_text)
            for found in todo.listed
        }
    new = [row for meeting_id, row in rows.items() if meeting_id not in stored]
    old = [
        dict(zip(MEETING_COLUMNS, row, strict=True))
        for meeting_id, row in rows.items()
        if meeting_id in stored
    ]
    if new:
        driver.insert(new)
    if old:
        driver.replace(old)
    driver.for_each_id(
        "UPDATE meetings SET status = 'disappeared', changed_at = ?, last_seen_at = ? WHERE user_id = ?",
        (at_text, synced_at, user_id),
        todo.disappeared,
    )
    driver.for_each_id("DELETE FROM meetings WHERE user_id = ?", (user_id,), todo.dropped)
    valid_hash = f"{expected + 1}:{body_hash}" if body_hash is not None and not current.bad_rows else None
    driver.commit(
        _APPLIED,
        (expected + 1, at_text, at_text, valid_hash, len(current.rows), user_id),
        Announced(user_id, at_text, todo.outbox) if todo.outbox else None,
    )
    return Applied(todo.counts, current.bad_rows)


def _row(listed: ListedMeeting, user_id: str, driver: Driver, at: str | None) -> tuple[Any, ...]:
    """Return a meeting's columns, in the order of ``MEETING_COLUMNS``."""
    wire, time_of = listed.wire, driver.time
    (
        type_id, type_name, start_at, end_at, guest_email, guest_name, host_email, canceled_at, created_at,
        problem,
    ) = columns_of(wire)  # fmt: skip
    return (
        user_id,
        listed.id,
        type_id,
        type_name,
        time_of(start_at, wire.get("start")),
        time_of(end_at, wire.get("end")),
        guest_email,
        guest_name,
        host_email,
        status_of(wire),
        time_of(canceled_at, wire.get("canceledAt")),
        time_of(created_at, wire.get("createdAt")),
        at,
        None,
        at,
        problem,
        listed.digest,
        storable_json(listed.text),
    )
