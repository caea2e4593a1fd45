"""``lemcal changes``, ``lemcal retry``, ``lemcal forget``: what synchronizations found, and erasing it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lemcal_async._codec import write_time
from lemcal_async.cli._accounts import find_user_id
from lemcal_async.cli._database import Database, OfSandbox, open_store, with_store
from lemcal_async.cli._output import Column, ExitStatus, emit, json_line, print_table, short_time, tell
from lemcal_async.errors import ConfigurationError
from lemcal_async.sync import Change

if TYPE_CHECKING:
    from lemcal_async.sync import SQLStore


def change_object(change: Change) -> dict[str, Any]:
    """Return a change as programs get it; ``meeting`` is as the service writes it."""
    return {
        "seq": change.seq,
        "user_id": change.user_id,
        "meeting_id": change.meeting_id,
        "kind": change.kind,
        "fields": list(change.fields),
        "found_at": write_time(change.found_at),
        "delivered_at": change.delivered_at and write_time(change.delivered_at),
        "attempts": change.attempts,
        "error": change.error,
        "parked_at": change.parked_at and write_time(change.parked_at),
        "meeting": change.wire,
    }


def _start(change: Change) -> str:
    return str(change.wire.get("start") or "")[:16].replace("T", " ")


COLUMNS = (
    Column[Change]("Found (UTC)", lambda change: short_time(change.found_at), whole=True, rank=1),
    Column[Change]("Change", lambda change: change.kind, whole=True),
    Column[Change]("Fields", lambda change: ", ".join(change.fields)),
    Column[Change]("Start (UTC)", _start, whole=True, rank=2),
    Column[Change]("Meeting", lambda change: change.meeting_id, whole=True),
    Column[Change]("Account", lambda change: change.user_id, whole=True, rank=3),
)
PARKED_COLUMNS = (
    Column[Change]("Parked (UTC)", lambda change: short_time(change.parked_at), whole=True, rank=1),
    Column[Change]("Change", lambda change: change.kind, whole=True),
    Column[Change]("Attempts", lambda change: str(change.attempts), rank=2),
    Column[Change]("Meeting", lambda change: change.meeting_id, whole=True),
    Column[Change]("Account", lambda change: change.user_id, whole=True, rank=3),
    Column[Change]("Error", lambda change: change.error),
)


def changes(
    *,
    db: Database = None,
    sandbox: OfSandbox = False,
    pending: Annotated[
        bool, typer.Option("--pending", help="Only those that are still to be delivered.")
    ] = False,
    parked: Annotated[
        bool,
        typer.Option("--parked", help="Only those that a handler has failed too often; see 'lemcal retry'."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on a terminal, too.")] = False,
) -> None:
    """Print the changes that synchronizations have found, oldest first. It only reads.

    On a terminal they are a table; into a file or a pipe, or with --json, one JSON object per line.
    """
    as_table = sys.stdout.isatty() and not json

    async def read(store: "SQLStore") -> list[Change]:
        kept: list[Change] = []
        async for change in store.changes(pending=pending, parked=parked):
            if as_table:
                kept.append(change)
            else:
                emit(json_line(change_object(change)))
        return kept

    found = with_store(open_store(db, sandbox=sandbox, create=False), "Reading the changes", read)
    if found:
        print_table(PARKED_COLUMNS if parked and not pending else COLUMNS, found)
    elif as_table:
        tell("no changes")


def retry(
    user_id: Annotated[
        str | None, typer.Argument(metavar="[USER_ID]", help="Only those of this account (usr_...).")
    ] = None,
    *,
    db: Database = None,
    sandbox: OfSandbox = False,
) -> None:
    """Have parked changes delivered again by the next synchronization, in their old order."""
    store = open_store(db, sandbox=sandbox, create=False)
    count = with_store(store, "Retrying", lambda store: store.retry_parked(user_id))
    emit(f"{count} parked {'change' if count == 1 else 'changes'} will be delivered again.\n")


def forget(
    account: Annotated[
        str, typer.Argument(metavar="ACCOUNT", help="The user id (usr_...), or with --accounts the name.")
    ],
    *,
    db: Database = None,
    sandbox: OfSandbox = False,
    accounts: Annotated[
        Path | None, typer.Option("--accounts", metavar="FILE", help="The TOML file that has the name.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase all data of an account from the database: its meetings and its changes.

    An account that is synchronized again comes back as a new one: remove it from the accounts first.
    """
    user_id = account if accounts is None else find_user_id(accounts, account)
    if accounts is None and not account.startswith("usr_"):
        raise ConfigurationError(
            f"{account!r} is not a user id (usr_...); to give the name of an account, add --accounts FILE"
        )
    store = open_store(db, sandbox=sandbox, create=False)
    named = user_id if account == user_id else f"{account} ({user_id})"
    if not yes:
        _confirm(f"erase all data of {named}? It cannot be undone. [y/N]")

    async def erase(store: "SQLStore") -> tuple[int, int] | None:
        known = await store.revision(user_id)
        erased = await store.forget(user_id)
        return (erased.meetings, erased.changes) if known or erased.meetings or erased.changes else None

    erased = with_store(store, "Erasing the account", erase)
    if erased is None:
        tell(f"the database has nothing about {named}")
        raise typer.Exit(ExitStatus.NOT_FOUND)
    emit(f"{named} is forgotten: {erased[0]} meetings and {erased[1]} changes were erased.\n")


def _confirm(question: str) -> None:
    """Ask on standard error; ConfigurationError unless the answer is yes."""
    tell(question)
    answer = sys.stdin.readline().strip().lower()
    if answer not in ("y", "yes"):
        raise ConfigurationError("nothing was erased; answer y, or pass --yes")
