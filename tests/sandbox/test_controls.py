"""The controls as plain calls, without a server, from any thread."""

import re
import sys
import threading
import types
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

import pytest

from lemcal_async import Meeting, from_wire
from lemcal_async.sandbox import Sandbox
from lemcal_async.sandbox._log import Journal, RequestLog, SeenRequest


@pytest.fixture
def idle() -> Sandbox:
    """Return a sandbox that is not served."""
    return Sandbox(accounts=2)


def test_book(idle: Sandbox) -> None:
    """By default, a public meeting of the first type is added at the end of the list."""
    meeting = idle.book()
    assert meeting == idle.meetings()[-1]
    assert (13, 12) == (len(idle.meetings(0)), len(idle.meetings(1)))
    assert idle.meeting_types()[0]["_id"] == meeting["meetingTypeId"]
    assert "lead" not in meeting
    assert [True] == [entry["primary"] for entry in meeting["attendees"] if "primary" in entry]
    assert meeting["createdAt"] < meeting["start"] < meeting["end"]


def test_book_as_asked(idle: Sandbox) -> None:
    """Account, type, lead and any wire field can be given."""
    wanted = idle.meeting_types(1)[2]
    meeting = idle.book(
        1, meeting_type_id=wanted["_id"], public=False, _id="mee_mine", timezone=None, extra=[1]
    )
    assert (wanted["_id"], wanted["name"]) == (meeting["meetingTypeId"], meeting["meetingTypeName"])
    assert idle.accounts[1].user_id == meeting["userId"]
    assert ("mee_mine", None, [1]) == (meeting["_id"], meeting["timezone"], meeting["extra"])
    assert {"email", "firstName", "lastName"} == set(meeting["lead"])


def test_book_what_cannot_be(idle: Sandbox) -> None:
    """Unknown types and accounts, another account's type, and a taken id are refused."""
    with pytest.raises(LookupError, match="met_unknown"):
        idle.book(meeting_type_id="met_unknown")
    with pytest.raises(LookupError):
        idle.book(0, meeting_type_id=idle.meeting_types(1)[0]["_id"])
    with pytest.raises(LookupError):
        idle.book(2)
    with pytest.raises(ValueError, match="already"):
        idle.book(_id=idle.meetings()[0]["_id"])
    assert 12 == len(idle.meetings())


def test_cancel(idle: Sandbox) -> None:
    """It stays in the list, with the time of its cancellation."""
    before = idle.meetings(1)[0]
    canceled = idle.cancel(before["_id"])
    assert before | {"canceledAt": canceled["canceledAt"]} == canceled == idle.meetings(1)[0]


def test_edit(idle: Sandbox) -> None:
    """Fields are replaced, but not the id."""
    before = idle.meetings()[0]
    edited = idle.edit(before["_id"], start="2030-01-01T00:00:00.000Z", lead=None)
    assert before | {"start": "2030-01-01T00:00:00.000Z", "lead": None} == edited == idle.meetings()[0]
    with pytest.raises(ValueError, match="id"):
        idle.edit(before["_id"], _id="mee_other")


def test_remove(idle: Sandbox) -> None:
    """It is no longer in the list."""
    first, *others = idle.meetings()
    idle.remove(first["_id"])
    assert others == idle.meetings()


def test_unknown_meetings(idle: Sandbox) -> None:
    """It is a LookupError that names it."""
    for control in (idle.cancel, idle.edit, idle.remove):
        with pytest.raises(LookupError, match="mee_unknown"):
            control("mee_unknown")


def test_what_is_handed_out_is_a_copy(idle: Sandbox) -> None:
    """Changing a returned value does not change the sandbox."""
    booked = idle.book()
    kept = idle.meetings()
    for row in (*idle.meetings(), booked):
        row["attendees"].clear()
    idle.meeting_types()[0]["questions"].clear()
    assert kept == idle.meetings()
    assert idle.meeting_types()[0]["questions"]


def test_the_first_account(idle: Sandbox) -> None:
    """It has shortcuts; its key is not in the repr."""
    assert (idle.accounts[0].user_id, idle.accounts[0].api_key) == (idle.user_id, idle.api_key)
    assert idle.api_key not in repr(idle.accounts)


def test_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has an account's credentials and the base URL, unless options say otherwise."""
    module = types.ModuleType("lemcal_async._client")
    monkeypatch.setattr(module, "AsyncLemcal", dict, raising=False)
    monkeypatch.setitem(sys.modules, "lemcal_async._client", module)
    sandbox = Sandbox(accounts=2)
    second = sandbox.accounts[1]
    with pytest.raises(RuntimeError, match="until it is served"):
        sandbox.client()
    given = {"user_id": second.user_id, "api_key": second.api_key, "base_url": "http://localhost/x"}
    assert given == cast("Any", sandbox.client(1, base_url="http://localhost/x"))
    with sandbox.serve():
        expected = {
            "user_id": sandbox.user_id,
            "api_key": "other",
            "base_url": sandbox.base_url,
            "timeout": 3,
        }
        assert expected == cast("Any", sandbox.client(api_key="other", timeout=3))


@pytest.mark.parametrize(
    "options",
    [
        {"accounts": 0},
        {"meetings": -1},
        {"limit": 0},
        {"period": 0},
        {"latency": (-1, 0)},
        {"latency": (2, 1)},
        {"window": "hopping"},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    """They are refused at once."""
    with pytest.raises(ValueError):
        Sandbox(**options)


def test_controls_from_many_threads() -> None:
    """No booking is lost or duplicated under concurrency."""
    sandbox = Sandbox(meetings=0)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                kept, gone, changed = sandbox.book(), sandbox.book(), sandbox.book()
                sandbox.cancel(kept["_id"])
                sandbox.remove(gone["_id"])
                sandbox.edit(changed["_id"], note="seen")
                sandbox.meetings()
        except BaseException as error:  # noqa: BLE001  # checked in the thread that can fail the test
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = sandbox.meetings()
    assert [] == failures
    assert 400 == len(rows) == len({row["_id"] for row in rows})
    assert 200 == sum("canceledAt" in row for row in rows)
    assert 200 == sum(row.get("note") == "seen" for row in rows)


def test_the_log_keeps_the_newest() -> None:
    """A sandbox that keeps running does not fill the memory; a late update does not bring an entry back."""
    log = RequestLog(max_entries=2)
    numbers = [log.add_request(SeenRequest(at, "GET", "/me", "", None, {})) for at in (1.0, 2.0, 3.0)]
    for number in numbers:
        log.update(number, status_code=200)
    assert [1, 2, 3] == numbers
    assert [(2, 2.0, 200), (3, 3.0, 200)] == [
        (seen.number, seen.at, seen.status_code) for seen in log.snapshot()
    ]


def test_only_the_newest_keep_their_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists of busy tests do not pile up in memory."""
    monkeypatch.setattr("lemcal_async.sandbox._log.MAX_BODIES", 2)
    log = RequestLog()
    for _ in range(3):
        log.update(log.add_request(SeenRequest(0, "GET", "/me", "", None, {})), response_body="{}")
    assert [None, "{}", "{}"] == [seen.response_body for seen in log.snapshot()]


def test_following_a_journal() -> None:
    """A follower gets what changed since its revision, once; entries can be paged both ways."""
    journal = Journal[SeenRequest](3)
    for _ in range(4):
        journal.add(lambda number: SeenRequest(0, "GET", "/me", "", None, {}, number=number))
    known, changed = journal.changed_since(0)
    assert [2, 3, 4] == [entry.number for entry in changed]
    assert (known, []) == journal.changed_since(known)
    journal.update(2, status_code=200)
    journal.update(1, status_code=200)  # dropped meanwhile
    assert [(2, 200)] == [(entry.number, entry.status_code) for entry in journal.changed_since(known)[1]]
    assert [2, 3] == [entry.number for entry in journal.after(0, 2)]
    assert [4] == [entry.number for entry in journal.after(3, 10)]
    assert [] == journal.after(4, 10)
    assert [4, 3] == [entry.number for entry in journal.before(None, 2)]
    assert [2] == [entry.number for entry in journal.before(3, 10)]
    assert [] == Journal[SeenRequest](3).after(0, 10) + Journal[SeenRequest](3).before(None, 10)


NAIVE = datetime(2026, 3, 2, tzinfo=UTC).replace(tzinfo=None)


def test_a_follower_that_slept_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are remembered for a while only, and a journal says whether it remembers enough."""
    monkeypatch.setattr("lemcal_async.sandbox._log._MAX_CHANGES", 2)
    journal = Journal[SeenRequest](10)
    assert [True, False] == [journal.covers(revision) for revision in (0, 1)]
    for _ in range(4):
        journal.add(lambda number: SeenRequest(0, "GET", "/me", "", None, {}, number=number))
    assert [False, False, True, True, False] == [journal.covers(revision) for revision in (0, 1, 2, 4, 5)]
    assert [3, 4] == [entry.number for entry in journal.changed_since(2)[1]]


ADA = {"email": "ada.lovelace@example.org", "name": "Ada Lovelace"}


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("guest", ["Ada Lovelace <ada.lovelace@example.org>", "ada.lovelace@example.org"])
def test_book_a_guest(idle: Sandbox, guest: str, *, public: bool) -> None:
    """A guest is an address with or without a name, and is put wherever the service has it."""
    booked = idle.book(guest=guest, public=public)
    meeting = from_wire(booked, Meeting)
    assert meeting.guest is not None
    assert ADA["email"] == meeting.guest.email
    assert ADA == booked["providedInfos"]
    assert ADA.items() <= booked["attendees"][1].items()
    assert ("lead" in booked) is not public
    if not public:
        assert ("Ada", "Lovelace") == (booked["lead"]["firstName"], booked["lead"]["lastName"])


@pytest.mark.parametrize(
    "start",
    [
        datetime(2026, 3, 2, 10, tzinfo=timezone(timedelta(hours=1))),
        "2026-03-02T09:00:00.000Z",
        "2026-03-02T10:00:00+01:00",
    ],
)
def test_book_at_a_time(idle: Sandbox, start: datetime | str) -> None:
    """The start is an aware datetime or ISO 8601, and the end follows from the meeting type."""
    booked = idle.book(start=start, meeting_type_id=idle.meeting_types()[1]["_id"])
    assert ("2026-03-02T09:00:00.000Z", "2026-03-02T09:45:00.000Z") == (booked["start"], booked["end"])
    moved = idle.edit(booked, start=datetime(2026, 3, 3, 9, tzinfo=UTC))
    assert "2026-03-03T09:00:00.000Z" == moved["start"] == idle.meetings()[-1]["start"]


@pytest.mark.parametrize("form", ["id", "row", "model"])
def test_a_meeting_in_any_form(idle: Sandbox, form: str) -> None:
    """The controls take an id, a row, or a model."""
    row = idle.book()
    meeting: Any = {"id": row["_id"], "row": row, "model": from_wire(row, Meeting)}[form]
    assert "canceledAt" in idle.cancel(meeting)
    assert 1 == idle.edit(meeting, note=1)["note"]
    idle.remove(meeting)
    assert 12 == len(idle.meetings())


@pytest.mark.parametrize(
    ("arguments", "kind", "advice"),
    [
        ({"guest": "x"}, ValueError, "guest='x': pass an e-mail address, such as 'ada@example.org'"),
        ({"guest": {"email": "a@b.c"}}, ValueError, "pass an e-mail address"),
        ({"start": NAIVE}, ValueError, "pass an aware datetime"),
        ({"start": "tomorrow"}, ValueError, "start='tomorrow': pass an aware datetime"),
        ({"end": NAIVE}, TypeError, "is not an aware datetime"),
        ({"canceled_at": None}, TypeError, "did you mean canceledAt="),
        ({"id": "mee_1"}, TypeError, "did you mean _id="),
        ({"email": "a@b.c"}, TypeError, "did you mean guest="),
        ({"note": {1, 2}}, TypeError, "must be a JSON value or a datetime, not set"),
    ],
)
def test_book_what_makes_no_sense(
    idle: Sandbox, arguments: dict[str, Any], kind: type[Exception], advice: str
) -> None:
    """A wrong argument is one line that says what to pass, and nothing is booked."""
    with pytest.raises(kind, match=re.escape(advice)):
        idle.book(**arguments)
    assert 12 == len(idle.meetings())


@pytest.mark.parametrize("meeting", [None, 7, {}, {"id": "mee_1"}, ["mee_1"]])
def test_what_is_no_meeting(idle: Sandbox, meeting: Any) -> None:
    """The error says what to pass."""
    for control in (idle.cancel, idle.remove, idle.edit):
        with pytest.raises(TypeError, match="pass a meeting's id, a row as returned by book"):
            control(meeting)
