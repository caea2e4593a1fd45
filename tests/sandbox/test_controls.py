"""The controls as method calls, without a server, from any thread."""

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
def sandbox() -> Sandbox:
    """Return a sandbox that is not served."""
    return Sandbox(accounts=2)


def test_book(sandbox: Sandbox) -> None:
    """By default, a public meeting of the first type is added at the end of the list."""
    meeting = sandbox.book()
    assert meeting == sandbox.meetings()[-1]
    assert (13, 12) == (len(sandbox.meetings(0)), len(sandbox.meetings(1)))
    assert sandbox.meeting_types()[0]["_id"] == meeting["meetingTypeId"]
    assert "lead" not in meeting
    assert [True] == [entry["primary"] for entry in meeting["attendees"] if "primary" in entry]
    assert meeting["createdAt"] < meeting["start"] < meeting["end"]


def test_book_with_arguments(sandbox: Sandbox) -> None:
    """The account, the meeting type, a lead and any wire field can be given."""
    wanted = sandbox.meeting_types(1)[2]
    meeting = sandbox.book(
        1, meeting_type_id=wanted["_id"], public=False, _id="mee_mine", timezone=None, extra=[1]
    )
    assert (wanted["_id"], wanted["name"]) == (meeting["meetingTypeId"], meeting["meetingTypeName"])
    assert sandbox.accounts[1].user_id == meeting["userId"]
    assert ("mee_mine", None, [1]) == (meeting["_id"], meeting["timezone"], meeting["extra"])
    assert {"email", "firstName", "lastName"} == set(meeting["lead"])


def test_impossible_bookings_are_refused(sandbox: Sandbox) -> None:
    """Unknown meeting types and accounts, another account's meeting type, and a used id are refused."""
    with pytest.raises(LookupError, match="met_unknown"):
        sandbox.book(meeting_type_id="met_unknown")
    with pytest.raises(LookupError):
        sandbox.book(0, meeting_type_id=sandbox.meeting_types(1)[0]["_id"])
    with pytest.raises(LookupError):
        sandbox.book(2)
    with pytest.raises(ValueError, match="already"):
        sandbox.book(_id=sandbox.meetings()[0]["_id"])
    assert 12 == len(sandbox.meetings())


def test_cancel(sandbox: Sandbox) -> None:
    """A canceled meeting stays in the list, with ``canceledAt``."""
    before = sandbox.meetings(1)[0]
    canceled = sandbox.cancel(before["_id"])
    assert before | {"canceledAt": canceled["canceledAt"]} == canceled == sandbox.meetings(1)[0]


def test_edit(sandbox: Sandbox) -> None:
    """Fields can be replaced, except the id."""
    before = sandbox.meetings()[0]
    edited = sandbox.edit(before["_id"], start="2030-01-01T00:00:00.000Z", lead=None)
    assert before | {"start": "2030-01-01T00:00:00.000Z", "lead": None} == edited == sandbox.meetings()[0]
    with pytest.raises(ValueError, match="id"):
        sandbox.edit(before["_id"], _id="mee_other")


def test_remove(sandbox: Sandbox) -> None:
    """A removed meeting is no longer in the list."""
    first, *others = sandbox.meetings()
    sandbox.remove(first["_id"])
    assert others == sandbox.meetings()


def test_unknown_meeting(sandbox: Sandbox) -> None:
    """Each control raises a LookupError that names the id."""
    for control in (sandbox.cancel, sandbox.edit, sandbox.remove):
        with pytest.raises(LookupError, match="mee_unknown"):
            control("mee_unknown")


def test_returned_values_are_copies(sandbox: Sandbox) -> None:
    """Changing a returned value does not change the sandbox."""
    booked = sandbox.book()
    kept = sandbox.meetings()
    for row in (*sandbox.meetings(), booked):
        row["attendees"].clear()
    sandbox.meeting_types()[0]["questions"].clear()
    assert kept == sandbox.meetings()
    assert sandbox.meeting_types()[0]["questions"]


def test_shortcuts_to_the_first_account(sandbox: Sandbox) -> None:
    """``user_id`` and ``api_key`` are those of the first account; the repr omits the API key."""
    assert (sandbox.accounts[0].user_id, sandbox.accounts[0].api_key) == (sandbox.user_id, sandbox.api_key)
    assert sandbox.api_key not in repr(sandbox.accounts)


def test_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gets the account's credentials and the base URL, unless options override them."""
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
def test_invalid_options_are_refused(options: dict[str, Any]) -> None:
    """The constructor raises ValueError."""
    with pytest.raises(ValueError):
        Sandbox(**options)


def test_controls_from_many_threads() -> None:
    """No booking is lost or duplicated under concurrency."""
    sandbox = Sandbox(meetings=0)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                canceled, removed, edited = sandbox.book(), sandbox.book(), sandbox.book()
                sandbox.cancel(canceled["_id"])
                sandbox.remove(removed["_id"])
                sandbox.edit(edited["_id"], note="seen")
                sandbox.meetings()
        except BaseException as error:  # noqa: BLE001  # asserted in the main thread
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


def test_log_keeps_the_latest_requests() -> None:
    """The log is bounded, and updating a dropped entry does not restore it."""
    log = RequestLog(max_entries=2)
    numbers = [log.add_request(SeenRequest(at, "GET", "/me", "", None, {})) for at in (1.0, 2.0, 3.0)]
    for number in numbers:
        log.update(number, status_code=200)
    assert [1, 2, 3] == numbers
    assert [(2, 2.0, 200), (3, 3.0, 200)] == [
        (seen.number, seen.at, seen.status_code) for seen in log.snapshot()
    ]


def test_log_keeps_only_the_latest_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large responses do not accumulate in memory."""
    monkeypatch.setattr("lemcal_async.sandbox._log.MAX_BODIES", 2)
    log = RequestLog()
    for _ in range(3):
        log.update(log.add_request(SeenRequest(0, "GET", "/me", "", None, {})), response_body="{}")
    assert [None, "{}", "{}"] == [seen.response_body for seen in log.snapshot()]


def test_journal_reports_changes() -> None:
    """A follower gets each change since its revision once; entries can be paged in both directions."""
    journal = Journal[SeenRequest](3)
    for _ in range(4):
        journal.add(lambda number: SeenRequest(0, "GET", "/me", "", None, {}, number=number))
    revision, changed = journal.changed_since(0)
    assert [2, 3, 4] == [entry.number for entry in changed]
    assert (revision, []) == journal.changed_since(revision)
    journal.update(2, status_code=200)
    journal.update(1, status_code=200)  # already dropped
    assert [(2, 200)] == [(entry.number, entry.status_code) for entry in journal.changed_since(revision)[1]]
    assert [2, 3] == [entry.number for entry in journal.after(0, 2)]
    assert [4] == [entry.number for entry in journal.after(3, 10)]
    assert [] == journal.after(4, 10)
    assert [4, 3] == [entry.number for entry in journal.before(None, 2)]
    assert [2] == [entry.number for entry in journal.before(3, 10)]
    assert [] == Journal[SeenRequest](3).after(0, 10) + Journal[SeenRequest](3).before(None, 10)


NAIVE = datetime(2026, 3, 2, tzinfo=UTC).replace(tzinfo=None)


def test_journal_covers_only_recent_revisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal remembers a limited number of changes, and reports which revisions it covers."""
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
def test_book_for_a_guest(sandbox: Sandbox, guest: str, *, public: bool) -> None:
    """A guest is an e-mail address, with or without a name, and appears in the service's fields."""
    booked = sandbox.book(guest=guest, public=public)
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
def test_book_at_a_time(sandbox: Sandbox, start: datetime | str) -> None:
    """The start is an aware datetime or ISO 8601; the meeting type determines the end."""
    booked = sandbox.book(start=start, meeting_type_id=sandbox.meeting_types()[1]["_id"])
    assert ("2026-03-02T09:00:00.000Z", "2026-03-02T09:45:00.000Z") == (booked["start"], booked["end"])
    moved = sandbox.edit(booked, start=datetime(2026, 3, 3, 9, tzinfo=UTC))
    assert "2026-03-03T09:00:00.000Z" == moved["start"] == sandbox.meetings()[-1]["start"]


@pytest.mark.parametrize("form", ["id", "row", "model"])
def test_controls_accept_id_row_or_model(sandbox: Sandbox, form: str) -> None:
    """The controls accept an id, a row or a model."""
    row = sandbox.book()
    meeting: Any = {"id": row["_id"], "row": row, "model": from_wire(row, Meeting)}[form]
    assert "canceledAt" in sandbox.cancel(meeting)
    assert 1 == sandbox.edit(meeting, note=1)["note"]
    sandbox.remove(meeting)
    assert 12 == len(sandbox.meetings())


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
def test_invalid_booking_arguments_are_refused(
    sandbox: Sandbox, arguments: dict[str, Any], kind: type[Exception], advice: str
) -> None:
    """The error says what to pass, and nothing is booked."""
    with pytest.raises(kind, match=re.escape(advice)):
        sandbox.book(**arguments)
    assert 12 == len(sandbox.meetings())


@pytest.mark.parametrize("meeting", [None, 7, {}, {"id": "mee_1"}, ["mee_1"]])
def test_invalid_meeting_arguments_are_refused(sandbox: Sandbox, meeting: Any) -> None:
    """The error says what to pass."""
    for control in (sandbox.cancel, sandbox.remove, sandbox.edit):
        with pytest.raises(TypeError, match="pass a meeting's id, a row as returned by book"):
            control(meeting)


@pytest.mark.parametrize("method", ["client", "meetings", "meeting_types", "hooks", "book"])
@pytest.mark.parametrize("account", [3, -1])
def test_unknown_account(method: str, account: int) -> None:
    """Every method refuses an account that does not exist with the same message."""
    with pytest.raises(
        LookupError, match=f"there is no account {account}; accounts are numbered from 0 to 1"
    ):
        getattr(Sandbox(accounts=2), method)(account)
    with pytest.raises(LookupError, match=f"there is no account {account}"):
        Sandbox(accounts=2).add_hook("http://example.com", account)
    with pytest.raises(TypeError, match="account must be a whole number, not 'x'"):
        getattr(Sandbox(), method)("x")
