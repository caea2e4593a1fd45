"""The controls over HTTP, for a sandbox in another process."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lemcal_async.sandbox import Sandbox

from .conftest import Receiver


@pytest.fixture
def control(sandbox: Sandbox) -> Iterator[httpx.Client]:
    """Return a client of the control routes; they want no credentials."""
    base_url = sandbox.base_url.removesuffix("/api/lemcal") + "/_sandbox"
    with httpx.Client(base_url=base_url, trust_env=False) as control:
        yield control


def test_accounts(sandbox: Sandbox, control: httpx.Client) -> None:
    """Who it is made for needs the keys."""
    (account,) = control.get("/accounts").json()
    assert (sandbox.user_id, sandbox.api_key) == (account["userId"], account["apiKey"])
    assert (sandbox.accounts[0].email, sandbox.accounts[0].public_identifier) == (
        account["email"],
        account["publicIdentifier"],
    )


def test_bookings(sandbox: Sandbox, control: httpx.Client, client: httpx.Client, receiver: Receiver) -> None:
    """With nothing, or with what book() takes; hooks fire."""
    client.post("/hooks", json={"targetUrl": receiver.url(), "anyMeetingType": True})
    plain = control.post("/bookings")
    wanted = {"account": 0, "meetingTypeId": sandbox.meeting_types()[1]["_id"], "public": False, "note": "hi"}
    given = control.post("/bookings", json=wanted)
    assert [201, 201] == [plain.status_code, given.status_code]
    assert [plain.json(), given.json()] == sandbox.meetings()[-2:]
    assert (wanted["meetingTypeId"], "hi") == (given.json()["meetingTypeId"], given.json()["note"])
    assert "lead" in given.json()
    assert 2 == len(sandbox.wait_for_deliveries(2))


def test_meetings(sandbox: Sandbox, control: httpx.Client) -> None:
    """Cancel, and remove."""
    first, second, *_ = [row["_id"] for row in sandbox.meetings()]
    canceled = control.post(f"/meetings/{first}/cancel")
    removed = control.delete(f"/meetings/{second}")
    assert (200, sandbox.meetings()[0]) == (canceled.status_code, canceled.json())
    assert (204, b"") == (removed.status_code, removed.content)
    assert second not in [row["_id"] for row in sandbox.meetings()]


def test_faults(control: httpx.Client, client: httpx.Client) -> None:
    """By the name of the constructor, with its options and those of inject()."""
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
        (("POST", "/faults"), {"fault": "slow", "options": {"minutes": 1}}, 400, "minutes"),
        (("POST", "/faults"), {"fault": "empty_200", "times": 0}, 400, "times"),
        (("POST", "/faults"), [], 400, ""),
        (("POST", "/bookings"), {"account": 7}, 404, ""),
        (("POST", "/bookings"), {"account": "x"}, 400, ""),
        (("POST", "/bookings"), {"meetingTypeId": "met_unknown"}, 404, "no meeting type met_unknown"),
        (("POST", "/meetings/mee_unknown/cancel"), None, 404, "there is no meeting mee_unknown"),
        (("DELETE", "/meetings/mee_unknown"), None, 404, "there is no meeting mee_unknown"),
        (("GET", "/nothing"), None, 404, "Not Found"),
        (("GET", "/bookings"), None, 405, "Method Not Allowed"),
    ],
)
def test_what_is_refused(
    control: httpx.Client, call: tuple[str, str], body: Any, status: int, error: str
) -> None:
    """One line that says why."""
    answer = control.request(*call, json=body)
    assert status == answer.status_code
    assert answer.text.startswith(error) or error in answer.text


def test_a_body_that_is_not_json(control: httpx.Client) -> None:
    """A 400, not a failure of the server."""
    assert 400 == control.post("/bookings", content=b"{oops").status_code


def test_controls_are_not_logged_and_not_counted(sandbox: Sandbox, control: httpx.Client) -> None:
    """They are not part of what is played."""
    answer = control.get("/accounts")
    assert "x-ratelimit-limit" not in answer.headers
    assert [] == sandbox.requests
