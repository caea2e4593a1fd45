"""``lemcal me``, ``meetings``, ``types`` and ``hooks``: one command per endpoint of the service.

Results are printed as a table, JSON or CSV. A hook's URL usually contains a token, so it can be read from
standard input and is never printed in full.
"""

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import parse_qsl, urlsplit

import attrs
import typer

from lemcal_async._auth import Secret
from lemcal_async._checks import is_email
from lemcal_async._client import AsyncLemcal
from lemcal_async._codec import to_wire, write_minutes, write_time
from lemcal_async._resources import selection
from lemcal_async._urls import check_target_url, is_loopback, quote_id, without_secrets
from lemcal_async.cli._options import (
    AccountName,
    AccountsFile,
    AsJson,
    BaseUrl,
    Rows,
    Service,
    UseSandbox,
    all_rows,
    call,
)
from lemcal_async.cli._output import (
    Column,
    ExitStatus,
    emit,
    print_csv,
    print_fields,
    print_json,
    print_message,
    print_table,
    short_time,
    warn_of_bad_rows,
)
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Hook, Meeting, MeetingType, User

M = TypeVar("M", Meeting, MeetingType)

OutputFormat: TypeAlias = Literal["table", "json", "csv"]

AsCsv: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--csv",
        help="Print CSV. Text that starts with = + - @ gets a leading apostrophe, "
        "so that spreadsheets do not run it as a formula.",
    ),
]


@attrs.frozen
class Listing(Generic[M]):
    """How to print a list of models: the columns of the table, and the columns of the CSV by name.

    The table is sorted by ``key``; JSON and CSV keep the service's order.
    """

    noun: str
    columns: Sequence[Column[M]]
    csv: dict[str, Callable[[M], str | None]]
    key: Callable[[M], str]


def choose_format(*, json: bool, csv: bool) -> OutputFormat:
    """Return the output format that the options select."""
    if json and csv:
        raise ConfigurationError("--json and --csv are mutually exclusive; pass only one")
    return "json" if json else "csv" if csv else "table"


def print_rows(rows: Rows[M], listing: Listing[M], output_format: OutputFormat) -> None:
    """Print the readable rows, warn about unreadable ones, and exit with UNREADABLE_ROWS if there are any."""
    if output_format == "json":
        print_json(to_wire(rows.good))
    elif output_format == "csv":
        values = listing.csv.values()
        print_csv(list(listing.csv), [[value(row) for value in values] for row in rows.good])
    elif rows.good:
        print_table(listing.columns, sorted(rows.good, key=listing.key))
    else:
        print_message(f"no {listing.noun}")
    if rows.bad:
        warn_of_bad_rows(listing.noun, rows.bad)
        raise typer.Exit(ExitStatus.UNREADABLE_ROWS)


def me(
    *,
    json: AsJson = False,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """Show the account that the credentials belong to."""
    service = Service(base_url, sandbox, accounts, account)
    _print_user(call(service, "Fetching the account", AsyncLemcal.me), as_json=json)


def _print_user(user: User, *, as_json: bool) -> None:
    if as_json:
        print_json(to_wire(user))
        return
    # The page where guests book (observed); the pages of the meeting types are below it.
    page = user.public_identifier and f"https://app.lemcal.com/@{user.public_identifier}"
    created = short_time(user.created_at)
    fields = [("User id", user.id), ("E-mail", user.email), ("Booking page", page), ("Since (UTC)", created)]
    print_fields(fields)


def meetings(
    *,
    meeting_type: Annotated[
        str | None, typer.Option("--type", metavar="ID", help="Only meetings of this type (met_...).")
    ] = None,
    upcoming: Annotated[
        bool, typer.Option("--upcoming", help="Only meetings that have not started and are not canceled.")
    ] = False,
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="TIME", help="Only meetings that start at or after this time."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="TIME", help="Only meetings that start before this time."),
    ] = None,
    guest: Annotated[
        str | None, typer.Option("--guest", metavar="EMAIL", help="Only meetings with this guest.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N meetings by start.")
    ] = None,
    json: AsJson = False,
    csv: AsCsv = False,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """List the meetings, including canceled ones.

    TIME is a date or a time; without an offset it is UTC. The service itself filters by meeting type only.
    With --upcoming, --from, --to, --guest or --limit, every output format is sorted by start.
    """
    output_format = choose_format(json=json, csv=csv)
    start, end = parse_time("--from", from_), parse_time("--to", to)
    if upcoming:
        start = max(datetime.now(UTC), start or datetime.now(UTC))
    if guest is not None and not is_email(guest.strip()):
        raise ConfigurationError("--guest must be an e-mail address without a name, such as ada@example.org")
    select = selection(start, end, guest and guest.strip(), canceled=False if upcoming else None)
    service = Service(base_url, sandbox, accounts, account)
    _check_id("--type", meeting_type)
    rows = call(service, "Fetching meetings", lambda lemcal: all_rows(lemcal.meetings.list(meeting_type)))
    selected = select(rows.good)  # not in the call, which filters nothing if some rows are unreadable
    if limit is not None:
        selected = sorted(selected, key=MEETINGS.key)[:limit]
    print_rows(Rows(selected, rows.bad), MEETINGS, output_format)


def _check_id(name: str, value: str | None) -> None:
    """Raise ConfigurationError, which refers to the id as ``name``, if it is malformed."""
    if value is not None:
        quote_id(value, name)


def parse_time(option: str, text: str | None) -> datetime | None:
    """Return the time; without an offset it is UTC. ConfigurationError names the option."""
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text.strip())
        return time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):  # OverflowError: out of range in UTC
        pass
    raise ConfigurationError(
        f"{option} must be a date or a time, such as 2026-03-02 or 2026-03-02T09:00+01:00"
    )


def _wire_time(time: datetime | None) -> str | None:
    return None if time is None else write_time(time)


def _guest_email(meeting: Meeting) -> str | None:
    return None if meeting.guest is None else meeting.guest.email


def _guest_name(meeting: Meeting) -> str | None:
    return None if meeting.guest is None else meeting.guest.name


def _meeting_name(meeting: Meeting) -> str:
    name = meeting.meeting_type_name or meeting.meeting_type_id or ""
    return f"{name} (canceled)" if meeting.is_canceled else name


MEETINGS = Listing[Meeting](
    noun="meetings",
    columns=(
        Column("Start (UTC)", lambda meeting: short_time(meeting.start), no_wrap=True),
        Column("Guest", lambda meeting: _guest_name(meeting) or _guest_email(meeting)),
        Column("E-mail", _guest_email, no_wrap=True),
        Column("Meeting", _meeting_name, rank=1),
        Column("Id", lambda meeting: meeting.id, no_wrap=True, rank=2),
    ),
    csv={
        "id": lambda meeting: meeting.id,
        "start": lambda meeting: _wire_time(meeting.start),
        "end": lambda meeting: _wire_time(meeting.end),
        "meeting_type_id": lambda meeting: meeting.meeting_type_id,
        "meeting_type_name": lambda meeting: meeting.meeting_type_name,
        "guest_email": _guest_email,
        "guest_name": _guest_name,
        "host_email": lambda meeting: None if meeting.host is None else meeting.host.email,
        "timezone": lambda meeting: meeting.timezone,
        "status": lambda meeting: "canceled" if meeting.is_canceled else "booked",
        "canceled_at": lambda meeting: _wire_time(meeting.canceled_at),
        "created_at": lambda meeting: _wire_time(meeting.created_at),
    },
    key=lambda meeting: _wire_time(meeting.start) or "",
)


def types(
    *,
    json: AsJson = False,
    csv: AsCsv = False,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """List the meeting types, including disabled ones."""
    output_format = choose_format(json=json, csv=csv)
    service = Service(base_url, sandbox, accounts, account)
    rows = call(service, "Fetching meeting types", lambda lemcal: all_rows(lemcal.meeting_types.list()))
    print_rows(rows, MEETING_TYPES, output_format)


def _minutes(meeting_type: MeetingType) -> str | None:
    return None if meeting_type.duration is None else f"{write_minutes(meeting_type.duration):g}"


MEETING_TYPES = Listing[MeetingType](
    noun="meeting types",
    columns=(
        Column("Name", lambda meeting_type: meeting_type.name),
        Column("Minutes", _minutes),
        Column("Status", lambda meeting_type: meeting_type.status),
        Column("Privacy", lambda meeting_type: meeting_type.privacy),
        Column("Link", lambda meeting_type: meeting_type.meeting_link, rank=1),
        Column("Id", lambda meeting_type: meeting_type.id, no_wrap=True),
    ),
    csv={
        "id": lambda meeting_type: meeting_type.id,
        "name": lambda meeting_type: meeting_type.name,
        "minutes": _minutes,
        "status": lambda meeting_type: meeting_type.status,
        "privacy": lambda meeting_type: meeting_type.privacy,
        "type": lambda meeting_type: meeting_type.type,
        "meeting_link": lambda meeting_type: meeting_type.meeting_link,
        "description": lambda meeting_type: meeting_type.description,
    },
    key=lambda meeting_type: meeting_type.name or "",
)


hooks_app = typer.Typer(help="Create and delete webhooks, which post new bookings to a URL.")


@hooks_app.command()
def create(
    target_url: Annotated[
        str, typer.Argument(metavar="TARGET_URL", help="The URL to post to, or - for standard input.")
    ],
    *,
    meeting_type: Annotated[
        str | None, typer.Option("--type", metavar="ID", help="For this meeting type (met_...).")
    ] = None,
    any_type: Annotated[bool, typer.Option("--any", help="For any meeting type.")] = False,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Succeed if the hook already exists.")] = False,
    json: AsJson = False,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """Create a hook. Keep the id it prints: you need it to delete the hook, and hooks cannot be listed.

    If TARGET_URL contains a token, pass - and supply the URL on standard input: other users of this machine
    can see command-line arguments. The token is never printed, not even with --json.
    """
    if (meeting_type is None) == (not any_type):
        raise ConfigurationError("pass either --type ID or --any")
    _check_id("--type", meeting_type)
    service = Service(base_url, sandbox, accounts, account)
    target = read_target_url(target_url, "TARGET_URL")

    async def create_hook(lemcal: AsyncLemcal) -> Hook | None:
        return await lemcal.hooks.create(
            target.reveal(), meeting_type_id=meeting_type, any_meeting_type=any_type, exist_ok=exist_ok
        )

    _print_hook(call(service, "Creating the hook", create_hook), as_json=json)


@hooks_app.command()
def delete(
    hook_id: Annotated[
        str, typer.Argument(metavar="HOOK_ID", help="The id that 'create' printed (hoo_...).")
    ],
    *,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """Delete a hook."""
    _check_id("HOOK_ID", hook_id)
    service = Service(base_url, sandbox, accounts, account)

    async def delete_hook(lemcal: AsyncLemcal) -> str:
        await lemcal.hooks.delete(hook_id)
        return f"Deleted hook {hook_id}.\n"

    emit(call(service, "Deleting the hook", delete_hook))


def read_target_url(argument: str, name: str) -> Secret[str]:
    """Return the validated target URL, read from standard input if the argument is ``-``."""
    if argument == "-":
        return check_target_url(Secret(_read_line()), name)
    target = check_target_url(Secret(argument), name)
    is_local = is_loopback(urlsplit(target.reveal()).hostname or "")
    if not is_local and any(value for _, value in parse_qsl(urlsplit(target.reveal()).query)):
        print_message(
            "warning: other users of this machine can see command-line arguments; if the URL's query "
            "contains a token, pass - and supply the URL on standard input"
        )
    return target


def _read_line() -> str:
    if sys.stdin.isatty():
        print_message("enter the target URL:")
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError:
        return ""  # rejected later as an invalid URL


def _print_hook(hook: Hook | None, *, as_json: bool) -> None:
    """Print the hook, without the secrets in its target URL. None means that it already existed."""
    target = without_secrets((hook and hook.target_url) or "")
    if as_json:
        print_json(hook and to_wire(attrs.evolve(hook, target_url=target or None)))
    elif hook is None:
        emit("The hook already exists. Its id cannot be looked up.\n")
    else:
        print_fields(
            [
                ("Hook id", f"{hook.id}  (keep it: hooks cannot be listed)"),
                ("Target", target),
                ("Meetings", "of any type" if hook.any_meeting_type else hook.meeting_type_id),
                ("Created (UTC)", short_time(hook.created_at)),
            ]
        )
