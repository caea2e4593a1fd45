"""Forty accounts on both databases: the report matches what happened at the service."""

from typing import Any

import pytest

from lemcal_async.errors import AuthenticationError
from lemcal_async.sync import SQLStore, sync_meetings

from .conftest import Database, outbox

ACCOUNTS = 40
MEETINGS = 25


def nonzero_counts(report: Any) -> dict[str, int]:
    """Return the nonzero counts of a report."""
    names = ("failed", "created", "changed", "canceled", "disappeared", "restored", "unchanged")
    return {name: number for name in names if (number := getattr(report, name))}


@pytest.mark.anyio
async def test_forty_accounts(database: Database, sql_store: SQLStore, serve_sandbox: Any) -> None:
    """One meeting changed, one canceled, one removed, one added, one with an unknown field: exactly these."""
    served = serve_sandbox(ACCOUNTS, MEETINGS)
    sandbox, clients = served.sandbox, served.clients()
    total = ACCOUNTS * MEETINGS

    assert {"created": total} == nonzero_counts(await sync_meetings(clients, sql_store))
    assert {"unchanged": total} == nonzero_counts(await sync_meetings(clients, sql_store))

    removed: dict[int, dict[str, Any]] = {}
    expected: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {}
    for account in range(ACCOUNTS):
        rows = [row for row in sandbox.meetings(account) if "canceledAt" not in row]
        sandbox.edit(rows[0]["_id"], start="2026-03-02T09:00:00.000Z")
        sandbox.cancel(rows[1]["_id"])
        removed[account] = rows[2]
        sandbox.remove(rows[2]["_id"])
        booked = sandbox.book(account)
        sandbox.edit(rows[3]["_id"], brandNew={"deep": [1, None]})
        attendees = sandbox.meetings(account)[4]["attendees"]
        sandbox.edit(sandbox.meetings(account)[4]["_id"], attendees=attendees[::-1])
        expected[sandbox.accounts[account].user_id] = sorted(
            [
                (rows[0]["_id"], "changed", ("start",)),
                (rows[1]["_id"], "canceled", ("canceledAt",)),
                (rows[2]["_id"], "disappeared", ()),
                (rows[3]["_id"], "changed", ("brandNew",)),
                (booked["_id"], "created", ()),
            ]
        )
    report = await sync_meetings(clients, sql_store)
    assert {
        "created": ACCOUNTS,
        "changed": 2 * ACCOUNTS,
        "canceled": ACCOUNTS,
        "disappeared": ACCOUNTS,
        "unchanged": total - 4 * ACCOUNTS,
    } == nonzero_counts(report)
    found: dict[str, list[Any]] = {}
    for change in (await outbox(sql_store))[total:]:
        found.setdefault(change.user_id, []).append((change.meeting_id, change.kind, change.fields))
    assert expected == {user_id: sorted(changes) for user_id, changes in found.items()}

    for account, row in removed.items():
        sandbox.book(account, **row)
    report = await sync_meetings(clients, sql_store)
    assert {"restored": ACCOUNTS, "unchanged": total} == nonzero_counts(report)
    assert [(total + ACCOUNTS,)] == database.query("SELECT count(*) FROM meetings")


@pytest.mark.anyio
async def test_rejected_account(database: Database, sql_store: SQLStore, serve_sandbox: Any) -> None:
    """Only that account fails, and none of its data is lost."""
    served = serve_sandbox(5, 6)
    await sync_meetings(served.clients(), sql_store)
    clients = served.clients()
    user_id = clients[2].user_id
    clients[2] = served.lemcal.for_account(user_id, "wrong")

    report = await sync_meetings(clients, sql_store)
    assert {"failed": 1, "unchanged": 24} == nonzero_counts(report)
    (failure,) = report.failures
    assert (user_id, "fetch", AuthenticationError) == (failure.user_id, failure.stage, type(failure.error))
    assert [(6,)] == database.query(
        f"SELECT count(*) FROM meetings WHERE user_id = '{user_id}' AND status <> 'disappeared'"
    )
    ((error,),) = database.query(f"SELECT last_error FROM accounts WHERE user_id = '{user_id}'")
    assert "401" in error
    assert "wrong" not in error

    assert {"unchanged": 30} == nonzero_counts(await sync_meetings(served.clients(), sql_store))
    assert [(None,)] == database.query(f"SELECT last_error FROM accounts WHERE user_id = '{user_id}'")
