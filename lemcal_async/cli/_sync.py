"""The database that the commands of a synchronisation share: which one, and what is wrong with it.

MERGED [cli.outbox] How a change is shown: the columns for people, and the object for programs.

MERGED [cli.changes] ``lemcal changes`` and ``lemcal forget``: what a run has found, and how it is erased.

MERGED [cli.sync] ``lemcal sync``: a database in step with the accounts' meetings, once or again and again.
"""

import contextlib
import gc
import json as json_module
import logging
import os
import stat
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

import anyio
import attrs
import typer

from lemcal_async._client import AsyncLemcal
from lemcal_async.cli._accounts import Account, read_accounts
from lemcal_async.cli._calls import AsJson, short_time, wire_time
from lemcal_async.cli._options import (
    AccountsFile,
    BaseUrl,
    Service,
    Target,
    UseSandbox,
    base_url_of,
    connect,
    found,
)
from lemcal_async.cli._output import Column, ExitStatus, counting, emit, print_table, tell, waiting
from lemcal_async.errors import ConfigurationError
from lemcal_async.sync import Change, Store, SyncReport, sync_meetings, watch

if TYPE_CHECKING:
    from lemcal_async.sync import SQLStore


DATABASE_VARIABLE: Final = "LEMCAL_DB"

Database: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="URL",
        help=f"The database: sqlite:///FILE or postgresql://HOST/NAME; else that of {DATABASE_VARIABLE}, "
        "else sqlite:///lemcal.db.",
    ),
]


def chosen_store(argument: str | None, *, sandbox: bool = False, create: bool = True) -> "SQLStore":
    """Return the store; ConfigurationError if the URL is none, or the extra ``sql`` is missing."""
    if argument and _has_password(argument):
        tell(
            "warning: other users of this machine can see arguments, and the database URL holds a password; "
            f"put it into {DATABASE_VARIABLE}"
        )
    try:
        from lemcal_async.sync import SQLStore  # noqa: PLC0415  # another extra, and slow to import
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # names the extra
        problem = str(error)
    else:
        default = "sqlite:///lemcal-sandbox.db" if sandbox else "sqlite:///lemcal.db"
        url = os.environ.get(DATABASE_VARIABLE) or default if argument is None else argument
        return SQLStore(url, create=create)
    raise ConfigurationError(problem)


def _has_password(url: str) -> bool:
    try:
        return bool(urlsplit(url).password)
    except ValueError:
        return False


def change_object(change: Change) -> dict[str, Any]:
    """Return the object for programs; ``meeting`` is as the service writes it."""
    return {
        "seq": change.seq,
        "user_id": change.user_id,
        "meeting_id": change.meeting_id,
        "kind": change.kind,
        "fields": list(change.fields),
        "found_at": wire_time(change.found_at),
        "delivered_at": wire_time(change.delivered_at),
        "meeting": change.wire,
    }


def _start(change: Change) -> str:
    return str(change.wire.get("start") or "")[:16].replace("T", " ")


COLUMNS = (
    Column[Change]("Found (UTC)", lambda change: short_time(change.found_at), whole=True, if_room=True),
    Column[Change]("Change", lambda change: change.kind, whole=True),
    Column[Change]("Fields", lambda change: ", ".join(change.fields)),
    Column[Change]("Start (UTC)", _start, whole=True, if_room=True),
    Column[Change]("Meeting", lambda change: change.meeting_id, whole=True),
    Column[Change]("Account", lambda change: change.user_id, whole=True, if_room=True),
)


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


_NUMBERS = (
    "accounts", "failed", "created", "changed", "canceled", "disappeared", "restored", "unchanged",
)  # fmt: skip


def sync(
    *,
    db: Database = None,
    accounts: AccountsFile = None,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    watch: Annotated[
        float | None,
        typer.Option("--watch", metavar="SECONDS", help="Do it again and again, until Ctrl-C."),
    ] = None,
    changes: Annotated[
        Path | None,
        typer.Option("--changes", metavar="FILE", help="Append each change to this file, as a line of JSON."),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option("--baseline", help="What an account has at its first run is no change."),
    ] = False,
    json: AsJson = False,
) -> None:
    """Bring a database in step with the booked meetings, and find out what changed.

    The accounts are all of the file, else the one of the environment. With --sandbox the database is
    sqlite:///lemcal-sandbox.db unless told otherwise. The changes wait in the database ('lemcal changes')
    until --changes or a program of yours takes them.

    The exit status is 0 only if no account failed, else 1; the others are synchronised all the same.
    """
    job = _Job(
        service=Service(base_url, sandbox, accounts, None),
        store=chosen_store(db, sandbox=sandbox),
        interval=_checked(watch),
        changes=changes,
        baseline=baseline,
        json=json,
    )
    failed = _run(job)
    if failed:
        raise typer.Exit(ExitStatus.FAILED)


@attrs.frozen
class _Job:
    service: Service
    store: Any
    interval: float | None
    changes: Path | None
    baseline: bool
    json: bool


def _checked(interval: float | None) -> float | None:
    if interval is not None and not 0 < interval < float("inf"):
        raise ConfigurationError("--watch must be seconds above 0")
    return interval


# The failures are printed with each report: without a handler, logging would print them as well.
_QUIET = logging.NullHandler()


def _run(job: _Job) -> int:
    """Do the job, and return how many accounts failed."""
    logging.getLogger("lemcal_async.sync").addHandler(_QUIET)
    with _accounts(job.service) as (target, accounts), _appending(job.changes) as on_change:
        names = {account.user_id: account.name for account in accounts}

        async def on_report(report: SyncReport) -> None:
            _print(report, names, as_json=job.json)

        async def main() -> int:
            async with job.store, _clients(target, accounts) as clients:
                options: dict[str, Any] = {"on_change": on_change, "baseline": job.baseline}
                if job.interval is not None:
                    await watch(
                        clients,
                        job.store,
                        interval=job.interval,
                        on_report=on_report,
                        **options,
                    )
                with counting("Synchronising", len(clients)):
                    report = await sync_meetings(clients, job.store, **options)
                _print(report, names, as_json=job.json)
                return report.failed

        # What is imported stays: a collection that looks through it all holds the event loop up for 50 ms.
        gc.freeze()
        return anyio.run(main)


@contextlib.contextmanager
def _accounts(service: Service) -> Generator[tuple[Target, Sequence[Account]]]:
    """Provide the service and the accounts; none means the one of the environment."""
    if service.accounts is None:
        with found(service) as target:
            yield target, [target.account] if target.account else []
        return
    accounts = read_accounts(service.accounts)  # once: it may be a pipe
    yield Target(base_url_of(service), accounts[0]), accounts


@contextlib.asynccontextmanager
async def _clients(target: Target, accounts: Sequence[Account]) -> AsyncGenerator[list[AsyncLemcal]]:
    """Provide a client for each account, all on one wire."""
    async with connect(target) as lemcal:
        yield [lemcal.for_account(a.user_id, a.api_key.reveal()) for a in accounts] or [lemcal]


@contextlib.contextmanager
def _appending(path: Path | None) -> Generator[Callable[[Change], Any] | None]:
    """Provide the handler that appends changes to the file; each is on the disk when it returns."""
    if path is None:
        yield None
        return
    try:
        file = path.open("a+b", buffering=0)
    except OSError as error:
        problem = error.strerror
    else:
        with file:
            yield lambda change: anyio.to_thread.run_sync(_append, file, change)
        return
    raise ConfigurationError(f"{path} cannot be written: {problem}")


def _append(file: Any, change: Change) -> None:
    # A line that a crash has cut stays a line of its own; its change comes again.
    if file.seekable() and file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    line = memoryview(json_line(change_object(change)).encode())
    while line:
        line = line[file.write(line) :]
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe or a device has no disk
        os.fsync(file.fileno())


def _print(report: SyncReport, names: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        numbers = {name: getattr(report, name) for name in _NUMBERS}
        emit(json_line({**numbers, "seconds": round(report.seconds, 3)}))
    else:
        print_table(_COLUMNS, [report])
    for unreadable in report.unreadable_rows:
        account = _named(unreadable.user_id, names)
        tell(f"warning: {account}: row {unreadable.row.index} cannot be read: {unreadable.row.reason}")
    for failure in report.failures:
        stage = "a change could not be delivered: " if failure.stage == "delivery" else ""
        tell(f"{_named(failure.user_id, names)}: {stage}{failure.error}")


def _named(user_id: str | None, names: dict[str, str]) -> str:
    name = names.get(user_id or "")
    return f"account {name} ({user_id})" if name else f"account {user_id or 'without a user id'}"


def _column(name: str) -> Column[SyncReport]:
    return Column(name.capitalize(), lambda report: str(getattr(report, name)))


_COLUMNS: Sequence[Column[SyncReport]] = (
    *map(_column, _NUMBERS),
    Column("Seconds", lambda report: f"{report.seconds:.1f}"),
)
