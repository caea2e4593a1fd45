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


def terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Make standard output a terminal of that width."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")


def test_json_is_what_the_service_sent(lemcal: Run, sandbox: Sandbox) -> None:
    """``--json`` prints the meetings as they were on the wire, in their order."""
    done = lemcal("meetings", "--json", "--base-url", sandbox.base_url)
    assert (0, "") == (done.status, done.err)
    assert sandbox.meetings() == json.loads(done.out)


def test_meetings_of_one_type(lemcal: Run, sandbox: Sandbox) -> None:
    """``--type`` asks for the meetings of one type."""
    wanted = sandbox.meeting_types()[1]["_id"]
    done = lemcal("meetings", "--json", "--type", wanted, "--base-url", sandbox.base_url)
    expected = [entry["_id"] for entry in sandbox.meetings() if entry["meetingTypeId"] == wanted]
    assert expected == [entry["_id"] for entry in json.loads(done.out)]


def test_types_as_json(lemcal: Run, sandbox: Sandbox) -> None:
    """``types --json`` prints the meeting types as they were on the wire."""
    done = lemcal("types", "--json", "--base-url", sandbox.base_url)
    assert sandbox.meeting_types() == json.loads(done.out)


def test_table_into_a_pipe(lemcal: Run, sandbox: Sandbox) -> None:
    """In a pipe, a table has a line per meeting, sorted by start, never wrapped or padded."""
    done = lemcal("meetings", "--base-url", sandbox.base_url)
    header, *lines = done.out.splitlines()
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
def test_table_on_a_terminal(
    lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, columns: int, headings: list[str]
) -> None:
    """A table keeps to the width of its terminal: a narrow one drops the id first, and never the guest."""
    terminal(monkeypatch, columns)
    sandbox.book(meetingTypeName="A very long name of a meeting type, " * 3, guest="Ada <ada@example.org>")
    out = STYLE.sub("", lemcal("meetings", "--base-url", sandbox.base_url).out)
    assert columns >= max(len(line.rstrip()) for line in out.splitlines())
    assert "\u2026" not in out  # wrapped rather than cut
    if columns == 30:
        return
    assert headings == re.split(r" {2,}", out.splitlines()[0].strip())
    assert "ada@example.org" in out


def test_types_on_a_terminal(lemcal: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's meeting types need a line each at 80 columns."""
    terminal(monkeypatch, 80)
    out = STYLE.sub("", lemcal("types", "--sandbox").out)
    assert 1 + 4 == len(out.splitlines())
    assert "Product demo      45       enabled   public" in out


def test_csv(lemcal: Run, sandbox: Sandbox) -> None:
    """``--csv`` prints RFC 4180 with the documented header."""
    done = lemcal("meetings", "--csv", "--base-url", sandbox.base_url)
    assert f"{CSV_HEADER}\r\n" == done.out[: len(CSV_HEADER) + 2]
    assert 12 + 1 == done.out.count("\r\n")
    rows = list(csv.DictReader(io.StringIO(done.out, newline="")))
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
    """``types --csv`` quotes fields that need it, and leaves unknown ones empty."""
    sandbox.inject(faults.json([{"_id": "met_a", "name": 'Say "hi", now'}, {"_id": "met_b", "duration": 30}]))
    done = lemcal("types", "--csv", "--base-url", sandbox.base_url)
    assert [
        "id,name,minutes,status,privacy,type,meeting_link,description",
        'met_a,"Say ""hi"", now",,,,,,',
        "met_b,,30,,,,,",
        "",
    ] == done.out.split("\r\n")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", "\n="])
def test_a_guest_cannot_write_formulas(lemcal: Run, sandbox: Sandbox, start: str) -> None:
    """A field that a spreadsheet would run as a formula gets a leading apostrophe in CSV."""
    name = f"{start}HYPERLINK(0)"
    sandbox.inject(faults.json([{"_id": "mee_a", "attendees": [{"primary": True, "name": name}]}]))
    done = lemcal("meetings", "--csv", "--base-url", sandbox.base_url)
    row = next(csv.DictReader(io.StringIO(done.out, newline="")))
    assert f"'{name}" == row["guest_name"]


def test_a_guest_cannot_write_to_the_terminal(
    lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control characters, line breaks and markup in a name do nothing to a table."""
    terminal(monkeypatch, 130)
    name = "[red]\x1b[2Jfirst\nsecond\u202e"
    sandbox.inject(faults.json([{"_id": "mee_a", "attendees": [{"primary": True, "name": name}]}]))
    out = lemcal("meetings", "--base-url", sandbox.base_url).out
    assert "[red]\ufffd[2Jfirst second\ufffd" in out


def test_text_that_no_encoding_has(lemcal: Run, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone surrogate from the service breaks neither the JSON nor the CSV."""
    broken = [{"_id": "mee_a", "meetingTypeName": "half \ud83d"}]
    body = json.dumps(broken)
    for form, expected in (("--json", "half \\ud83d"), ("--csv", "half \\ud83d")):
        sandbox.inject(faults.status(200, body, content_type="application/json"))
        done = lemcal("meetings", form, "--base-url", sandbox.base_url)
        assert (0, True) == (done.status, expected in done.out)


def test_a_meeting_of_which_little_is_known(lemcal: Run, sandbox: Sandbox) -> None:
    """Everything but the id may be missing; then the lead is the guest."""
    lead = {"email": "bo@example.org", "firstName": "Bo", "lastName": None}
    rows = [{"_id": "mee_b", "lead": lead, "meetingTypeId": "met_x"}, {"_id": "mee_a"}]
    sandbox.inject(faults.json(rows), times=2)
    table = lemcal("meetings", "--base-url", sandbox.base_url).out.splitlines()
    assert [["Bo", "bo@example.org", "met_x", "mee_b"], ["mee_a"]] == [line.split() for line in table[1:]]
    rows_of_csv = lemcal("meetings", "--csv", "--base-url", sandbox.base_url).out.split("\r\n")
    assert ["mee_b,,,met_x,,bo@example.org,Bo,,,booked,,", "mee_a,,,,,,,,,booked,,"] == rows_of_csv[1:3]


def days(sandbox: Sandbox) -> list[str]:
    """Give the sandbox five meetings, two of them with Ada, and return their ids by start."""
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
def test_some_of_the_meetings(lemcal: Run, sandbox: Sandbox, options: list[str], chosen: list[int]) -> None:
    """They are selected by time, guest and number, and sorted by start in every form."""
    ids = days(sandbox)
    done = lemcal("meetings", "--json", *options, "--base-url", sandbox.base_url)
    assert [ids[index] for index in chosen] == [row["_id"] for row in json.loads(done.out)]


@pytest.mark.parametrize("option", ["--from", "--to"])
@pytest.mark.parametrize("value", ["tomorrow", "", "2026-13-01"])
def test_a_time_that_is_none(lemcal: Run, option: str, value: str) -> None:
    """The error shows what a time looks like, and nothing is sent."""
    done = lemcal("meetings", "--sandbox", option, value)
    assert (2, "") == (done.status, done.out)
    assert f"lemcal: {option} must be a date or a time, such as 2026-03-02 or" in done.err


def test_nothing_booked(lemcal: Run, sandbox: Sandbox) -> None:
    """An empty list is a message for people, ``[]`` in JSON, and a header in CSV."""
    sandbox.inject(faults.json([]), times=3)
    base_url = sandbox.base_url
    assert ("", "lemcal: no meetings\n") == (
        (done := lemcal("meetings", "--base-url", base_url)).out,
        done.err,
    )
    assert "[]\n" == lemcal("meetings", "--json", "--base-url", base_url).out
    assert f"{CSV_HEADER}\r\n" == lemcal("meetings", "--csv", "--base-url", base_url).out


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_bad_rows_do_not_hide_the_others(lemcal: Run, sandbox: Sandbox, form: str) -> None:
    """The rows that can be read are printed; each of the others is a warning, and the status is 3."""
    sandbox.inject(faults.json([{"_id": 7}, {"_id": "mee_b", "start": 5}, {"name": "x"}]))
    done = lemcal("meetings", form, "--base-url", sandbox.base_url)
    assert 3 == done.status
    assert "mee_b" in done.out
    problems = [
        "row 0 of the meetings cannot be read: _id: expected a string, got int",
        "row 2 of the meetings cannot be read: _id: expected a non-empty string, got null",
    ]
    assert [f"lemcal: warning: {problem}" for problem in problems] == done.err.splitlines()


def test_me(lemcal: Run, sandbox: Sandbox) -> None:
    """``me`` shows the account of the credentials."""
    done = lemcal("me", "--base-url", sandbox.base_url)
    assert [
        f"User id       {sandbox.user_id}",
        "E-mail        host1@example.com",
        "Booking page  https://app.lemcal.com/@host1",
    ] == done.out.splitlines()[:3]


def test_me_as_json(lemcal: Run, sandbox: Sandbox) -> None:
    """``me --json`` prints the user as it was on the wire."""
    user = json.loads(lemcal("me", "--json", "--base-url", sandbox.base_url).out)
    assert {"_id": sandbox.user_id, "email": "host1@example.com", "publicIdentifier": "host1"} == {
        name: user[name] for name in ("_id", "email", "publicIdentifier")
    }


def test_me_with_little_known(lemcal: Run, sandbox: Sandbox) -> None:
    """Unknown facts are left out."""
    sandbox.inject(faults.json({"_id": "usr_a"}))
    assert "User id  usr_a\n" == lemcal("me", "--base-url", sandbox.base_url).out
