"""A list from the service in the form that was asked for: a table, JSON, or CSV."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Generic, Literal, TypeAlias, TypeVar

import attrs
import typer

from lemcal_async.cli.exits import ExitStatus, tell, tell_of_bad_rows
from lemcal_async.cli.output import Column, print_csv, print_json, print_table
from lemcal_async.cli.session import Rows
from lemcal_async.codec import to_wire
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Meeting, MeetingType

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
