"""The controls over HTTP, for a sandbox in another process."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import attrs
import httpx
import pytest

from lemcal_async.sandbox import Sandbox, faults

from .conftest import Receiver


@pytest.fixture
def control(sandbox: Sandbox) -> Iterator[httpx.Client]:
    """Return a client for the controls, without credentials."""
    base_url = sandbox.base_url.removesuffix("/api/lemcal") + "/_sandbox"
    with httpx.Client(base_url=base_url, trust_env=False) as control:
        yield control


def test_accounts(sandbox: Sandbox, control: httpx.Client) -> None:
    """The accounts are listed with their API keys."""
    (account,) = control.get("/accounts").json()
    assert (sandbox.user_id, sandbox.api_key) == (account["userId"], account["apiKey"])
    assert (sandbox.accounts[0].email, sandbox.accounts[0].public_identifier) == (
        account["email"],
        account["publicIdentifier"],
    )


def test_book(sandbox: Sandbox, control: httpx.Client, client: httpx.Client, receiver: Receiver) -> None:
    """The optional body contains the arguments of book(); hooks fire."""
    client.post("/hooks", json={"targetUrl": receiver.url(), "anyMeetingType": True})
    plain = control.post("/bookings")
    wanted = {
        "account": 0,
        "meetingTypeId": sandbox.meeting_types()[1]["_id"],
        "public": False,
        "eventId": "hi",
    }
    given = control.post("/bookings", json=wanted)
    assert [201, 201] == [plain.status_code, given.status_code]
    assert [plain.json(), given.json()] == sandbox.meetings()[-2:]
    assert (wanted["meetingTypeId"], "hi") == (given.json()["meetingTypeId"], given.json()["eventId"])
    assert "lead" in given.json()
    assert 2 == len(sandbox.wait_for_deliveries(2))


def test_cancel_and_remove_a_meeting(sandbox: Sandbox, control: httpx.Client) -> None:
    """Meetings can be canceled and removed."""
    first, second, *_ = [row["_id"] for row in sandbox.meetings()]
    canceled = control.post(f"/meetings/{first}/cancel")
    removed = control.delete(f"/meetings/{second}")
    assert (200, sandbox.meetings()[0]) == (canceled.status_code, canceled.json())
    assert (204, b"") == (removed.status_code, removed.content)
    assert second not in [row["_id"] for row in sandbox.meetings()]


def test_faults(control: httpx.Client, client: httpx.Client) -> None:
    """The body contains the fault's function name, its options, and the options of inject()."""
    wanted = {"fault": "status", "options": {"code": 503}, "times": 2, "method": "GET", "path": "/meetings"}
    assert 204 == control.post("/faults", json=wanted).status_code
    assert 204 == control.post("/faults", json={"fault": "empty_200"}).status_code
    assert [503, 503] == [client.get("/meetings").status_code for _ in range(2)]
    assert b"" == client.get("/meetings").content
    assert 200 == client.get("/meetings").status_code


@pytest.mark.parametrize(
    ("call", "body", "status", "error"),
    [
        (("POST", "/faults"), {"fault": "SandboxResponse"}, 400, "fault must be one of empty_200, "),
        (("POST", "/faults"), {}, 400, "fault must be one of"),
        (("POST", "/faults"), {"fault": ["slow"]}, 400, "fault must be one of"),
        (
            ("POST", "/faults"),
            {"fault": "slow", "options": {"minutes": 1}},
            400,
            "fault slow has no option 'minutes'; its options are: seconds",
        ),
        (("POST", "/faults"), {"fault": "slow"}, 400, "fault slow requires the option seconds"),
        (
            ("POST", "/faults"),
            {"fault": "truncated", "options": {"x": 1}},
            400,
            "fault truncated has no option 'x'; it has none",
        ),
        (
            ("POST", "/faults"),
            {"fault": "status", "options": {"code": "x"}},
            400,
            "fault status: code must be a whole number, not 'x'",
        ),
        (
            ("POST", "/faults"),
            {"fault": "empty_200", "time": 1},
            400,
            "a fault has no field 'time'; the fields are",
        ),
        (("POST", "/faults"), {"fault": "empty_200", "path": "me"}, 400, "path must start with a slash"),
        (
            ("POST", "/bookings"),
            {"gest": "a@x.org"},
            400,
            "a booking has no field 'gest'; the fields are: account",
        ),
        (
            ("POST", "/hooks"),
            {"targetUrl": "http://x.org", "meetingTypeId": "met_x"},
            400,
            "a hook has no field 'meetingTypeId'",
        ),
        (("POST", "/faults"), {"fault": "empty_200", "times": 0}, 400, "times"),
        (("POST", "/faults"), {"fault": "slow", "options": [1]}, 400, "options must be a JSON object"),
        (("POST", "/faults"), [], 400, "the body must be a JSON object"),
        (
            ("POST", "/bookings"),
            {"account": 7},
            404,
            "there is no account 7; accounts are numbered from 0 to 0",
        ),
        (("POST", "/bookings"), {"account": "x"}, 400, "account must be a whole number, not 'x'"),
        (("POST", "/hooks"), {}, 400, "targetUrl is missing"),
        (("POST", "/hooks"), {"targetUrl": "http://example.com", "account": 7}, 404, "there is no account 7"),
        (("GET", "/meetings?account=-1"), None, 404, "there is no account -1"),
        (("GET", "/requests?after=x"), None, 400, "after must be a whole number, not 'x'"),
        (("POST", "/bookings"), {"meetingTypeId": ["x"]}, 400, "meetingTypeId must be a string, not ['x']"),
        (("POST", "/bookings"), {"meetingTypeId": "met_unknown"}, 404, "no meeting type met_unknown"),
        (("POST", "/meetings/mee_unknown/cancel"), None, 404, "there is no meeting mee_unknown"),
        (("DELETE", "/meetings/mee_unknown"), None, 404, "there is no meeting mee_unknown"),
        (("GET", "/nothing"), None, 404, "Not Found"),
        (("GET", "/bookings"), None, 405, "Method Not Allowed"),
    ],
)
def test_invalid_requests_are_refused(
    control: httpx.Client, call: tuple[str, str], body: Any, status: int, error: str
) -> None:
    """The response is a single line with the reason."""
    response = control.request(*call, json=body)
    assert status == response.status_code
    assert response.text.startswith(error) or error in response.text


def test_body_that_is_not_json(control: httpx.Client) -> None:
    """The response is a 400 that names the problem, not a server error."""
    response = control.post("/bookings", content=b"{oops")
    assert (400, "the body is not JSON: ") == (response.status_code, response.text[:22])


def test_controls_are_neither_logged_nor_counted(sandbox: Sandbox, control: httpx.Client) -> None:
    """Requests to the controls are not part of the API."""
    response = control.get("/accounts")
    assert "x-ratelimit-limit" not in response.headers
    assert [] == sandbox.requests


def test_requests(sandbox: Sandbox, control: httpx.Client, client: httpx.Client) -> None:
    """The log as JSON has the fields of ``Sandbox.requests``, and can be paged by number."""
    for _ in range(3):
        client.get("/meetings", params={"meetingTypeId": "met_x"})
    rows = control.get("/requests").json()
    assert [1, 2, 3] == [row["number"] for row in rows]
    assert set(attrs.asdict(sandbox.requests[0])) == set(rows[0])
    expected = ("GET", "/meetings", "meetingTypeId=met_x", sandbox.user_id, 200, True, 20, 19, "", "[]")
    names = ("method", "path", "query", "user_id", "status_code", "processed", "limit", "remaining")
    assert expected == (*(rows[0][name] for name in names), rows[0]["request_body"], rows[0]["response_body"])
    assert 0 <= rows[0]["seconds"] < 30
    assert datetime.fromisoformat(rows[0]["time"]).tzinfo is not None
    assert [3] == [row["number"] for row in control.get("/requests?after=2").json()]
    assert [] == control.get("/requests?after=3").json()
    assert rows[1] == control.get("/requests/2").json()
    assert 404 == control.get("/requests/7").status_code
    assert 400 == control.get("/requests?after=x").status_code


def test_log_names_the_fault(sandbox: Sandbox, control: httpx.Client, client: httpx.Client) -> None:
    """The log contains the fault and the duration, even if the connection was broken."""
    sandbox.inject(faults.slow(0.01))
    sandbox.inject(faults.reset_after_processing())
    client.get("/me")
    with pytest.raises(httpx.TransportError):
        client.get("/me")
    slow, broken = control.get("/requests").json()
    assert ("slow by 0.01 s", 200) == (slow["fault"], slow["status_code"])
    assert ("connection reset after processing", None) == (broken["fault"], broken["status_code"])
    assert slow["seconds"] >= 0.01
    assert broken["seconds"] is not None


def test_deliveries(sandbox: Sandbox, control: httpx.Client, receiver: Receiver) -> None:
    """Hooks can be added and deleted; deliveries can be paged, and repeated to the same target."""
    hook = control.post("/hooks", json={"targetUrl": receiver.url()}).json()
    assert [hook] == sandbox.hooks()
    booked = control.post("/bookings").json()
    sandbox.wait_for_deliveries(1)
    (row,) = control.get("/deliveries").json()
    assert (1, hook["_id"], booked["_id"], 200, None) == (
        row["number"],
        row["hook_id"],
        row["meeting_id"],
        row["status_code"],
        row["repeats"],
    )
    assert receiver.url("/hook?...") == row["target"]
    assert 202 == control.post("/deliveries/1/repeat").status_code
    sandbox.wait_for_deliveries(2)
    assert [(2, 1)] == [(row["number"], row["repeats"]) for row in control.get("/deliveries?after=1").json()]
    assert receiver.seen[0] == receiver.seen[1]
    assert 404 == control.post("/deliveries/7/repeat").status_code
    assert 204 == control.delete(f"/hooks/{hook['_id']}").status_code
    assert 404 == control.delete(f"/hooks/{hook['_id']}").status_code
    assert [] == sandbox.hooks()


def test_invalid_hooks_are_refused(control: httpx.Client) -> None:
    """An invalid target and a duplicate hook are refused."""
    assert 400 == control.post("/hooks", json={"targetUrl": "example.com"}).status_code
    assert 201 == control.post("/hooks", json={"targetUrl": "http://example.com"}).status_code
    again = control.post("/hooks", json={"targetUrl": "http://example.com"})
    assert (400, "there is already a hook for that target") == (again.status_code, again.text)


def test_edit_a_meeting(sandbox: Sandbox, control: httpx.Client) -> None:
    """PATCH replaces a meeting's fields."""
    meeting_id = sandbox.meetings()[0]["_id"]
    moved = control.patch(f"/meetings/{meeting_id}", json={"start": "2030-01-01T09:00:00.000Z"})
    assert (200, "2030-01-01T09:00:00.000Z") == (moved.status_code, sandbox.meetings()[0]["start"])
    assert 404 == control.patch("/meetings/mee_unknown", json={}).status_code
