"""``lemcal sync``, ``changes``, ``retry`` and ``forget``: keep a database in sync with the meetings."""

import contextlib
import gc
import os
import stat
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import anyio
import attrs
import typer

from lemcal_async._auth import is_user_id
from lemcal_async._checks import is_seconds
from lemcal_async._client import AsyncLemcal
from lemcal_async._codec import write_time
from lemcal_async.cli._accounts import Account, find_user_id, read_accounts
from lemcal_async.cli._options import (
    AccountsFile,
    BaseUrl,
    Database,
    SandboxDatabase,
    Service,
    Target,
    UseSandbox,
    connect,
    find_target,
    open_store,
    resolve_base_url,
    with_store,
)
from lemcal_async.cli._output import (
    Column,
    ExitStatus,
    account_progress,
    convert_file_errors,
    emit,
    json_line,
    print_message,
    print_row,
    print_table,
    short_time,
    status_of,
)
from lemcal_async.errors import ConfigurationError
from lemcal_async.sync import Change, SyncReport, sync_meetings, watch as watch_meetings

if TYPE_CHECKING:
    from lemcal_async.sync import SQLStore

_COUNTS: Final = (
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
        typer.Option("--watch", metavar="SECONDS", help="Repeat at this interval, until Ctrl-C."),
    ] = None,
    changes: Annotated[
        Path | None,
        typer.Option(
            "--changes",
            metavar="FILE",
            help="Append each change to this file as a line of JSON. The file may be rotated.",
        ),
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option("--baseline", help="Do not report existing meetings as changes on the first run."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per run.")] = False,
) -> None:
    """Synchronize a database with the meetings and record changes.

    The accounts come from the file, or from the environment. Changes stay in the database (see 'lemcal
    changes') until --changes or your own program delivers them.

    The exit status is 0 only if no account failed and all rows could be read. A failed account does not stop
    the others.
    """
    job = _Job(
        service=Service(base_url, sandbox, accounts, None),
        store=open_store(db, sandbox=sandbox),
        interval=_check_interval(watch),
        changes=changes,
        baseline=baseline,
        json=json,
    )
    if status := _run(job):
        raise typer.Exit(status)


@attrs.frozen
class _Job:
    service: Service
    store: Any
    interval: float | None
    changes: Path | None
    baseline: bool
    json: bool


def _check_interval(interval: float | None) -> float | None:
    if interval is not None and not is_seconds(interval):
        raise ConfigurationError("--watch must be a number of seconds above 0")
    return interval


def _run(job: _Job) -> ExitStatus:
    """Run the job and return the exit status."""
    with _accounts(job.service) as (target, accounts), _change_handler(job.changes) as on_change:
        names = {account.user_id: account.name for account in accounts}

        async def main() -> ExitStatus:
            async with job.store, _clients(target, accounts) as clients:
                # An unwritable file is not the change's fault, so never park a change.
                options: dict[str, Any] = {
                    "on_change": on_change,
                    "baseline": job.baseline,
                    "max_attempts": sys.maxsize,
                }
                if job.interval is not None:
                    printer = _print_report_json if job.json else _WatchTable(len(clients))

                    async def on_report(report: SyncReport) -> None:
                        _show_report(report, names, printer)

                    await watch_meetings(
                        clients,
                        job.store,
                        interval=job.interval,
                        on_report=on_report,
                        **options,
                    )
                with account_progress("Synchronizing", len(clients)):
                    report = await sync_meetings(clients, job.store, **options)
                _show_report(report, names, _print_report_json if job.json else _print_report_table)
                return _status(report)

        # Keep the collector from scanning imported modules, which would block the event loop for 50 ms.
        gc.freeze()
        return anyio.run(main)


def _status(report: SyncReport) -> ExitStatus:
    """Return the exit status: that of the failures if all accounts failed for the same reason."""
    statuses = {status_of(failure.error) for failure in report.failures}
    if not statuses:
        return ExitStatus.UNREADABLE_ROWS if report.unreadable_rows else ExitStatus.OK
    same_reason = len(statuses) == 1 and report.failed == report.accounts
    return statuses.pop() if same_reason else ExitStatus.FAILED


@contextlib.contextmanager
def _accounts(service: Service) -> Generator[tuple[Target, Sequence[Account]]]:
    """Yield the service and the accounts. No accounts means the credentials of the environment."""
    if service.accounts is None:
        with find_target(service) as target:
            yield target, [target.account] if target.account else []
        return
    accounts = read_accounts(service.accounts)  # only once: it may be a pipe
    yield Target(resolve_base_url(service), accounts[0]), accounts


@contextlib.asynccontextmanager
async def _clients(target: Target, accounts: Sequence[Account]) -> AsyncGenerator[list[AsyncLemcal]]:
    """Yield a client for each account, all on one transport."""
    async with connect(target) as lemcal:
        yield [lemcal.for_account(a.user_id, a.api_key.reveal) for a in accounts] or [lemcal]


@contextlib.contextmanager
def _change_handler(path: Path | None) -> Generator[Callable[[Change], Any] | None]:
    """Yield a handler that appends changes to the file and returns once they are on disk."""
    if path is None:
        yield None
        return
    file = _ChangesFile(path)
    with convert_file_errors(path):
        file.open()
    try:
        yield file.append
    finally:
        file.close()


class _ChangesFile:
    """The file to append changes to. If log rotation moves it, a new file is created."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._lock = threading.Lock()  # accounts deliver concurrently, each in a thread

    def open(self) -> None:
        """Open the file. Only its owner can read a new file, because it contains personal data."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)  # on Windows
        self._descriptor = os.open(self._path, flags, 0o600)

    def close(self) -> None:
        """Close the file if it is open."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def append(self, change: Change) -> None:
        """Append a change, and return once it is on disk in a file that still exists."""
        line = json_line(_change_to_json(change)).encode()
        with self._lock:
            while True:
                if not self._is_current():
                    self.close()
                    self.open()
                self._write(line)
                if os.fstat(self._descriptor).st_nlink:
                    return  # otherwise, the file was deleted with the line in it

    def _is_current(self) -> bool:
        if self._descriptor < 0:
            return False
        try:
            current = self._path.stat()
        except OSError:
            return False
        return os.path.samestat(current, os.fstat(self._descriptor))

    def _write(self, line: bytes) -> None:
        regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)  # pipes and devices cannot be synced
        # Keep a line truncated by a crash separate; its change is delivered again.
        if regular and (size := os.lseek(self._descriptor, 0, os.SEEK_END)):
            os.lseek(self._descriptor, size - 1, os.SEEK_SET)
            if os.read(self._descriptor, 1) != b"\n":
                line = b"\n" + line
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        if regular:
            os.fsync(self._descriptor)


def _change_to_json(change: Change) -> dict[str, Any]:
    """Return a change as a JSON object; ``meeting`` is in the service's format."""
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


def _show_report(report: SyncReport, names: dict[str, str], printer: Callable[[SyncReport], object]) -> None:
    """Print a report, and on standard error a line per failure or unreadable row."""
    printer(report)
    for unreadable in report.unreadable_rows:
        account = _account_label(unreadable.user_id, names)
        print_message(
            f"warning: {account}: row {unreadable.row.index} cannot be read: {unreadable.row.reason}"
        )
    for failure in report.failures:
        stage = "a change could not be delivered: " if failure.stage == "delivery" else ""
        print_message(f"{_account_label(failure.user_id, names)}: {stage}{failure.error}")


def _account_label(user_id: str | None, names: dict[str, str]) -> str:
    name = names.get(user_id or "")
    return f"account {name} ({user_id})" if name else f"account {user_id or 'without a user id'}"


def _print_report_json(report: SyncReport) -> None:
    counts = {name: getattr(report, name) for name in _COUNTS}
    emit(json_line({**counts, "seconds": round(report.seconds, 3)}))


def _column(name: str) -> Column[SyncReport]:
    return Column(name.capitalize(), lambda report: str(getattr(report, name)))


_COLUMNS: Final[Sequence[Column[SyncReport]]] = (
    *map(_column, _COUNTS),
    Column("Seconds", lambda report: f"{report.seconds:.1f}"),
)


def _print_report_table(report: SyncReport) -> None:
    print_table(_COLUMNS, [report])


class _WatchTable:
    """Prints a line per run below one heading: when it ended, and how many failed accounts it skipped."""

    def __init__(self, accounts: int) -> None:
        self._accounts = accounts
        self._headings = ["Ended (UTC)", *(column.heading for column in _COLUMNS), "Skipped"]
        self._widths = [19, *(max(len(heading), 7) for heading in self._headings[1:])]
        self._heading_printed = False

    def __call__(self, report: SyncReport) -> None:
        if not self._heading_printed:
            print_row(self._headings, self._widths)
            self._heading_printed = True
        counts = [column.value(report) or "" for column in _COLUMNS]
        skipped = str(self._accounts - report.accounts)
        print_row([f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}", *counts, skipped], self._widths)


def _start_time(change: Change) -> str:
    return str(change.wire.get("start") or "")[:16].replace("T", " ")


_CHANGE_COLUMNS: Final = (
    Column[Change]("Found (UTC)", lambda change: short_time(change.found_at), no_wrap=True, rank=1),
    Column[Change]("Change", lambda change: change.kind, no_wrap=True),
    Column[Change]("Fields", lambda change: ", ".join(change.fields)),
    Column[Change]("Start (UTC)", _start_time, no_wrap=True, rank=2),
    Column[Change]("Meeting", lambda change: change.meeting_id, no_wrap=True),
    Column[Change]("Account", lambda change: change.user_id, no_wrap=True, rank=3),
)
_PARKED_COLUMNS: Final = (
    Column[Change]("Parked (UTC)", lambda change: short_time(change.parked_at), no_wrap=True, rank=1),
    Column[Change]("Change", lambda change: change.kind, no_wrap=True),
    Column[Change]("Attempts", lambda change: str(change.attempts), rank=2),
    Column[Change]("Meeting", lambda change: change.meeting_id, no_wrap=True),
    Column[Change]("Account", lambda change: change.user_id, no_wrap=True, rank=3),
    Column[Change]("Error", lambda change: change.error),
)


def changes(
    *,
    db: Database = None,
    sandbox: SandboxDatabase = False,
    pending: Annotated[
        bool, typer.Option("--pending", help="Only undelivered changes that are not parked.")
    ] = False,
    parked: Annotated[
        bool,
        typer.Option("--parked", help="Only changes parked after too many failures; see 'lemcal retry'."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON even on a terminal.")] = False,
) -> None:
    """Print the recorded changes, oldest first.

    On a terminal, they are printed as a table; to a file or a pipe, or with --json, as one JSON object per
    line. The database is not modified.
    """
    as_table = sys.stdout.isatty() and not json

    async def read(store: "SQLStore") -> list[Change]:
        table_rows: list[Change] = []
        async for change in store.changes(pending=pending, parked=parked):
            if as_table:
                table_rows.append(change)
            else:
                emit(json_line(_change_to_json(change)))
        return table_rows

    found = with_store(open_store(db, sandbox=sandbox, create=False), "Reading the changes", read)
    if found:
        print_table(_PARKED_COLUMNS if parked and not pending else _CHANGE_COLUMNS, found)
    elif as_table:
        print_message("no changes")


def retry(
    user_id: Annotated[
        str | None, typer.Argument(metavar="USER_ID", help="Only changes of this account (usr_...).")
    ] = None,
    *,
    db: Database = None,
    sandbox: SandboxDatabase = False,
) -> None:
    """Schedule parked changes for another delivery.

    The next synchronization delivers them in their original order.
    """
    if user_id is not None and not is_user_id(user_id):
        raise ConfigurationError(f"{user_id!r} is not a user id (usr_...)")

    async def schedule(store: "SQLStore") -> int | None:
        count = await store.retry_parked(user_id)
        return count if count or user_id is None or await store.revision(user_id) else None

    count = with_store(open_store(db, sandbox=sandbox, create=False), "Retrying", schedule)
    if count is None:
        print_message(f"the database contains no data of {user_id}")
        raise typer.Exit(ExitStatus.NOT_FOUND)
    emit(f"{count} parked {'change' if count == 1 else 'changes'} will be delivered again.\n")


def forget(
    account: Annotated[
        str, typer.Argument(metavar="ACCOUNT", help="The user id (usr_...); with --accounts, the name.")
    ],
    *,
    db: Database = None,
    sandbox: SandboxDatabase = False,
    accounts: Annotated[
        Path | None, typer.Option("--accounts", metavar="FILE", help="The TOML file that contains the name.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Erase an account's meetings and changes from the database.

    Stop synchronizing the account first: otherwise the next synchronization adds it again as a new account.
    """
    user_id = account if accounts is None else find_user_id(accounts, account)
    if accounts is None and not is_user_id(account):
        raise ConfigurationError(
            f"{account!r} is not a user id (usr_...); to pass an account's name, add --accounts FILE"
        )
    store = open_store(db, sandbox=sandbox, create=False)
    label = user_id if account == user_id else f"{account} ({user_id})"
    if not yes:
        _confirm(f"erase all data of {label}? This cannot be undone. [y/N]")

    async def erase(store: "SQLStore") -> tuple[int, int] | None:
        known = await store.revision(user_id)
        erased = await store.forget(user_id)
        return (erased.meetings, erased.changes) if known or erased.meetings or erased.changes else None

    erased = with_store(store, "Erasing the account", erase)
    if erased is None:
        print_message(f"the database contains no data of {label}")
        raise typer.Exit(ExitStatus.NOT_FOUND)
    emit(f"Erased {erased[0]} meetings and {erased[1]} changes of {label}.\n")


def _confirm(question: str) -> None:
    """Ask for confirmation on standard error; ConfigurationError unless the answer is yes."""
    print_message(question)
    answer = sys.stdin.readline().strip().lower()
    if answer not in ("y", "yes"):
        raise ConfigurationError("nothing was erased; answer y, or pass --yes")
