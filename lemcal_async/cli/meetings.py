"""``lemcal meetings``: what is booked."""

from typing import Annotated

import typer

from lemcal_async.cli.listing import (
    AsCsv,
    AsJson,
    Listing,
    chosen_form,
    print_rows,
    short_time,
    wire_time,
)
from lemcal_async.cli.output import Column
from lemcal_async.cli.session import AccountName, AccountsFile, BaseUrl, Service, UseSandbox, all_rows, call
from lemcal_async.models import Lead, Meeting


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
    """List the booked meetings, cancelled ones included."""
    form = chosen_form(json=json, csv=csv)
    service = Service(base_url, sandbox, accounts, account)
    print_rows(
        call(service, "Fetching meetings", lambda lemcal: all_rows(lemcal.meetings.list(meeting_type))),
        LISTING,
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


LISTING = Listing[Meeting](
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
