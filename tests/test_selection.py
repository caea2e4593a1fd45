"""Filtering meetings by start, guest and cancellation, and sorting them."""

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest

from lemcal_async._resources import selection, set_account_email
from lemcal_async.errors import ConfigurationError
from lemcal_async.models import Attendee, Lead, Meeting

NINE = datetime(2026, 1, 5, 9, tzinfo=UTC)
HOUR = timedelta(hours=1)
MEETINGS = [
    Meeting("late", start=NINE + 2 * HOUR, lead=Lead(email="ada@example.com")),
    Meeting("unknown", lead=Lead(email="Bo@example.com")),
    Meeting("early", start=NINE, lead=Lead(email="bo@example.com"), canceled_at=NINE),
    Meeting("middle", start=NINE + HOUR, attendees=(Attendee(email=" bo@EXAMPLE.com"),)),
]


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({}, ["late", "unknown", "early", "middle"]),
        ({"starts_after": NINE}, ["early", "middle", "late"]),
        ({"starts_after": NINE + HOUR}, ["middle", "late"]),
        ({"starts_before": NINE + HOUR}, ["early"]),
        ({"starts_after": NINE, "starts_before": NINE}, []),
        ({"starts_after": NINE, "starts_before": NINE + HOUR}, ["early"]),
        ({"starts_after": datetime(2026, 1, 5, 11, tzinfo=timezone(HOUR))}, ["middle", "late"]),
        ({"guest_email": "bo@example.com"}, ["early", "middle", "unknown"]),
        ({"guest_email": "bo@example.com", "starts_before": NINE + 2 * HOUR}, ["early", "middle"]),
        ({"guest_email": "nobody@example.com"}, []),
        ({"canceled": True}, ["early"]),
        ({"canceled": False}, ["middle", "late", "unknown"]),
    ],
)
def test_selection(filters: Any, ids: Any) -> None:
    """Filters combine, ranges include their start but not their end, and unknown starts come last."""
    filters = {"starts_after": None, "starts_before": None, "guest_email": None, "canceled": None} | filters
    before = list(MEETINGS)
    assert ids == [meeting.id for meeting in selection(**filters)(MEETINGS)]
    assert before == MEETINGS


@pytest.mark.parametrize(
    ("filters", "problem"),
    [
        ({"starts_after": datetime(2026, 1, 5)}, r"starts_after=datetime.*: it must have a time zone"),  # noqa: DTZ001
        ({"starts_before": date(2026, 1, 5)}, "starts_before= must be an aware datetime, .*, not date"),
        ({"starts_before": "2026-01-05"}, "starts_before= must be an aware datetime, .*, not str"),
        ({"guest_email": Lead(email="a")}, "guest_email= must be an e-mail address, not Lead"),
        ({"guest_email": ""}, "guest_email= must be an e-mail address, such as"),
        ({"guest_email": "nobody"}, "guest_email= must be an e-mail address, such as"),
        ({"guest_email": "Bo <bo@example.com>"}, "guest_email= must be an e-mail address, such as"),
        ({"guest_email": "bo@example.com,al@example.com"}, "guest_email= must be an e-mail address, such as"),
        ({"guest_email": "bo@"}, "guest_email= must be an e-mail address, such as"),
        ({"canceled": "no"}, "canceled= must be True, False or None, not str"),
    ],
)
def test_invalid_filters(filters: Any, problem: str) -> None:
    """The error says what to pass instead."""
    filters = {"starts_after": None, "starts_before": None, "guest_email": None, "canceled": None} | filters
    with pytest.raises(ConfigurationError, match=problem):
        selection(**filters)


def test_account_email() -> None:
    """The account's address is recorded only on its own meetings."""
    attendees = (Attendee(email="host@example.com"), Attendee(email="guest@example.com"))
    own, unknown, other = meetings = [
        Meeting("a", user_id="usr_1", attendees=attendees),
        Meeting("b", attendees=attendees),
        Meeting("c", user_id="usr_2", attendees=attendees),
    ]
    set_account_email(meetings, None)
    assert [attendees[0]] * 3 == [meeting.guest for meeting in meetings]
    set_account_email(meetings, ("usr_1", "HOST@example.com"))
    assert [attendees[1], attendees[1], attendees[0]] == [own.guest, unknown.guest, other.guest]
    assert [attendees[0], attendees[0], None] == [own.host, unknown.host, other.host]
