"""``lemcal report``: booking statistics from a synchronized database."""

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final
from zoneinfo import ZoneInfo

import attrs
import typer

from lemcal_async.cli._options import Database, SandboxDatabase, open_store, with_store
from lemcal_async.cli._output import convert_file_errors, emit, print_fields, print_message, short_time
from lemcal_async.cli._report_page import describe_age, render
from lemcal_async.errors import ConfigurationError

if TYPE_CHECKING:
    from lemcal_async.sync import SQLStore

MAX_WEEKS: Final = 26
"""The number of most recent weeks to show."""

MAX_TYPES: Final = 6
"""The number of most frequent meeting types to show; the rest is combined."""

DAYS_AHEAD: Final = (("same day", 0), ("1 day", 1), ("2-3", 3), ("4-7", 7), ("8-14", 14), ("15-30", 30))
"""Ranges of days between booking and start: labels and upper bounds. Larger values are "31+"."""

_MAX_PEOPLE: Final = 20


def report(
    *,
    db: Database = None,
    sandbox: SandboxDatabase = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write an HTML page with charts to this file."),
    ] = None,
    timezone: Annotated[
        str, typer.Option("--tz", metavar="ZONE", help="The time zone for days and hours (Europe/Paris).")
    ] = "UTC",
    guests: Annotated[
        bool, typer.Option("--guests", help="Show the names of guests and hosts. They are hidden by default.")
    ] = False,
) -> None:
    """Summarize the meetings in a synchronized database.

    The report covers bookings, cancellations, hours, hosts, accounts and undelivered changes. Without --out,
    it is printed as text. The HTML page is a single file that contains no scripts and loads no resources.
    """
    zone = _zone(timezone)
    store = open_store(db, sandbox=sandbox, create=False)
    report = with_store(store, "Reading the database", lambda store: _read(store, zone, guests=guests))
    if out is None:
        _print_summary(report)
        return
    _write(out, render(report))
    print_message(f"wrote {out}")


def _zone(name: str) -> ZoneInfo:
    with contextlib.suppress(KeyError, ValueError, OSError):  # an unknown or malformed name
        return ZoneInfo(name)
    raise ConfigurationError(f"--tz {name[:50]}: unknown time zone; use a name such as Europe/Paris")


def _write(path: Path, page: str) -> None:
    """Write the page to the file; OutputError if that fails."""
    with convert_file_errors(path):
        if path.exists() and not path.is_file():  # a pipe or a device, which must not be replaced
            path.write_text(page, encoding="utf-8")
        else:
            _replace(Path(os.path.realpath(path)), page)  # the target of a symbolic link, not the link


def _replace(path: Path, page: str) -> None:
    """Replace the file atomically; only its owner can read it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123  # a descriptor
            file.write(page)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@attrs.frozen
class MeetingRow:
    """The columns of a meeting that the report uses."""

    user_id: str
    type_name: str | None
    start: datetime | None
    created: datetime | None
    status: str
    host: str | None
    guest: str | None
    guest_name: str | None


@attrs.frozen
class AccountRow:
    """The state of an account's synchronization."""

    user_id: str
    synced_at: datetime | None
    failing: bool
    meetings: int


@attrs.frozen
class Report:
    """The numbers of a report. Hosts and guests have their number of meetings, the most frequent first."""

    generated_at: datetime
    zone: str
    booked: int
    canceled: int
    disappeared: int
    upcoming: int
    weeks: Sequence[date]  # Mondays
    bookings: dict[str, list[int]]  # by meeting type: a count per week
    canceled_by_type: dict[str, tuple[int, int]]  # canceled, total
    days_ahead: list[tuple[str, int]]
    hours: list[list[int]]  # by weekday from Monday: a count per hour
    hosts: list[tuple[str, int]]
    guests: list[tuple[str, int]] | None
    accounts: Sequence[AccountRow]
    pending: int
    parked: int
    oldest_pending: datetime | None

    @property
    def total(self) -> int:
        """The number of meetings, including those that have disappeared."""
        return self.booked + self.canceled + self.disappeared

    @property
    def canceled_share(self) -> float:
        """The fraction of meetings that were canceled or have disappeared."""
        return (self.canceled + self.disappeared) / self.total if self.total else 0.0


async def _read(store: "SQLStore", zone: ZoneInfo, *, guests: bool) -> Report:
    from sqlalchemy import func, select  # noqa: PLC0415  # the extra `sql`

    from lemcal_async.sync._tables import accounts, changes, meetings  # noqa: PLC0415  # as above

    columns = (
        meetings.c.user_id,
        meetings.c.meeting_type_name,
        meetings.c.start_at,
        meetings.c.created_at,
        meetings.c.status,
        meetings.c.host_email,
        meetings.c.guest_email,
        meetings.c.guest_name,
    )
    # Skip pruned meetings: none of their details are known.
    rows = await store.query(select(*columns).where(meetings.c.wire.is_not(None)))
    known = [MeetingRow(*row) for row in rows]
    per_account = Counter(meeting.user_id for meeting in known)
    states = await store.query(
        select(accounts.c.user_id, accounts.c.synced_at, accounts.c.last_error).order_by(accounts.c.user_id)
    )
    undelivered = changes.c.delivered_at.is_(None)
    [(pending, oldest)] = await store.query(
        select(func.count(), func.min(changes.c.found_at)).where(undelivered, changes.c.parked_at.is_(None))
    )
    [(parked,)] = await store.query(select(func.count()).where(undelivered, changes.c.parked_at.is_not(None)))
    return summarize(
        known,
        [
            AccountRow(user_id, synced_at, error is not None, per_account[user_id])
            for user_id, synced_at, error in states
        ],
        zone,
        datetime.now(UTC),
        guests=guests,
        pending=pending,
        oldest_pending=oldest,
        parked=parked,
    )


def summarize(
    meetings: Sequence[MeetingRow],
    accounts: Sequence[AccountRow],
    zone: ZoneInfo,
    now: datetime,
    *,
    guests: bool,
    pending: int = 0,
    parked: int = 0,
    oldest_pending: datetime | None = None,
) -> Report:
    """Return the numbers. A meeting with unknown details is omitted from the charts that need them."""
    statuses = Counter(meeting.status for meeting in meetings)
    top_types = [name for name, _ in Counter(map(_type_name, meetings)).most_common(MAX_TYPES)]
    weeks, bookings = _bookings(meetings, top_types, zone)
    booked = [meeting for meeting in meetings if meeting.status == "booked"]
    return Report(
        generated_at=now,
        zone=str(zone),
        booked=statuses["booked"],
        canceled=statuses["canceled"],
        disappeared=statuses["disappeared"],
        upcoming=sum(meeting.start is not None and meeting.start > now for meeting in booked),
        weeks=weeks,
        bookings=bookings,
        canceled_by_type=_canceled_by_type(meetings, top_types),
        days_ahead=_days_ahead(meetings, zone),
        hours=_hours(booked, zone),
        hosts=_top_people((meeting.host for meeting in booked), named=guests),
        guests=_top_people((_guest(meeting) for meeting in booked), named=True) if guests else None,
        accounts=accounts,
        pending=pending,
        parked=parked,
        oldest_pending=oldest_pending,
    )


def _type_name(meeting: MeetingRow) -> str:
    return meeting.type_name or "no type"


def _bookings(
    meetings: Iterable[MeetingRow], top_types: Sequence[str], zone: ZoneInfo
) -> tuple[list[date], dict[str, list[int]]]:
    counts: Counter[tuple[str, date]] = Counter()
    for meeting in meetings:
        if meeting.created is not None:
            day = meeting.created.astimezone(zone).date()
            name = _type_name(meeting) if _type_name(meeting) in top_types else "other types"
            counts[name, day - timedelta(days=day.weekday())] += 1
    if not counts:
        return [], {}
    last = max(week for _, week in counts)
    first = max(min(week for _, week in counts), last - timedelta(weeks=MAX_WEEKS - 1))
    weeks = [first + timedelta(weeks=number) for number in range((last - first).days // 7 + 1)]
    bookings = {name: [counts[name, week] for week in weeks] for name in [*top_types, "other types"]}
    return weeks, {name: numbers for name, numbers in bookings.items() if any(numbers)}


def _canceled_by_type(meetings: Iterable[MeetingRow], top_types: Sequence[str]) -> dict[str, tuple[int, int]]:
    all_of, canceled_of = Counter[str](), Counter[str]()
    for meeting in meetings:
        name = _type_name(meeting) if _type_name(meeting) in top_types else "other types"
        all_of[name] += 1
        canceled_of[name] += meeting.status != "booked"
    return {name: (canceled_of[name], number) for name, number in all_of.most_common()}


def _days_ahead(meetings: Iterable[MeetingRow], zone: ZoneInfo) -> list[tuple[str, int]]:
    counts = Counter[str]()
    for meeting in meetings:
        if meeting.created is not None and meeting.start is not None:
            booked, starts = (time.astimezone(zone).date() for time in (meeting.created, meeting.start))
            days = (starts - booked).days
            counts[next((label for label, limit in DAYS_AHEAD if days <= limit), "31+")] += 1
    return [(label, counts[label]) for label in (*(label for label, _ in DAYS_AHEAD), "31+")]


def _hours(meetings: Iterable[MeetingRow], zone: ZoneInfo) -> list[list[int]]:
    hours = [[0] * 24 for _ in range(7)]
    for meeting in meetings:
        if meeting.start is not None:
            local = meeting.start.astimezone(zone)
            hours[local.weekday()][local.hour] += 1
    return hours


def _guest(meeting: MeetingRow) -> str | None:
    named = meeting.guest_name and meeting.guest and f"{meeting.guest_name} <{meeting.guest}>"
    return named or meeting.guest or meeting.guest_name


def _top_people(people: Iterable[str | None], *, named: bool) -> list[tuple[str, int]]:
    counts = Counter(person for person in people if person).most_common(_MAX_PEOPLE)
    return counts if named else [(f"Host {number}", count) for number, (_, count) in enumerate(counts, 1)]


def _print_summary(report: Report) -> None:
    emit(f"Meetings as of {short_time(report.generated_at)} UTC\n\n")
    busiest = max(
        ((count, day, hour) for day, row in enumerate(report.hours) for hour, count in enumerate(row)),
        default=(0, 0, 0),
    )
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    lines: list[tuple[str, str | None]] = [
        ("Booked", f"{report.booked}, {report.upcoming} of them upcoming"),
        ("Canceled or disappeared", f"{report.canceled + report.disappeared} ({report.canceled_share:.0%})"),
        ("Busiest hour", f"{days[busiest[1]]} {busiest[2]:02}:00 ({report.zone})" if busiest[0] else None),
        ("Undelivered changes", f"{report.pending} pending, {report.parked} parked"),
    ]
    print_fields(lines)
    _print_counts("Meeting types", [(name, total) for name, (_, total) in report.canceled_by_type.items()])
    _print_counts("Days booked in advance", report.days_ahead)
    _print_counts("Hosts", report.hosts)
    _print_counts("Guests", report.guests or [])
    emit("\nAccounts\n")
    for account in report.accounts:
        age = describe_age(account, report.generated_at)
        emit(f"  {account.user_id}  {account.meetings} meetings, {age}\n")


def _print_counts(title: str, counts: Sequence[tuple[str, int]]) -> None:
    if not any(count for _, count in counts):
        return
    emit(f"\n{title}\n")
    width = max(len(name) for name, _ in counts)
    maximum = max(count for _, count in counts)
    for name, count in counts:
        bar = "#" * round(30 * count / maximum)
        emit(f"  {name.ljust(width)}  {count:>6}  {bar}".rstrip() + "\n")
