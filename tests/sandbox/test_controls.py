"""The controls over the state, without a server: they are plain calls, from any thread."""

import sys
import threading
import types
from typing import Any, cast

import pytest

from lemcal_async.sandbox import Sandbox
from lemcal_async.sandbox._log import RequestLog, SeenRequest


@pytest.fixture
def idle() -> Sandbox:
    """Return a sandbox that nobody serves."""
    return Sandbox(accounts=2)


def test_book(idle: Sandbox) -> None:
    """A public meeting of the first type comes at the end of the list."""
    meeting = idle.book()
    assert meeting == idle.meetings()[-1]
    assert (13, 12) == (len(idle.meetings(0)), len(idle.meetings(1)))
    assert idle.meeting_types()[0]["_id"] == meeting["meetingTypeId"]
    assert "lead" not in meeting
    assert [True] == [entry["primary"] for entry in meeting["attendees"] if "primary" in entry]
    assert meeting["createdAt"] < meeting["start"] < meeting["end"]


def test_book_as_asked(idle: Sandbox) -> None:
    """Another account, another type, with a lead, and any field as given."""
    wanted = idle.meeting_types(1)[2]
    meeting = idle.book(
        1, meeting_type_id=wanted["_id"], public=False, _id="mee_mine", timezone=None, extra=[1]
    )
    assert (wanted["_id"], wanted["name"]) == (meeting["meetingTypeId"], meeting["meetingTypeName"])
    assert idle.accounts[1].user_id == meeting["userId"]
    assert ("mee_mine", None, [1]) == (meeting["_id"], meeting["timezone"], meeting["extra"])
    assert {"email", "firstName", "lastName"} == set(meeting["lead"])


def test_book_what_cannot_be(idle: Sandbox) -> None:
    """An unknown type or account, another account's type, an id that is taken."""
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
    """Fields are replaced, its type included, by which it is then found."""
    before = idle.meetings()[0]
    edited = idle.edit(before["_id"], start="2030-01-01T00:00:00.000Z", lead=None)
    assert before | {"start": "2030-01-01T00:00:00.000Z", "lead": None} == edited == idle.meetings()[0]
    with pytest.raises(ValueError, match="id"):
        idle.edit(before["_id"], _id="mee_other")


def test_remove(idle: Sandbox) -> None:
    """It is in no list any more."""
    first, *others = idle.meetings()
    idle.remove(first["_id"])
    assert others == idle.meetings()


def test_unknown_meetings(idle: Sandbox) -> None:
    """A LookupError that names it."""
    for control in (idle.cancel, idle.edit, idle.remove):
        with pytest.raises(LookupError, match="mee_unknown"):
            control("mee_unknown")


def test_what_is_handed_out_is_a_copy(idle: Sandbox) -> None:
    """Nothing that a test does to it changes the sandbox."""
    booked = idle.book()
    kept = idle.meetings()
    for row in (*idle.meetings(), booked):
        row["attendees"].clear()
    idle.meeting_types()[0]["questions"].clear()
    assert kept == idle.meetings()
    assert idle.meeting_types()[0]["questions"]


def test_the_first_account(idle: Sandbox) -> None:
    """It has names of its own; its key is in no repr."""
    assert (idle.accounts[0].user_id, idle.accounts[0].api_key) == (idle.user_id, idle.api_key)
    assert idle.api_key not in repr(idle.accounts)


def test_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has an account's credentials and the base URL; what is given wins."""
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
    """No booking is lost and none is doubled, whatever else goes on."""
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


def test_the_log_keeps_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox left running does not fill the memory; what ended late is not brought back."""
    monkeypatch.setattr("lemcal_async.sandbox._log.KEPT", 2)
    log = RequestLog()
    numbers = [log.add(SeenRequest(at, "GET", "/me", "", None, {})) for at in (1.0, 2.0, 3.0)]
    for number in numbers:
        log.complete(number, status=200, processed=True)
    assert [(2.0, 200), (3.0, 200)] == [(seen.at, seen.status) for seen in log.snapshot()]
