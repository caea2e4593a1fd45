"""``lemcal types``: what can be booked."""

from lemcal_async.cli.listing import AsCsv, AsJson, Listing, chosen_form, print_rows
from lemcal_async.cli.output import Column
from lemcal_async.cli.session import AccountName, AccountsFile, BaseUrl, Service, UseSandbox, all_rows, call
from lemcal_async.models import MeetingType


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
        LISTING,
        form,
    )


def _minutes(meeting_type: MeetingType) -> str | None:
    return None if meeting_type.duration is None else f"{meeting_type.duration:g}"


LISTING = Listing[MeetingType](
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
