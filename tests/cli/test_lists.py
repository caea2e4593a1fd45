"""``lemcal meetings``, ``lemcal types`` and ``lemcal me``: tables, JSON and CSV."""

import csv
import io
import json
import re
import sys

import pytest

from lemcal_async.sandbox import Sandbox, faults

from .conftest import Run

CSV_HEADER = (
    "id,start,end,meeting_type_id,meeting_type_name,guest_email,guest_name,host_email,timezone,status,"
    "canceled_at,created_at"
)

STYLE = re.compile(r"\x1b\[[0-9;]*m")


def set_terminal_width(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Pretend that standard output is a terminal of that width."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")


def test_json_matches_the_response(lemcal: Run, sandbox: Sandbox) -> None:
    """``--json`` prints the meetings exactly as the service sent them, in the same order."""
    result = lemcal("meetings", "--json", "--base-url", sandbox.base_url)
    assert (0, "") == (result.status, result.err)
    assert sandbox.meetings() == json.loads(result.out)


def test_meetings_of_one_type(lemcal: Run, sandbox: Sandbox) -> None:
    """``--type`` selects the meetings of one type."""
    wanted = sandbox.meeting_types()[1]["_id"]
    result = lemcal("meetings", "--json", "--type", wanted, "--base-url", sandbox.base_url)
    expected = [entry["_id"] for entry in sandbox.meetings() if entry["meetingTypeId"] == wanted]
    assert expected == [entry["_id"] for entry in json.loads(result.out)]


def test_types_as_json(lemcal: Run, sandbox: Sandbox) -> None:
    """``types --json`` prints the meeting types exactly as the service sent them."""
    result = lemcal("types", "--json", "--base-url", sandbox.base_url)
    assert sandbox.meeting_types() == json.loads(result.out)


def test_table_in_pipe(lemcal: Run, sandbox: Sandbox) -> None:
    """In a pipe, the table has one unwrapped, unpadded line per meeting, sorted by start."""
    result = lemcal("meetings", "--base-url", sandbox.base_url)
    header, *lines = result.out.splitlines()
    assert ["Start (UTC)", "Guest", "E-mail", "Meeting", "Id"] == [
        word.strip() for word in header.split("  ") if word
    ]
    expected = [entry["_id"] for entry in sorted(sandbox.meetings(), key=lambda entry: entry["start"])]
    assert expected == [line.split()[-1] for line in lines]
    assert [] == [line for line in lines if line != line.rstrip()]
    assert 2 == sum("(canceled)" in line for line in lines)


@pytest.mark.parametrize(
    ("columns", "headings"),
    [
        (30, ["Start (UTC)", "Guest", "E-mail"]),
        (62, ["Start (UTC)", "Guest", "E-mail"]),
        (80, ["Start (UTC)", "Guest", "E-mail", "Meeting"]),
        (140, ["Start (UTC)", "Guest", "E-mail", "Meeting", "Id"]),
    ],
)
def test_table_on_terminal(
    lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, columns: int, headings: list[str]
) -> None:
    """The table fits the terminal's width: a narrow one drops the id first, and never the guest."""
    set_terminal_width(monkeypatch, columns)
    sandbox.book(meetingTypeName="A very long name of a meeting type, " * 3, guest="Ada <ada@example.org>")
    out = STYLE.sub("", lemcal("meetings", "--base-url", sandbox.base_url).out)
    assert columns >= max(len(line.rstrip()) for line in out.splitlines())
    assert "\u2026" not in out  # wrapped rather than cut
    if columns == 30:
        return
    assert headings == re.split(r" {2,}", out.splitlines()[0].strip())
    assert "ada@example.org" in out


def test_types_on_terminal(lemcal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each demo meeting type fits on one line at 80 columns."""
    set_terminal_width(monkeypatch, 80)
    out = STYLE.sub("", lemcal("types", "--sandbox").out)
    assert 1 + 4 == len(out.splitlines())
    assert "Product demo      45       enabled   public" in out


def test_csv(lemcal: Run, sandbox: Sandbox) -> None:
    """``--csv`` prints RFC 4180 with the documented header."""
    result = lemcal("meetings", "--csv", "--base-url", sandbox.base_url)
    assert f"{CSV_HEADER}\r\n" == result.out[: len(CSV_HEADER) + 2]
    assert 12 + 1 == result.out.count("\r\n")
    rows = list(csv.DictReader(io.StringIO(result.out, newline="")))
    meeting = sandbox.meetings()[5]
    guest = meeting["attendees"][1]
    assert {
        "id": meeting["_id"],
        "start": meeting["start"],
        "end": meeting["end"],
        "meeting_type_id": meeting["meetingTypeId"],
        "meeting_type_name": meeting["meetingTypeName"],
        "guest_email": guest["email"],
        "guest_name": guest["name"],
        "host_email": "host1@example.com",
        "timezone": meeting.get("timezone") or meeting.get("attendeeTimezone"),
        "status": "canceled",
        "canceled_at": meeting["canceledAt"],
        "created_at": meeting["createdAt"],
    } == rows[5]
    assert ("booked", "") == (rows[0]["status"], rows[0]["canceled_at"])


def test_types_as_csv(lemcal: Run, sandbox: Sandbox) -> None:
    """``types --csv`` quotes fields where necessary, and leaves missing ones empty."""
    sandbox.inject(faults.json([{"_id": "met_a", "name": 'Say "hi", now'}, {"_id": "met_b", "duration": 30}]))
    result = lemcal("types", "--csv", "--base-url", sandbox.base_url)
    assert [
        "id,name,minutes,status,privacy,type,meeting_link,description",
        'met_a,"Say ""hi"", now",,,,,,',
        "met_b,,30,,,,,",
        "",
    ] == result.out.split("\r\n")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", "\n="])
def test_guest_names_cannot_be_formulas(lemcal: Run, sandbox: Sandbox, start: str) -> None:
    """In CSV, a field that a spreadsheet would run as a formula gets a leading apostrophe."""
    name = f"{start}HYPERLINK(0)"
    sandbox.inject(faults.json([{"_id": "mee_a", "attendees": [{"primary": True, "name": name}]}]))
    result = lemcal("meetings", "--csv", "--base-url", sandbox.base_url)
    row = next(csv.DictReader(io.StringIO(result.out, newline="")))
    assert f"'{name}" == row["guest_name"]


def test_guest_names_cannot_control_the_terminal(
    lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control characters, line breaks and markup in a name do not affect the table."""
    set_terminal_width(monkeypatch, 130)
    name = "[red]\x1b[2Jfirst\nsecond\u202e"
    sandbox.inject(faults.json([{"_id": "mee_a", "attendees": [{"primary": True, "name": name}]}]))
    out = lemcal("meetings", "--base-url", sandbox.base_url).out
    assert "[red]\ufffd[2Jfirst second\ufffd" in out


def test_lone_surrogates(lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone surrogate from the service breaks neither the JSON nor the CSV."""
    broken = [{"_id": "mee_a", "meetingTypeName": "half \ud83d"}]
    body = json.dumps(broken)
    for form, expected in (("--json", "half \\ud83d"), ("--csv", "half \\ud83d")):
        sandbox.inject(faults.status(200, body, content_type="application/json"))
        result = lemcal("meetings", form, "--base-url", sandbox.base_url)
        assert (0, True) == (result.status, expected in result.out)


def test_meeting_with_missing_fields(lemcal: Run, sandbox: Sandbox) -> None:
    """Every field but the id may be missing. Without attendees, the lead is the guest."""
    lead = {"email": "bo@example.org", "firstName": "Bo", "lastName": None}
    rows = [{"_id": "mee_b", "lead": lead, "meetingTypeId": "met_x"}, {"_id": "mee_a"}]
    sandbox.inject(faults.json(rows), times=2)
    table = lemcal("meetings", "--base-url", sandbox.base_url).out.splitlines()
    assert [["Bo", "bo@example.org", "met_x", "mee_b"], ["mee_a"]] == [line.split() for line in table[1:]]
    rows_of_csv = lemcal("meetings", "--csv", "--base-url", sandbox.base_url).out.split("\r\n")
    assert ["mee_b,,,met_x,,bo@example.org,Bo,,,booked,,", "mee_a,,,,,,,,,booked,,"] == rows_of_csv[1:3]


def book_four_meetings(sandbox: Sandbox) -> list[str]:
    """Give the sandbox four meetings, three of them with Ada, and return their ids by start."""
    starts = ["2026-03-02T09:00:00Z", "2026-03-03T09:00:00Z", "2126-03-02T09:00:00Z"]
    early, middle, late = (sandbox.book(start=start, guest="Ada <Ada@Example.org>") for start in starts)
    canceled = sandbox.cancel(sandbox.book(start="2126-03-01T09:00:00Z"))
    for row in sandbox.meetings():
        if row["start"] < "2026-03":
            sandbox.remove(row)
    return [row["_id"] for row in (early, middle, canceled, late)]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (["--upcoming"], [3]),
        (["--from", "2026-03-03"], [1, 2, 3]),
        (["--from", "2026-03-02T10:00+01:00", "--to", "2026-03-03"], [0]),
        (["--from", "2026-03-02T09:00:00.001Z", "--to", "2026-03-03T09:00:00.001"], [1]),
        (["--guest", " ada@example.ORG "], [0, 1, 3]),
        (["--limit", "2"], [0, 1]),
        (["--guest", "ada@example.org", "--from", "2026-03-03", "--limit", "1"], [1]),
        (["--guest", "nobody@example.org"], []),
    ],
)
def test_meeting_filters(lemcal: Run, sandbox: Sandbox, options: list[str], chosen: list[int]) -> None:
    """Meetings are filtered by time, guest and number, and sorted by start."""
    ids = book_four_meetings(sandbox)
    result = lemcal("meetings", "--json", *options, "--base-url", sandbox.base_url)
    assert [ids[index] for index in chosen] == [row["_id"] for row in json.loads(result.out)]


@pytest.mark.parametrize("option", ["--from", "--to"])
@pytest.mark.parametrize("value", ["tomorrow", "", "2026-13-01"])
def test_invalid_time(lemcal: Run, option: str, value: str) -> None:
    """The error shows the expected format."""
    result = lemcal("meetings", "--sandbox", option, value)
    assert (2, "") == (result.status, result.out)
    assert f"lemcal: {option} must be a date or a time, such as 2026-03-02 or" in result.err


def test_empty_list(lemcal: Run, sandbox: Sandbox) -> None:
    """An empty list is a message, ``[]`` in JSON, or only the header in CSV."""
    sandbox.inject(faults.json([]), times=3)
    base_url = sandbox.base_url
    assert ("", "lemcal: no meetings\n") == (
        (result := lemcal("meetings", "--base-url", base_url)).out,
        result.err,
    )
    assert "[]\n" == lemcal("meetings", "--json", "--base-url", base_url).out
    assert f"{CSV_HEADER}\r\n" == lemcal("meetings", "--csv", "--base-url", base_url).out


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_unreadable_rows(lemcal: Run, sandbox: Sandbox, form: str) -> None:
    """Readable rows are printed, each unreadable row is a warning, and the status is 3."""
    sandbox.inject(faults.json([{"_id": 7}, {"_id": "mee_b", "start": 5}, {"name": "x"}]))
    result = lemcal("meetings", form, "--base-url", sandbox.base_url)
    assert 3 == result.status
    assert "mee_b" in result.out
    problems = [
        "row 0 of the meetings cannot be read: _id: expected a string, got int",
        "row 2 of the meetings cannot be read: _id: expected a non-empty string, got null",
    ]
    assert [f"lemcal: warning: {problem}" for problem in problems] == result.err.splitlines()


def test_me(lemcal: Run, sandbox: Sandbox) -> None:
    """``me`` shows the account that the credentials belong to."""
    result = lemcal("me", "--base-url", sandbox.base_url)
    assert [
        f"User id       {sandbox.user_id}",
        "E-mail        host1@example.com",
        "Booking page  https://app.lemcal.com/@host1",
    ] == result.out.splitlines()[:3]


def test_me_as_json(lemcal: Run, sandbox: Sandbox) -> None:
    """``me --json`` prints the user as the service sent it."""
    user = json.loads(lemcal("me", "--json", "--base-url", sandbox.base_url).out)
    assert {"_id": sandbox.user_id, "email": "host1@example.com", "publicIdentifier": "host1"} == {
        name: user[name] for name in ("_id", "email", "publicIdentifier")
    }


def test_me_with_missing_fields(lemcal: Run, sandbox: Sandbox) -> None:
    """Missing fields are omitted."""
    sandbox.inject(faults.json({"_id": "usr_a"}))
    assert "User id  usr_a\n" == lemcal("me", "--base-url", sandbox.base_url).out
