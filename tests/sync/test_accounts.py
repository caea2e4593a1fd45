"""Forty accounts on both databases: what happened at the service is what the report says."""

from typing import Any

import pytest

from lemcal_async.errors import AuthenticationError
from lemcal_async.sync import SQLStore, sync_meetings

from .conftest import Database, outbox

ACCOUNTS = 40
MEETINGS = 25


def numbers(report: Any) -> dict[str, int]:
    """Return the counts of a report that are not 0."""
    names = ("failed", "created", "changed", "canceled", "disappeared", "restored", "unchanged")
    return {name: number for name in names if (number := getattr(report, name))}


@pytest.mark.anyio
async def test_forty_accounts(database: Database, sql_store: SQLStore, worlds: Any) -> None:
    """One field changed, one canceled, one removed, one added, one unknown field: exactly that."""
    world = worlds(ACCOUNTS, MEETINGS)
    sandbox, clients = world.sandbox, world.clients()
    total = ACCOUNTS * MEETINGS

    assert {"created": total} == numbers(await sync_meetings(clients, sql_store))
    assert {"unchanged": total} == numbers(await sync_meetings(clients, sql_store))

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
    } == numbers(report)
    found: dict[str, list[Any]] = {}
    for change in (await outbox(sql_store))[total:]:
        found.setdefault(change.user_id, []).append((change.meeting_id, change.kind, change.fields))
    assert expected == {user_id: sorted(changes) for user_id, changes in found.items()}

    for account, row in removed.items():
        sandbox.book(account, **row)
    report = await sync_meetings(clients, sql_store)
    assert {"restored": ACCOUNTS, "unchanged": total} == numbers(report)
    assert [(total + ACCOUNTS,)] == database.query("SELECT count(*) FROM meetings")


@pytest.mark.anyio
async def test_one_account_that_is_refused(database: Database, sql_store: SQLStore, worlds: Any) -> None:
    """Only that account fails, and nothing of it is lost."""
    world = worlds(5, 6)
    await sync_meetings(world.clients(), sql_store)
    clients = world.clients()
    user_id = clients[2].user_id
    clients[2] = world.lemcal.for_account(user_id, "wrong")

    report = await sync_meetings(clients, sql_store)
    assert {"failed": 1, "unchanged": 24} == numbers(report)
    (failure,) = report.failures
    assert (user_id, "fetch", AuthenticationError) == (failure.user_id, failure.stage, type(failure.error))
    assert [(6,)] == database.query(
        f"SELECT count(*) FROM meetings WHERE user_id = '{user_id}' AND status <> 'disappeared'"
    )
    ((error,),) = database.query(f"SELECT last_error FROM accounts WHERE user_id = '{user_id}'")
    assert "401" in error
    assert "wrong" not in error

    assert {"unchanged": 30} == numbers(await sync_meetings(world.clients(), sql_store))
    assert [(None,)] == database.query(f"SELECT last_error FROM accounts WHERE user_id = '{user_id}'")
