"""A list from the service in the form that was asked for: a table, JSON, or CSV.

MERGED [cli.me] ``lemcal me``: which account the credentials belong to.

MERGED [cli.meetings] ``lemcal meetings``: what is booked.

MERGED [cli.meeting_types] ``lemcal types``: what can be booked.

MERGED [cli.hooks] ``lemcal hooks``: have new bookings posted to a URL, and stop it.

The URL usually carries a token, so it can be read from standard input, and is never printed whole.
"""

import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import parse_qsl, urlsplit

import attrs
import typer

from lemcal_async._auth import Secret
from lemcal_async._client import AsyncLemcal
from lemcal_async._codec import to_wire
from lemcal_async._urls import check_target_url, without_secrets
from lemcal_async.cli._options import (
    AccountName,
    AccountsFile,
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
    print_facts,
    print_json,
    print_table,
    tell,
    tell_of_bad_rows,
)
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Hook, Lead, Meeting, MeetingType, User

M = TypeVar("M", Meeting, MeetingType)

Form: TypeAlias = Literal["table", "json", "csv"]

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, as the service writes it.")]
AsCsv: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--csv",
        help="Print CSV. Text that starts with = + - @ gets a leading apostrophe, "
        "or a spreadsheet would run it as a formula.",
    ),
]


@attrs.frozen
class Listing(Generic[M]):
    """How a kind of model is listed: the columns for people, and those for spreadsheets by their names.

    A table is in the order of ``key``; programs get the order of the service.
    """

    noun: str
    columns: Sequence[Column[M]]
    csv: dict[str, Callable[[M], str | None]]
    key: Callable[[M], str]


def chosen_form(*, json: bool, csv: bool) -> Form:
    """Return the form that the options ask for."""
    if json and csv:
        raise ConfigurationError("--json and --csv are two forms; choose one")
    return "json" if json else "csv" if csv else "table"


def print_rows(rows: Rows[M], listing: Listing[M], form: Form) -> None:
    """Print the rows that could be read; then say which could not, and end with a status of their own."""
    if form == "json":
        print_json(to_wire(rows.good))
    elif form == "csv":
        values = listing.csv.values()
        print_csv(list(listing.csv), [[value(row) for value in values] for row in rows.good])
    elif rows.good:
        print_table(listing.columns, sorted(rows.good, key=listing.key))
    else:
        tell(f"no {listing.noun}")
    if rows.bad:
        tell_of_bad_rows(listing.noun, rows.bad)
        raise typer.Exit(ExitStatus.UNREADABLE_ROWS)


def wire_time(time: datetime | None) -> str | None:
    """Return a time as the service writes it."""
    return None if time is None else time.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def short_time(time: datetime | None) -> str | None:
    """Return a time as people read it, in UTC."""
    return None if time is None else f"{time:%Y-%m-%d %H:%M}"


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
    _print(call(service, "Asking who you are", AsyncLemcal.me), as_json=json)


def _print(user: User, *, as_json: bool) -> None:
    if as_json:
        print_json(to_wire(user))
        return
    # Where guests book, as was observed; the pages of the meeting types are below it.
    page = user.public_identifier and f"https://app.lemcal.com/@{user.public_identifier}"
    created = short_time(user.created_at)
    facts = [("User id", user.id), ("E-mail", user.email), ("Booking page", page), ("Since (UTC)", created)]
    print_facts(facts)


def meetings(
    *,
    meeting_type: Annotated[
        str | None, typer.Option("--type", metavar="ID", help="Only those of this meeting type (met_...).")
    ] = None,
    json: AsJson = False,
    csv: AsCsv = False,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """List the booked meetings, canceled ones included."""
    form = chosen_form(json=json, csv=csv)
    service = Service(base_url, sandbox, accounts, account)
    print_rows(
        call(service, "Fetching meetings", lambda lemcal: all_rows(lemcal.meetings.list(meeting_type))),
        MEETINGS,
        form,
    )


def _guest_email(meeting: Meeting) -> str | None:
    return None if meeting.guest is None else meeting.guest.email


def _guest_name(meeting: Meeting) -> str | None:
    guest = meeting.guest
    if isinstance(guest, Lead):
        return " ".join(filter(None, (guest.first_name, guest.last_name)))
    return None if guest is None else guest.name


def _what(meeting: Meeting) -> str:
    name = meeting.meeting_type_name or meeting.meeting_type_id or ""
    return f"{name} (canceled)" if meeting.is_canceled else name


MEETINGS = Listing[Meeting](
    noun="meetings",
    columns=(
        Column("Start (UTC)", lambda meeting: short_time(meeting.start), whole=True),
        Column("Guest", lambda meeting: _guest_name(meeting) or _guest_email(meeting)),
        Column("E-mail", _guest_email, if_room=True),
        Column("Meeting", _what),
        Column("Id", lambda meeting: meeting.id, whole=True),
    ),
    csv={
        "id": lambda meeting: meeting.id,
        "start": lambda meeting: wire_time(meeting.start),
        "end": lambda meeting: wire_time(meeting.end),
        "meeting_type_id": lambda meeting: meeting.meeting_type_id,
        "meeting_type_name": lambda meeting: meeting.meeting_type_name,
        "guest_email": _guest_email,
        "guest_name": _guest_name,
        "host_email": lambda meeting: None if meeting.host is None else meeting.host.email,
        "timezone": lambda meeting: meeting.timezone,
        "status": lambda meeting: "canceled" if meeting.is_canceled else "booked",
        "canceled_at": lambda meeting: wire_time(meeting.canceled_at),
        "created_at": lambda meeting: wire_time(meeting.created_at),
    },
    key=lambda meeting: wire_time(meeting.start) or "",
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
    """List the meeting types, disabled ones included."""
    form = chosen_form(json=json, csv=csv)
    service = Service(base_url, sandbox, accounts, account)
    print_rows(
        call(service, "Fetching meeting types", lambda lemcal: all_rows(lemcal.meeting_types.list())),
        MEETING_TYPES,
        form,
    )


def _minutes(meeting_type: MeetingType) -> str | None:
    return None if meeting_type.duration is None else f"{meeting_type.duration:g}"


MEETING_TYPES = Listing[MeetingType](
    noun="meeting types",
    columns=(
        Column("Name", lambda meeting_type: meeting_type.name),
        Column("Minutes", _minutes),
        Column("Status", lambda meeting_type: meeting_type.status),
        Column("Privacy", lambda meeting_type: meeting_type.privacy),
        Column("Link", lambda meeting_type: meeting_type.meeting_link, if_room=True),
        Column("Id", lambda meeting_type: meeting_type.id, whole=True),
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


hooks_app = typer.Typer(help="Have new bookings posted to a URL, and stop it.")


@hooks_app.command()
def create(
    target_url: Annotated[
        str, typer.Argument(metavar="TARGET_URL", help="Where new bookings are posted to, or -.")
    ],
    *,
    meeting_type: Annotated[
        str | None, typer.Option("--type", metavar="ID", help="For this meeting type (met_...).")
    ] = None,
    any_type: Annotated[bool, typer.Option("--any", help="For any meeting type.")] = False,
    exist_ok: Annotated[
        bool, typer.Option("--exist-ok", help="Do not fail if the target has such a hook already.")
    ] = False,
    json: AsJson = False,
    base_url: BaseUrl = None,
    sandbox: UseSandbox = False,
    accounts: AccountsFile = None,
    account: AccountName = None,
) -> None:
    """Create a hook. Keep the id that is printed: hooks cannot be listed, and only the id deletes one.

    With - as TARGET_URL, the URL is read from standard input. Do that if it carries a token: other users
    of this machine can see arguments. What is printed leaves the token out, with --json too.
    """
    if (meeting_type is None) == (not any_type):
        raise ConfigurationError("choose the meetings: either --type ID or --any")
    service = Service(base_url, sandbox, accounts, account)
    target = _target(target_url)

    async def created(lemcal: AsyncLemcal) -> Hook | None:
        return await lemcal.hooks.create(
            target.reveal(), meeting_type_id=meeting_type, any_meeting_type=any_type, exist_ok=exist_ok
        )

    _print_hook(call(service, "Creating the hook", created), as_json=json)


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
    service = Service(base_url, sandbox, accounts, account)

    async def deleted(lemcal: AsyncLemcal) -> str:
        await lemcal.hooks.delete(hook_id)
        return f"Hook {hook_id} is deleted.\n"

    emit(call(service, "Deleting the hook", deleted))


def _target(argument: str) -> Secret[str]:
    """Return the checked target, from standard input if the argument says so."""
    if argument == "-":
        return check_target_url(Secret(_line_of_input()))
    target = check_target_url(Secret(argument))
    if any(value for _, value in parse_qsl(urlsplit(target.reveal()).query)):
        tell(
            "warning: the URL has a query, and other users of this machine can see arguments; "
            "if that is a token, give - and the URL on standard input"
        )
    return target


def _line_of_input() -> str:
    if sys.stdin.isatty():
        tell("the target URL, then Enter:")
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError:
        return ""  # refused as no URL


def _print_hook(hook: Hook | None, *, as_json: bool) -> None:
    """Print the hook, None if there was one already, without what may be secret in its target."""
    target = without_secrets((hook and hook.target_url) or "")
    if as_json:
        print_json(hook and to_wire(attrs.evolve(hook, target_url=target or None)))
    elif hook is None:
        emit("There is such a hook already. Its id cannot be looked up.\n")
    else:
        print_facts(
            [
                ("Hook id", f"{hook.id}  (keep it: it cannot be listed)"),
                ("Target", target),
                ("Meetings", "of any type" if hook.any_meeting_type else hook.meeting_type_id),
                ("Created (UTC)", short_time(hook.created_at)),
            ]
        )
