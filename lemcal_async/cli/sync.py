"""``lemcal sync``: a database in step with the accounts' meetings, once or again and again."""

import contextlib
import gc
import os
import stat
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from pathlib import Path
from typing import Annotated, Any

import anyio
import attrs
import typer

from lemcal_async.accounts import Account, read_accounts
from lemcal_async.cli.changes import json_line
from lemcal_async.cli.exits import ExitStatus, tell
from lemcal_async.cli.listing import AsJson
from lemcal_async.cli.outbox import change_object
from lemcal_async.cli.output import Column, emit, print_table
from lemcal_async.cli.progress import counting
from lemcal_async.cli.session import (
    AccountsFile,
    BaseUrl,
    Service,
    Target,
    UseSandbox,
    base_url_of,
    connect,
    found,
)
from lemcal_async.cli.store import Database, chosen_store
from lemcal_async.client import AsyncLemcal
from lemcal_async.errors import ConfigurationError
from lemcal_async.sync import Change, SyncReport, sync_meetings, watch

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


def _run(job: _Job) -> int:
    """Do the job, and return how many accounts failed."""
    with _accounts(job.service) as (target, accounts), _appending(job.changes) as on_change:
        names = {account.user_id: account.name for account in accounts}

        async def main() -> int:
            async with job.store, _clients(target, accounts) as clients:
                options: dict[str, Any] = {"on_change": on_change, "baseline": job.baseline}
                if job.interval is not None:
                    await watch(
                        clients,
                        job.store,
                        interval=job.interval,
                        on_report=lambda report: _print(report, names, as_json=job.json),
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
    accounts = read_accounts(service.accounts, os.environ)  # once: it may be a pipe
    yield Target(base_url_of(service), accounts[0]), accounts


@contextlib.asynccontextmanager
async def _clients(target: Target, accounts: Sequence[Account]) -> AsyncGenerator[list[AsyncLemcal]]:
    """Provide a client for each account, all on one wire."""
    async with connect(target) as lemcal:
        yield [lemcal.for_account(a.user_id, a.api_key) for a in accounts] or [lemcal]


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
