"""``lemcal changes`` and ``lemcal forget``: what a synchronisation has found, and how it is erased."""

import json as json_module
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import anyio
import typer

from lemcal_async.cli.exits import ExitStatus, tell
from lemcal_async.cli.outbox import COLUMNS, change_object
from lemcal_async.cli.output import emit, print_table
from lemcal_async.cli.progress import waiting
from lemcal_async.cli.store import Database, chosen_store
from lemcal_async.sync import Change, Store

T = TypeVar("T")


def changes(
    *,
    db: Database = None,
    pending: Annotated[bool, typer.Option("--pending", help="Only those that no handler has taken.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on a terminal, too.")] = False,
) -> None:
    """Print the changes that synchronisations have found, the oldest first; this marks nothing.

    On a terminal they are a table; into a file or a pipe, or with --json, one JSON object per line.
    """
    as_table = sys.stdout.isatty() and not json

    async def read(store: Store) -> list[Change]:
        kept: list[Change] = []
        async for change in store.changes(pending=pending):
            if as_table:
                kept.append(change)
            else:
                emit(json_line(change_object(change)))
        return kept

    found = _with_store(db, "Reading the changes", read)
    if found:
        print_table(COLUMNS, found)
    elif as_table:
        tell("no changes")


def forget(
    user_id: Annotated[str, typer.Argument(metavar="USER_ID", help="The account's user id (usr_...).")],
    *,
    db: Database = None,
) -> None:
    """Erase all data of an account from the database: its meetings, its changes, what is known of it.

    If the account is synchronised again, it comes back as a new one: take it out of the accounts first.
    """

    async def erase(store: Store) -> tuple[int, int] | None:
        known = await store.revision(user_id)
        erased = await store.forget(user_id)
        return (erased.meetings, erased.changes) if known or erased.meetings or erased.changes else None

    erased = _with_store(db, "Erasing the account", erase)
    if erased is None:
        tell(f"nothing is known of {user_id}")
        raise typer.Exit(ExitStatus.NOT_FOUND)
    emit(f"{user_id} is forgotten: {erased[0]} meetings and {erased[1]} changes were erased.\n")


def json_line(data: dict[str, Any]) -> str:
    """Return data as one line of JSON, in ASCII."""
    return json_module.dumps(data) + "\n"


def _with_store(db: str | None, text: str, function: Callable[[Store], Awaitable[T]]) -> T:
    store = chosen_store(db, create=False)

    async def main() -> T:
        async with store:
            return await function(store)

    with waiting(text):
        return anyio.run(main)
