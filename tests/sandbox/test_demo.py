"""The made-up data: deterministic, and as varied as real lists."""

import re
from datetime import datetime
from typing import Any

import pytest

from lemcal_async.sandbox import Sandbox

MEETING_FIELDS = {
    "_id", "userId", "meetingTypeId", "meetingTypeName", "providedInfos", "eventId", "start", "end",
    "attendees", "createdAt", "lead", "leadId", "timezone", "attendeeTimezone", "questions", "surveyAnswers",
    "canceledAt",
}  # fmt: skip
TYPE_FIELDS = {
    "_id", "userId", "name", "description", "meetingLink", "type", "color", "duration", "status", "privacy",
    "meetingLocations", "questions", "roundRobin",
}  # fmt: skip
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def seeded_data(sandbox: Sandbox) -> list[Any]:
    """Return all data that the seed determines, by account."""
    return [
        (account, account.api_key, sandbox.meetings(index), sandbox.meeting_types(index))
        for index, account in enumerate(sandbox.accounts)
    ]


def test_same_seed_gives_the_same_data() -> None:
    """The same seed gives the same data down to the ids; another seed gives other data."""
    assert seeded_data(Sandbox(accounts=2, seed=3)) == seeded_data(Sandbox(accounts=2, seed=3))
    assert seeded_data(Sandbox(seed=3)) == seeded_data(Sandbox(accounts=2, seed=3))[:1]
    assert seeded_data(Sandbox(meetings=5))[0][2] == seeded_data(Sandbox(meetings=9))[0][2][:5]
    assert seeded_data(Sandbox(seed=3)) != seeded_data(Sandbox(seed=4))


@pytest.fixture
def meetings() -> list[dict[str, Any]]:
    """Return enough meetings to include every variant."""
    return Sandbox(meetings=60).meetings()


def test_ids_have_their_prefix_and_17_characters(meetings: list[dict[str, Any]]) -> None:
    """Ids have the documented format, and are unique."""
    sandbox = Sandbox(accounts=2)
    assert re.fullmatch(r"usr_[2-9A-Za-z]{17}", sandbox.user_id)
    assert all(re.fullmatch(r"mee_[2-9A-Za-z]{17}", row["_id"]) for row in meetings)
    assert all(re.fullmatch(r"met_[2-9A-Za-z]{17}", row["_id"]) for row in sandbox.meeting_types())
    assert 60 == len({row["_id"] for row in meetings})
    assert sandbox.accounts[0].api_key != sandbox.accounts[1].api_key


def test_meetings_have_only_known_fields(meetings: list[dict[str, Any]]) -> None:
    """Together, the meetings have exactly the documented and observed fields."""
    assert MEETING_FIELDS == {name for row in meetings for name in row}


def test_meetings_cover_every_variant(meetings: list[dict[str, Any]]) -> None:
    """There are meetings with and without a lead, answers, a cancellation, and a third attendee."""
    assert {True, False} == {"lead" in row for row in meetings}
    assert {True, False} == {"canceledAt" in row for row in meetings}
    assert {True, False} == {"questions" in row or "surveyAnswers" in row for row in meetings}
    assert {2, 3} == {len(row["attendees"]) for row in meetings}
    assert 4 == len({row["meetingTypeId"] for row in meetings})
    assert 3 < len({row.get("timezone") or row["attendeeTimezone"] for row in meetings})


def test_hosts_are_marked_and_listed_first(meetings: list[dict[str, Any]]) -> None:
    """The first attendee is the host; the guest of a public booking is the primary attendee."""
    for row in meetings:
        host, guest, *_ = row["attendees"]
        assert host["owner"]
        assert "owner" not in guest
        assert ("lead" not in row) == guest.get("primary", False)
        assert row["providedInfos"]["email"] == guest["email"]
        assert row.get("lead", guest)["email"] == guest["email"]


def test_all_addresses_are_at_example_domains(meetings: list[dict[str, Any]]) -> None:
    """No e-mail address in the demo data belongs to a real person."""
    emails = {entry["email"] for row in meetings for entry in row["attendees"]}
    assert all(re.fullmatch(r"[a-z0-9.]+@example\.(com|net|org)", email) for email in emails)
    assert {"com", "net", "org"} == {email.rpartition(".")[2] for email in emails}


def test_times_are_in_order(meetings: list[dict[str, Any]]) -> None:
    """Meetings are booked, then canceled, then start; their length is that of their meeting type."""
    minutes = {row["_id"]: row["duration"] for row in Sandbox().meeting_types()}
    for row in meetings:
        written = {name: row[name] for name in ("createdAt", "canceledAt", "start", "end") if name in row}
        assert all(TIME.fullmatch(value) for value in written.values())
        times = {name: datetime.fromisoformat(value) for name, value in written.items()}
        assert list(times.values()) == sorted(times.values())
        assert minutes[row["meetingTypeId"]] * 60 == (times["end"] - times["start"]).total_seconds()


def test_meeting_types() -> None:
    """One type is disabled, one is round-robin, and all have the documented fields."""
    types = Sandbox().meeting_types()
    assert all(TYPE_FIELDS == set(row) for row in types)
    assert 1 == [row["status"] for row in types].count("disabled")
    assert [2] == [len(row["roundRobin"]["users"]) for row in types if row["roundRobin"]["enabled"]]
    assert {"public", "private"} == {row["privacy"] for row in types}
